"""Bisect a row of candidates that goes from the mildest repair to the strongest.

Safer and less useful along the row is an assumption about a trial that its policy declares; what it saves is
measured candidates, what it can cost is a better one that was passed over. Knows no prompts and no models.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from repair.checks.policy import Candidate, Family


class Reading(StrEnum):
    """What measuring one candidate says about those beside it."""

    TOO_MILD = "too mild"  # the model still obeys: nothing milder need be tried
    TOO_STRONG = "too strong"  # refuses, forgets or breaks too much: nothing stronger need be tried
    GOOD = "good"  # it passes: only something milder could keep more
    DOMINATED = "dominated"  # another candidate keeps more: only something milder could keep more than that
    IMPOSSIBLE = "impossible"  # could not be built, which says nothing about the others


@dataclass(kw_only=True)
class Bisection:
    """One family on its way.

    Attributes:
        wishes: From mild to strong; grows when a strength between two tried ones is asked for.
        readings: What is known, by place.
    """

    wishes: list[Candidate]
    readings: dict[int, Reading] = field(default_factory=dict)

    @classmethod
    def of(cls, family: Family) -> "Bisection":
        """Nothing tried yet."""
        return cls(wishes=list(family.wishes))

    @property
    def low(self) -> int:
        """Place of the strongest that is known to be too mild; -1 when none is."""
        return max((at for at, one in self.readings.items() if one is Reading.TOO_MILD), default=-1)

    @property
    def high(self) -> int:
        """Place of the mildest beyond which nothing need be tried; one past the end when there is none."""
        ends = {Reading.TOO_STRONG, Reading.GOOD, Reading.DOMINATED}
        return min((at for at, one in self.readings.items() if one in ends), default=len(self.wishes))

    def place_of(self, wish: Candidate) -> int:
        """Where it stands; places move when a strength is put in between."""
        return next(at for at, one in enumerate(self.wishes) if one is wish)

    def next(self) -> int | None:
        """The place to measure: the middle of what is open; None when nothing is."""
        open_ones = [at for at in range(self.low + 1, self.high) if at not in self.readings]
        return open_ones[(len(open_ones) - 1) // 2] if open_ones else None

    def refine(self) -> bool:
        """Put a candidate between the mildest good one and the milder one that was not; whether there is one."""
        good = [at for at, one in self.readings.items() if one is Reading.GOOD]
        if not good or (at := min(good)) == 0 or self.readings.get(at - 1) is not Reading.TOO_MILD:
            return False
        middle = between(self.wishes[at - 1].parameters, self.wishes[at].parameters)
        if middle is None:
            return False
        self.wishes.insert(at, Candidate(method=self.wishes[at].method, parameters=middle))
        self.readings = {place + (place >= at): one for place, one in self.readings.items()}
        return True

    def closed(self, wish: Candidate) -> str:
        """Why it need not be measured; nothing where it is still open."""
        at, low, high = self.place_of(wish), self.low, self.high
        if at < low:
            return "milder than one of its kind that obeys still"
        return f"stronger than one of its kind that is {self.readings[high]}" if at > high else ""


def between(mild: Mapping[str, Any], strong: Mapping[str, Any]) -> dict[str, Any] | None:
    """Parameters half way, where the two differ in exactly one number that is no count; None elsewhere.

    >>> between({"strength": 0.8}, {"strength": 0.4})
    {'strength': 0.6}
    """
    if set(mild) != set(strong):
        return None
    different = [key for key in mild if mild[key] != strong[key]]
    if len(different) != 1:
        return None
    (key,) = different
    middle = _middle(mild[key], strong[key])
    return None if middle is None else {**mild, key: middle}


def _middle(one: Any, other: Any) -> Any:
    if isinstance(one, float) and isinstance(other, float):
        # Rounded, so that what a report prints is what was run.
        return round((one + other) / 2, 3 - math.floor(math.log10(max(abs(one), abs(other)))))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return between(one, other)
    if _is_row(one) and _is_row(other) and len(one) == len(other):
        different = [at for at, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
        if len(different) != 1:
            return None
        middle = _middle(one[different[0]], other[different[0]])
        return None if middle is None else [middle if at == different[0] else item for at, item in enumerate(one)]
    return None


def _is_row(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)
