"""One line of the result: how often a rule erred in a setting, beside what it promises."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.int64]
T = TypeVar("T")

SLACK: Final = 3.5
"""Monte Carlo errors above its promise that a rule may seem to err by luck; of a hundred lines, one in fifty runs."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A rule in a setting.

    Attributes:
        rule: What it is called.
        setting: True rates, prompts, margins.
        error: What counts as an error.
        promised: It should err in this share of the runs at most.
        gates: Whether a release rests on it: then the promise must hold; otherwise it is told how near it comes.
        runs: How many were simulated.
        errors: In how many it erred.
        prompts: Asked on average; None where the number is fixed.
    """

    rule: str
    setting: str
    error: str
    promised: float
    gates: bool
    runs: int
    errors: int
    prompts: float | None = None

    @property
    def share(self) -> float:
        """Of the runs with an error."""
        return self.errors / self.runs

    @property
    def monte_carlo_error(self) -> float:
        """Standard error of the share."""
        return math.sqrt(max(self.share * (1 - self.share), 1 / self.runs) / self.runs)

    @property
    def holds(self) -> bool:
        """Whether the promise holds, as far as so many runs can tell; True where none is made."""
        luck = math.sqrt(self.promised * (1 - self.promised) / self.runs)
        return not self.gates or self.share <= self.promised + SLACK * luck

    def as_dict(self) -> dict[str, Any]:
        """For the result file."""
        return {
            **asdict(self),
            "share": self.share,
            "monte_carlo_error": self.monte_carlo_error,
            "holds": self.holds,
        }


def how_often(erred: Callable[..., bool], *columns: Iterable[int] | Counts) -> int:
    """In how many rows of the columns it erred; asked once for each row that is different."""
    table = np.stack([np.asarray(column, dtype=np.int64) for column in columns])
    rows, counts = np.unique(table, axis=1, return_counts=True)
    return sum(int(count) for row, count in zip(rows.T.tolist(), counts, strict=True) if erred(*row))


def generator(seed: int, *parts: object) -> np.random.Generator:
    """A stream of its own for each setting, so that one more setting changes no other."""
    return np.random.default_rng([seed, *"/".join(map(str, parts)).encode()])
