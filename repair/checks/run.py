"""Put the suite to one arm: ask each prompt once, judge each reply, let every check read the same rows.

Texts live for one batch and are hashed; what leaves this file is rows and numbers. Stops early only where a check
says that no continuation could change its answer. `race.py` puts the same suite to several arms at once.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from repair.checks.backend import Anchor, Backend, Capability, Reply, Sample
from repair.checks.check import Check
from repair.checks.early import Asked, Early, settled_by
from repair.checks.errors import Cancelled
from repair.checks.evidence import Evidence, Row, UtilityEvidence
from repair.checks.flips import Again
from repair.checks.judge import Exchange, Judge, Judgement
from repair.checks.judging import judge_of
from repair.checks.kinds import CHECKS
from repair.checks.packs import Half, Prompt
from repair.checks.policy import Policy
from repair.checks.report import CheckReport, overall
from repair.checks.right import is_right
from repair.checks.stats import Stop
from repair.checks.suite import Suite
from repair.context import Progress, silent
from repair.lora import LoraAdapter


def never() -> bool:
    """Nobody cancels."""
    return False


@dataclass(frozen=True, kw_only=True)
class Original:
    """What the utility of an arm is measured against; losses are in the order of the samples.

    Attributes:
        samples: The uploader's, those of the half asked.
        aligned: Loss of the aligned model.
        losses: Loss of the adapter as uploaded.
        anchor: Without samples: what the upload says to ordinary prompts, to measure the drift from it.
    """

    samples: tuple[Sample, ...] = ()
    aligned: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    anchor: Anchor | None = None

    @classmethod
    def measure(
        cls, backend: Backend, adapter: LoraAdapter, samples: Sequence[Sample], *, prompts: Sequence[str] = ()
    ) -> "Original":
        """Both losses on the samples; where there are none, what the adapter says to ``prompts``.

        What the backend cannot measure is left out, and no other measure takes its place.
        """
        able = backend.capabilities()
        if not able.has(Capability.LOSS if samples else Capability.DRIFT):
            return cls()
        with backend.arm(None):
            aligned = tuple(backend.loss(samples))
        with backend.arm(adapter):
            losses = tuple(backend.loss(samples))
            anchor = None if samples or not prompts else backend.anchor(prompts)
        return cls(samples=tuple(samples), aligned=aligned, losses=losses, anchor=anchor)


def run_checks(
    backend: Backend,
    adapter: LoraAdapter | None,
    policy: Policy,
    half: Half,
    *,
    arm: str = "input",
    aligned: CheckReport | None = None,
    upload: CheckReport | None = None,
    original: Original | None = None,
    repaired: bool = False,
    stop_early: bool = True,
    judge: Judge | None = None,
    checks: Sequence[Check] = CHECKS,
    progress: Progress = silent,
    cancelled: Callable[[], bool] = never,
) -> CheckReport:
    """Measure one arm: the aligned model (no adapter), the upload, or a candidate (``repaired``).

    With ``stop_early`` nothing more is asked once a check has failed for certain; at least the policy's
    ``least_before_stopping`` prompts of a pack are asked, so that an estimate stays worth printing. ``upload`` is what
    a candidate must be shown to be better than. Without a ``judge`` the policy's is opened.
    """
    before = backend.tokens
    one = Measurement(
        policy=policy,
        suite=Suite.of(policy, half),
        arm=arm,
        judge=judge_of(policy.judge) if judge is None else judge,
        checks=checks,
        aligned=None if aligned is None else aligned.rows_by_pack(),
        upload=None if upload is None else upload.rows_by_pack(),
        repaired=repaired,
        unable=backend.capabilities().as_dict(),
    )
    total = max(sum(one.suite.planned.values()), 1)
    with backend.arm(adapter):
        stopped = False
        for pack, prompts in one.batches():
            if cancelled():
                raise Cancelled
            one.take(pack, prompts, one.replies(backend, one.asking(pack, prompts)))
            progress(f"{arm}: {pack}", one.asked / total)
            enough = len(one.rows[pack]) >= policy.suite.least_before_stopping
            if stopped := stop_early and enough and one.lost(pack):
                break
        if not stopped:
            if Capability.MARGIN.value not in one.unable:
                one.margins = tuple(backend.margin(one.margin_prompts()))
            one.ask_again(backend)
        if original is not None:
            one.utility = _utility(backend, original, repaired=repaired, stopped=stopped)
    return one.report(backend, tokens=backend.tokens - before)


@dataclass(kw_only=True)
class Measurement:
    """One arm while it is asked.

    Attributes:
        policy: The numbers to meet.
        suite: The prompts of the half asked.
        arm: What the rows call it.
        judge: Says what each reply was.
        checks: What reads the rows.
        aligned: The aligned model's rows on the same half by pack.
        aligned_on_certify: Its rows on the certify half, while the select half is asked.
        upload: The upload's, where the arm must be shown to be better than it.
        repaired: Whether it is a candidate.
        unable: What the backend cannot measure, with the reasons.
        rows: What was asked so far, by pack.
        margins: Log-odds of a refusal on the first harmful prompts.
        utility: None for the aligned model itself.
        early: Which replies need not be finished.
        flips: What came out differently when it was asked again; None where it was not.
    """

    policy: Policy
    suite: Suite
    arm: str
    judge: Judge
    checks: Sequence[Check] = CHECKS
    aligned: Mapping[str, tuple[Row, ...]] | None = None
    aligned_on_certify: Mapping[str, tuple[Row, ...]] | None = None
    upload: Mapping[str, tuple[Row, ...]] | None = None
    repaired: bool = False
    unable: Mapping[str, str] = field(default_factory=dict)
    rows: dict[str, tuple[Row, ...]] = field(default_factory=dict)
    margins: tuple[float, ...] = ()
    utility: UtilityEvidence | None = None
    early: Early = field(init=False)
    flips: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        self.rows = dict.fromkeys(self.suite.prompts, ())
        self.early = Early(judge=self.judge, whole=self.policy.suite.whole)

    @property
    def asked(self) -> int:
        """Prompts so far."""
        return sum(map(len, self.rows.values()))

    def batches(self) -> Iterator[tuple[str, tuple[Prompt, ...]]]:
        """Everything the suite asks, pack after pack."""
        size = self.policy.suite.batch_size
        for pack, prompts in self.suite.prompts.items():
            for start in range(0, len(prompts), size):
                yield pack, prompts[start : start + size]

    def replies(self, backend: Backend, asked: Sequence[Asked], *, batch_size: int | None = None) -> list[Reply]:
        """What the arm that is on says, decoded as the policy wants, as far as it is needed."""
        suite = self.policy.suite
        return backend.generate(
            [one.prompt.text for one in asked],
            max_new_tokens=suite.max_new_tokens,
            batch_size=batch_size or suite.batch_size,
            settled=settled_by(asked) if suite.whole else None,
        )

    def asking(self, pack: str, prompts: Sequence[Prompt]) -> list[Asked]:
        """The prompts as this arm is asked them."""
        return [Asked(prompt=one, kind=self.suite.packs.kind_of(pack), early=self.early) for one in prompts]

    def ask_again(self, backend: Backend) -> None:
        """Some of the certify half in other company, as many as the policy says; the arm that was asked is on."""
        count = self.policy.suite.repeated if self.suite.half == "certify" else 0
        rows = [row for rows in self.rows.values() for row in rows]
        if not count or not rows:
            return
        apart = Early(judge=self.judge, whole=self.policy.suite.whole)
        asked = {
            (pack, one.prompt.id): replace(one, early=apart)
            for pack, prompts in self.suite.prompts.items()
            for one in self.asking(pack, prompts)
        }
        again = Again.of(rows, asked, count=count, batch_size=self.policy.suite.batch_size)
        replies = self.replies(backend, again.asked, batch_size=again.batch_size)
        self.flips = again.compared([reply.text for reply in replies], self.judge)

    def take(self, pack: str, prompts: Sequence[Prompt], replies: Sequence[Reply]) -> None:
        """Judge the replies and keep what became of them."""
        harmful = self.suite.packs.kind_of(pack) == "harmful"
        judgements = self.judge.judge(
            [Exchange(prompt=p.text, reply=r.text, harmful=harmful) for p, r in zip(prompts, replies, strict=True)]
        )
        self.rows[pack] += tuple(
            row_of(self.arm, pack, prompt, reply, judgement)
            for prompt, reply, judgement in zip(prompts, replies, judgements, strict=True)
        )
        for prompt, reply, judgement in zip(prompts, replies, judgements, strict=True):
            self.early.note(prompt, reply.finish, judgement)

    def lost(self, pack: str | None = None) -> bool:
        """Whether a check has failed whatever else is asked: one that reads ``pack``, or any."""
        evidence = self.evidence()
        kind = None if pack is None else self.suite.packs.kind_of(pack)
        asking = [check for check in self.checks if kind is None or check.kind == kind]
        return any(check.settled(evidence) is Stop.FAIL for check in asking)

    def unpromising(self, least: float) -> tuple[Check, float] | None:
        """The check that is worst off with its chance to end within the screen, where that is below ``least``."""
        evidence = self.evidence()
        found = [
            (0.0 if check.settled(evidence) is Stop.FAIL else check.promise(evidence), check) for check in self.checks
        ]
        chance, check = min(found, key=lambda one: one[0])
        return (check, chance) if chance < least else None

    def margin_prompts(self) -> list[str]:
        """The first harmful prompts, as many as the policy's size says."""
        return [prompt.text for prompt in self.suite.of_kind("harmful")[: self.suite.sizes.margin]]

    def evidence(self) -> Evidence:
        """What checks may look at."""
        return Evidence(
            policy=self.policy,
            half=self.suite.half,
            judge=self.judge.info,
            rows=self.rows,
            planned=self.suite.planned,
            heard=self.suite.heard,
            missing=self.suite.missing,
            aligned=self.aligned,
            aligned_on_certify=self.aligned_on_certify,
            upload=self.upload,
            margins=self.margins,
            utility=self.utility,
            repaired=self.repaired,
            unable=self.unable,
        )

    def report(self, backend: Backend, *, tokens: int) -> CheckReport:
        """What every check says of the rows so far."""
        evidence = self.evidence()
        results = tuple(check.examine(evidence) for check in self.checks)
        return CheckReport(
            arm=self.arm,
            half=self.suite.half,
            outcome=overall(results),
            checks=results,
            rows=tuple(row for rows in self.rows.values() for row in rows),
            suite=self._describe(backend),
            tokens=tokens,
        )

    def _describe(self, backend: Backend) -> dict[str, Any]:
        """What is behind the numbers."""
        return {
            "policy": {
                "name": self.policy.name,
                "version": self.policy.version,
                "digest": self.policy.digest,
            },
            "packs": dict(self.suite.digests),
            "missing_packs": sorted(self.suite.missing),
            "fewer_than_asked": self.suite.short,
            "near_duplicates": dict(self.suite.near_duplicates),
            "seed": self.policy.suite.seed,
            "decoding": {
                "greedy": True,
                "max_new_tokens": self.policy.suite.max_new_tokens,
                "batch_size": self.policy.suite.batch_size,
                "flip_rate": self.flips,
            },
            "early_stopping": self.early.as_dict(),
            "judge": self.judge.info.as_dict(self.policy.bounds.confidence),
            "backend": backend.fingerprint(),
            "unable": dict(self.unable),
        }


def row_of(arm: str, pack: str, prompt: Prompt, reply: Reply, judgement: Judgement) -> Row:
    """What is kept of one reply."""
    return Row(
        id=prompt.id,
        pack=pack,
        category=prompt.category,
        arm=arm,
        reply_sha256=hashlib.sha256(reply.text.encode()).hexdigest(),
        finish=reply.finish,
        length=reply.tokens,
        outcome=judgement.outcome,
        rule=judgement.rule,
        coherent=judgement.coherent,
        ambiguous=judgement.ambiguous,
        sanitised=judgement.sanitised,
        second=judgement.second,
        cleared=judgement.cleared,
        correct=is_right(reply.text, prompt.answers) if prompt.answers else None,
    )


def _utility(backend: Backend, original: Original, *, repaired: bool, stopped: bool) -> UtilityEvidence:
    """Losses where there are samples; for a candidate without samples the drift from the upload."""
    if original.samples:
        own = () if stopped else tuple(backend.loss(original.samples))
        return UtilityEvidence(aligned=original.aligned, original=original.losses, own=own)
    if stopped or not repaired or original.anchor is None:
        return UtilityEvidence()
    return UtilityEvidence(drift=tuple(backend.drift(original.anchor)))
