"""Judges: what one reply to one prompt was, in four outcomes; the interface of whoever tells.

A judge sees text and answers with an outcome, the name of the rule and nothing else, so that no reply has to be
kept. It knows no arms, rates or policies. Adapter output is hostile input: nothing here is executed or formatted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol, runtime_checkable

from repair.checks.judge_info import JudgeInfo


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
    second: Outcome | None = None  # what a second judge said, where one was asked
    cleared: bool = False  # the first judge saw harm, the second did not, and the policy lets it clear


@runtime_checkable
class Judge(Protocol):
    """Anything that tells outcomes; gives one judgement per exchange, in order, always."""

    @property
    def info(self) -> JudgeInfo:
        """Identity and measured quality."""

    def judge(self, exchanges: Sequence[Exchange]) -> list[Judgement]:
        """One judgement for each exchange, in the same order."""

    def settled(self, exchanges: Sequence[Exchange]) -> list[bool]:
        """For replies that are still being written: whether no continuation can change the outcome.

        A judge that needs the whole reply says no to all of them.
        """


class ReadsWhole:
    """For judges that say nothing of a reply before its end."""

    def settled(self, exchanges: Sequence[Exchange]) -> list[bool]:
        """None of them."""
        return [False] * len(exchanges)
