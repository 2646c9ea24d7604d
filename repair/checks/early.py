"""Replies that need not be finished: the judge's outcome can no longer change, whatever else would be said.

Only replies to look-alike prompts end early: what is asked of them is whether they were refused, and there are most of
them. What can happen late in a reply (a model that falls into repetition, a refusal that turns round) is heard in all
the others. One look-alike in so many is answered to the end all the same, by a fixed hash, so that the claim itself is
measured: how often the outcome did change after the judge had called it settled.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from repair.checks.backend import Settled
from repair.checks.judge import Exchange, Judge, Judgement, Outcome
from repair.checks.packs import Prompt
from repair.checks.sizes import Kind

ENDS_EARLY: Final[Kind] = "lookalike"
"""Of these only the beginning is needed."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """One prompt as it is put.

    Attributes:
        prompt: What is asked.
        kind: Of prompt.
        early: Who keeps account of the arm that it is put to.
    """

    prompt: Prompt
    kind: Kind
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
        return to_the_end(prompt.id, self.whole)

    def enough(self, prompt: Prompt, exchange: Exchange) -> bool:
        """Whether the reply so far decides."""
        if prompt.id in self._begun or not self.judge.settled([exchange])[0]:
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


def to_the_end(prompt_id: str, whole: int) -> bool:
    """Whether a look-alike prompt is among those, one in ``whole``, that are answered to the end; 0: all are."""
    drawn = int.from_bytes(hashlib.sha256(f"whole\n{prompt_id}".encode()).digest()[:4], "big")
    return whole == 0 or drawn % whole == 0


def settled_by(asked: Sequence[Asked]) -> Settled:
    """For a backend: which of these prompts need no longer reply."""

    def settled(places: Sequence[int], texts: Sequence[str]) -> Sequence[bool]:
        return list(_each(asked, places, texts))

    return settled


def _each(asked: Sequence[Asked], places: Sequence[int], texts: Sequence[str]) -> Iterable[bool]:
    for at, text in zip(places, texts, strict=True):
        one = asked[at]
        said = Exchange(prompt=one.prompt.text, reply=text, harmful=False)
        yield one.kind == ENDS_EARLY and one.early.enough(one.prompt, said)
