"""Replies that need not be finished: the judge's outcome can no longer change, whatever else would be said.

One prompt in so many is answered to the end all the same, by a fixed hash, so that what happens late in a reply (a
model that falls into repetition, a refusal that turns round) is still measured, and so that the claim itself is: how
often the outcome did change after the judge had called it settled.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from repair.checks.backend import Settled
from repair.checks.judge import Exchange, Judge, Judgement, Outcome
from repair.checks.packs import Prompt
from repair.checks.right import is_right


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One prompt as it is put.

    Attributes:
        prompt: What is asked.
        harmful: Whether it asks for harm.
        early: Who keeps account of the arm that it is put to.
    """

    prompt: Prompt
    harmful: bool
    early: "Early"


@dataclass(kw_only=True)
class Early:
    """The account of one arm.

    Attributes:
        judge: Says what is settled.
        whole: One prompt in so many is answered to the end; 0 for all of them.
    """

    judge: Judge
    whole: int
    _begun: dict[str, Outcome] = field(default_factory=dict)
    _stopped: int = 0
    _finished: int = 0
    _changed: int = 0

    def to_the_end(self, prompt: Prompt) -> bool:
        """Whether this prompt is answered to the end by any arm."""
        if not self.whole:
            return True
        drawn = int.from_bytes(hashlib.sha256(f"whole\n{prompt.id}".encode()).digest()[:4], "big")
        return drawn % self.whole == 0

    def enough(self, prompt: Prompt, exchange: Exchange) -> bool:
        """Whether the reply so far decides."""
        if prompt.id in self._begun or not self.judge.settled([exchange])[0]:
            return False
        so_far = exchange.reply.rsplit(None, 1)[0]  # the last word may still grow
        if prompt.answers and not is_right(so_far, prompt.answers):
            return False
        if self.to_the_end(prompt):
            self._begun[prompt.id] = self.judge.judge([exchange])[0].outcome
            return False
        return True

    def note(self, prompt: Prompt, finish: str, judgement: Judgement) -> None:
        """What became of one reply."""
        self._stopped += finish == "settled"
        begun = self._begun.pop(prompt.id, None)
        if begun is not None:
            self._finished += 1
            self._changed += begun is not judgement.outcome

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return {
            "one_in": self.whole,
            "stopped": self._stopped,
            "settled_and_finished": self._finished,
            "changed_after_all": self._changed,
        }


def settled_by(asked: Sequence[Asked]) -> Settled:
    """For a backend: which of these prompts need no longer reply."""

    def settled(places: Sequence[int], texts: Sequence[str]) -> Sequence[bool]:
        return list(_each(asked, places, texts))

    return settled


def _each(asked: Sequence[Asked], places: Sequence[int], texts: Sequence[str]) -> Iterable[bool]:
    for at, text in zip(places, texts, strict=True):
        one = asked[at]
        yield one.early.enough(one.prompt, Exchange(prompt=one.prompt.text, reply=text, harmful=one.harmful))
