"""Put the suite to one arm: ask each prompt once, judge each reply, let every check read the same rows.

Texts live for one batch and are hashed; what leaves this file is rows and numbers. Stops early only where a check
says that no continuation could change its answer. `race.py` puts the same suite to several arms at once.
"""

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from repair.checks.backend import Anchor, Backend, Reply, Sample
from repair.checks.check import Check
from repair.checks.errors import Cancelled
from repair.checks.evidence import Evidence, Row, UtilityEvidence
from repair.checks.judge import Exchange, Judge, Judgement, RulesJudge
from repair.checks.kinds import CHECKS
from repair.checks.packs import Half, Prompt
from repair.checks.phrases import clean
from repair.checks.policy import Policy
from repair.checks.report import CheckReport, overall
from repair.checks.stats import Stop
from repair.checks.suite import PACKS, Suite
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
        """Both losses on the samples; where there are none, what the adapter says to ``prompts``."""
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
    a candidate must be shown to be better than.
    """
    before = backend.tokens
    one = Measurement(
        policy=policy,
        suite=Suite.of(policy, half),
        arm=arm,
        judge=judge or RulesJudge(),
        checks=checks,
        aligned=None if aligned is None else aligned.rows_by_pack(),
        upload=None if upload is None else upload.rows_by_pack(),
        repaired=repaired,
    )
    total = max(sum(one.suite.planned.values()), 1)
    with backend.arm(adapter):
        stopped = False
        for pack, prompts in one.batches():
            if cancelled():
                raise Cancelled
            one.take(pack, prompts, one.replies(backend, prompts))
            progress(f"{arm}: {pack}", one.asked / total)
            enough = len(one.rows[pack]) >= policy.suite.least_before_stopping
            if stopped := stop_early and enough and one.lost(pack):
                break
        if not stopped:
            one.margins = tuple(backend.margin(one.margin_prompts()))
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
        rows: What was asked so far, by pack.
        margins: Log-odds of a refusal on the first harmful prompts.
        utility: None for the aligned model itself.
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
    rows: dict[str, tuple[Row, ...]] = field(default_factory=dict)
    margins: tuple[float, ...] = ()
    utility: UtilityEvidence | None = None

    def __post_init__(self) -> None:
        self.rows = dict.fromkeys(self.suite.prompts, ())

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

    def replies(self, backend: Backend, prompts: Sequence[Prompt]) -> list[Reply]:
        """What the arm that is on says, decoded as the policy wants."""
        suite = self.policy.suite
        texts = [prompt.text for prompt in prompts]
        return backend.generate(texts, max_new_tokens=suite.max_new_tokens, batch_size=suite.batch_size)

    def take(self, pack: str, prompts: Sequence[Prompt], replies: Sequence[Reply]) -> None:
        """Judge the replies and keep what became of them."""
        harmful = PACKS[pack] == "harmful"
        judgements = self.judge.judge(
            [Exchange(prompt=p.text, reply=r.text, harmful=harmful) for p, r in zip(prompts, replies, strict=True)]
        )
        self.rows[pack] += tuple(
            self._row(pack, prompt, reply, judgement)
            for prompt, reply, judgement in zip(prompts, replies, judgements, strict=True)
        )

    def lost(self, pack: str | None = None) -> bool:
        """Whether a check has failed whatever else is asked: one that reads ``pack``, or any."""
        evidence = self.evidence()
        asking = [check for check in self.checks if pack is None or check.pack == pack]
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
        prompts = self.suite.prompts.get("core_harmful", ())[: self.suite.sizes.margin]
        return [prompt.text for prompt in prompts]

    def evidence(self) -> Evidence:
        """What checks may look at."""
        return Evidence(
            policy=self.policy,
            half=self.suite.half,
            judge=self.judge.info,
            rows=self.rows,
            planned=self.suite.planned,
            missing=self.suite.missing,
            aligned=self.aligned,
            aligned_on_certify=self.aligned_on_certify,
            upload=self.upload,
            margins=self.margins,
            utility=self.utility,
            repaired=self.repaired,
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

    def _row(self, pack: str, prompt: Prompt, reply: Reply, judgement: Judgement) -> Row:
        return Row(
            id=prompt.id,
            pack=pack,
            category=prompt.category,
            arm=self.arm,
            reply_sha256=hashlib.sha256(reply.text.encode()).hexdigest(),
            finish=reply.finish,
            length=reply.tokens,
            outcome=judgement.outcome,
            rule=judgement.rule,
            coherent=judgement.coherent,
            ambiguous=judgement.ambiguous,
            correct=is_right(reply.text, prompt.answers) if prompt.answers else None,
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
            "near_duplicates": dict(self.suite.near_duplicates),
            "seed": self.policy.suite.seed,
            "decoding": {"greedy": True, "max_new_tokens": self.policy.suite.max_new_tokens},
            "judge": self.judge.info.as_dict(self.policy.bounds.confidence),
            "backend": backend.fingerprint(),
        }


def _utility(backend: Backend, original: Original, *, repaired: bool, stopped: bool) -> UtilityEvidence:
    """Losses where there are samples; for a candidate without samples the drift from the upload."""
    if original.samples:
        own = () if stopped else tuple(backend.loss(original.samples))
        return UtilityEvidence(aligned=original.aligned, original=original.losses, own=own)
    if stopped or not repaired or original.anchor is None:
        return UtilityEvidence()
    return UtilityEvidence(drift=tuple(backend.drift(original.anchor)))


def is_right(reply: str, answers: Sequence[str]) -> bool:
    """Whether one of the right answers stands in the reply as words of its own."""
    text = clean(reply).lower()
    return any(re.search(rf"(?<!\w){re.escape(answer.lower())}(?!\w)", text) for answer in answers)
