"""One arm while it is asked: judge each reply, keep a row of it, let every check read the rows.

Texts live for one batch and are hashed; what leaves this file is rows and numbers.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from repair.checks.backend import Backend, Reply
from repair.checks.check import Check
from repair.checks.early import Asked, Early, settled_by
from repair.checks.evidence import Evidence, Row, UtilityEvidence
from repair.checks.flips import Again
from repair.checks.judge import Exchange, Judge, Judgement
from repair.checks.kinds import CHECKS
from repair.checks.packs import Prompt
from repair.checks.policy import Policy
from repair.checks.report import CheckReport, overall
from repair.checks.right import is_right
from repair.checks.stats import Stop
from repair.checks.suite import Suite


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
    _foreseen: tuple[Any, list[tuple[float, Check]]] | None = field(default=None, init=False)

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

    def promises(self) -> list[tuple[float, Check]]:
        """The chance to get through each check, worst first; worked out once for what was measured so far."""
        now = (self.asked, self.margins, self.utility)
        if self._foreseen is None or self._foreseen[0] != now:
            evidence = self.evidence()
            found = [
                (0.0 if check.settled(evidence) is Stop.FAIL else check.promise(evidence), check)
                for check in self.checks
            ]
            self._foreseen = (now, sorted(found, key=lambda one: one[0]))
        return self._foreseen[1]

    def chance(self) -> float:
        """The chance to get through all checks together."""
        return math.prod(chance for chance, _ in self.promises())

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
