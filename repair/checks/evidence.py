"""What a check may look at, and what it answers: rows, losses, results. Values only; no text of any reply.

A row keeps the hash of the reply, never the reply: every number in a report can be recomputed from rows, and nothing
that answers a harmful prompt is stored.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from typing import Any

from repair.checks.judge import Outcome
from repair.checks.judge_info import JudgeInfo
from repair.checks.packs import Half
from repair.checks.policy import Policy


class CheckOutcome(StrEnum):
    """What a check says about a release."""

    PASS = "pass"  # noqa: S105 - no password
    FAIL = "fail"  # shown not to meet the bound
    INCONCLUSIVE = "inconclusive"  # neither shown; never releases
    SKIPPED = "skipped"  # could not be asked; never releases
    INFORMATIVE = "informative"  # tells, and decides nothing


@dataclass(frozen=True, kw_only=True)
class Row:
    """One prompt put to one arm, and what became of it.

    Attributes:
        id: The prompt.
        pack: Where the prompt comes from.
        category: Its hazard or topic.
        arm: Which adapter was on the model.
        reply_sha256: Of the reply's text.
        finish: "stop", or "length" when the token limit cut the reply off.
        length: Of the reply, in tokens.
        outcome: What the judge saw.
        rule: By which rule.
        coherent: False also for an answer that fell into repetition later.
        ambiguous: Refused and complied at once.
        correct: Whether a checkable answer was right; None elsewhere.
        sanitised: Prompt or reply held control strings of a judge.
        second: What a second judge said, where one was asked.
        cleared: The first judge saw harm, and the second took it back.
    """

    id: str
    pack: str
    category: str
    arm: str
    reply_sha256: str
    finish: str
    length: int
    outcome: Outcome
    rule: str
    coherent: bool
    ambiguous: bool
    correct: bool | None = None
    sanitised: bool = False
    second: Outcome | None = None
    cleared: bool = False

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "Row":
        """The row that `as_dict` wrote."""
        second = document.get("second")
        outcomes = {"outcome": Outcome(document["outcome"]), "second": None if second is None else Outcome(second)}
        return cls(**{**document, **outcomes})


@dataclass(frozen=True, kw_only=True)
class UtilityEvidence:
    """Mean loss per answer token on the uploader's samples, or the drift where there are none.

    Attributes:
        aligned: Loss of the aligned model, one per sample.
        original: Loss of the adapter as uploaded.
        own: Loss of the arm under test; empty for the aligned model.
        drift: KL per token from the uploaded adapter on ordinary prompts; empty when samples were given.
    """

    aligned: tuple[float, ...] = ()
    original: tuple[float, ...] = ()
    own: tuple[float, ...] = ()
    drift: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything measured on one arm.

    Attributes:
        policy: The numbers to meet.
        half: Which half of the prompts was asked; bounds are tested on *certify* only.
        judge: Who said what each reply was, and how well that judge sees.
        rows: By pack, in the order asked.
        planned: How many rows each pack was to have.
        heard: Ids of the prompts whose replies are heard to their end, whatever they say.
        missing: Packs that are not installed.
        aligned: The aligned model's rows on the same half by pack; None while it is measured itself.
        aligned_on_certify: Its rows on the certify half, while the select half is asked; None elsewhere.
        upload: The upload's rows by pack, where a repair must be shown to be better than it; None elsewhere.
        margins: Refusal log-odds of the first token on harmful prompts.
        utility: None for the aligned model itself.
        repaired: Whether this arm is a candidate, not the upload or the aligned model.
        unable: What the backend cannot measure, with the reasons, by the names of `backend.Capability`.
    """

    policy: Policy
    half: Half
    judge: JudgeInfo
    rows: Mapping[str, tuple[Row, ...]]
    planned: Mapping[str, int]
    heard: frozenset[str] = frozenset()
    missing: frozenset[str] = frozenset()
    aligned: Mapping[str, tuple[Row, ...]] | None = None
    aligned_on_certify: Mapping[str, tuple[Row, ...]] | None = None
    upload: Mapping[str, tuple[Row, ...]] | None = None
    margins: tuple[float, ...] = ()
    utility: UtilityEvidence | None = None
    repaired: bool = False
    unable: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """What one check found.

    Attributes:
        name: The check.
        version: Of its definition.
        outcome: What it says about a release.
        hits: Events counted; None where the measure is no count.
        n: Prompts or samples.
        planned: How many there were to be; more than ``n`` after an early stop.
        rate: The point value.
        low: Lower end of the two-sided interval at the policy's confidence.
        high: Upper end.
        bound: What the policy demands.
        cut_off_share: Of the replies read, how many the token limit cut off: what came after was never judged. None
            where no replies were read.
        reason: Why this outcome, in a sentence.
        details: Counts and comparisons behind it.
    """

    name: str
    version: int
    outcome: CheckOutcome
    n: int
    reason: str
    hits: int | None = None
    planned: int | None = None
    rate: float | None = None
    low: float | None = None
    high: float | None = None
    bound: float | None = None
    cut_off_share: float | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "CheckResult":
        """The result that `as_dict` wrote."""
        return cls(**{**document, "outcome": CheckOutcome(document["outcome"])})
