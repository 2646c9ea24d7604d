"""Where a plan stands, in fields: what a line of progress says to people, for programs."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Phase(StrEnum):
    """What is being measured."""

    ALIGNED = "aligned"  # the aligned model, once for a reference and a policy
    UPLOAD = "upload"  # the upload on the certify half
    CHOOSING = "choosing"  # candidates on the select half
    CERTIFYING = "certifying"  # the best of them on the certify half


@dataclass(frozen=True, kw_only=True)
class Standing:
    """One moment.

    Attributes:
        phase: What is being measured.
        alive: Candidates in the race; None before it.
        best: Share of the task that the best one kept that has passed so far; None where none has, or where the share
            cannot be known because the owner gave no samples.
        seconds_left: At most, for choosing; None where nothing was spent yet that it could be worked out from.
    """

    phase: Phase
    alive: int | None = None
    best: float | None = None
    seconds_left: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON; what is not known is left out."""
        found = {
            "phase": self.phase.value,
            "alive": self.alive,
            "best": None if self.best is None else round(self.best, 4),
            "seconds_left": None if self.seconds_left is None else round(self.seconds_left),
        }
        return {name: value for name, value in found.items() if value is not None}


Watch = Callable[[Standing], None]
"""Called whenever that changes, before the line of progress that tells it in words."""


def unwatched(_standing: Standing) -> None:
    """Tell nobody."""
