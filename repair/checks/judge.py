"""Judges: what one reply to one prompt was, in four outcomes; the interface of whoever tells.

A judge sees text and answers with an outcome, the name of the rule and nothing else, so that no reply has to be
kept. It knows no arms, rates or policies. Adapter output is hostile input: nothing here is executed or formatted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final, Literal, Protocol, get_args, runtime_checkable

from repair.checks.stats import clopper_pearson_lower


class Outcome(StrEnum):
    """What a reply was."""

    REFUSAL = "refusal"  # declined, in any words
    HARMFUL_COMPLIANCE = "harmful_compliance"  # did, or began to do, what a harmful prompt asked
    HARMLESS_COMPLIANCE = "harmless_compliance"  # answered a safe prompt, or led a harmful one elsewhere
    INCOHERENT = "incoherent"  # no language: never safe, never helpful
    JUDGE_ERROR = "judge_error"  # the judge could not tell; never safe


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """One prompt with its reply, as a judge sees it; lives in memory only."""

    prompt: str
    reply: str
    harmful: bool  # whether the prompt asks for harm: a doubt counts against the adapter either way


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """The outcome of one exchange and the rule that decided it."""

    outcome: Outcome
    rule: str
    coherent: bool = True  # False also when a reply answered first and then fell into repetition
    ambiguous: bool = False  # refused and complied at once
    confidence: float | None = None  # in [0, 1], of this outcome; None where the judge has no number for it
    sanitised: bool = False  # prompt or reply held control strings of a judge, which were neutralised before reading


@dataclass(frozen=True, kw_only=True)
class Proportion:
    """A share measured on labelled rows."""

    hits: int
    n: int

    @property
    def rate(self) -> float:
        """The point value."""
        return self.hits / self.n

    def low_at(self, confidence: float) -> float:
        """What the true share is at least, with this one-sided confidence."""
        return clopper_pearson_lower(self.hits, self.n, confidence=confidence)

    def as_dict(self, confidence: float) -> dict[str, float | int]:
        """For the report: the counts, the point value, and the one-sided lower bound."""
        return {"hits": self.hits, "n": self.n, "rate": self.rate, "low": self.low_at(confidence)}


@dataclass(frozen=True, kw_only=True)
class JudgeInfo:
    """Which judge, and how well it was measured to see what people see."""

    name: str
    version: int
    sensitivity: Proportion  # P(judge says harmful | people say the objective was achieved)
    specificity: Proportion  # P(judge says not harmful | people say it was not)
    refusal_recall: Proportion  # P(judge says refusal | people say refusal)
    answer_recall: Proportion  # P(judge says no refusal | people say no refusal)
    measured_on: str

    def as_dict(self, confidence: float) -> dict[str, Any]:
        """For the report: who judged, and every measured quality with its lower bound at this confidence."""
        return {
            "name": self.name,
            "version": self.version,
            "confidence": confidence,
            **{quality: getattr(self, quality).as_dict(confidence) for quality in QUALITIES},
            "measured_on": self.measured_on,
        }


Quality = Literal["sensitivity", "specificity", "refusal_recall", "answer_recall"]
QUALITIES: Final[tuple[Quality, ...]] = get_args(Quality)


@runtime_checkable
class Judge(Protocol):
    """Anything that tells outcomes; gives one judgement per exchange, in order, always."""

    @property
    def info(self) -> JudgeInfo:
        """Identity and measured quality."""

    def judge(self, exchanges: Sequence[Exchange]) -> list[Judgement]:
        """One judgement for each exchange, in the same order."""
