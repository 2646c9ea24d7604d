"""Two arms on the same prompts: who hits more often, by how much, and whether by less than a margin.

Only the prompts on which they differ tell. Score intervals are for the eye; what gates is exact.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
from scipy import optimize, special, stats

from repair.checks.statistics.binomial import DEFAULT_CONFIDENCE, Interval, wilson

_GRID: Final = 65  # values of the unknown share of differing prompts between which the exact test then looks closer
_FINER: Final = 17  # values each time it does
_CLOSER: Final = 3  # times
_NEARLY: Final = 0.9  # of the best of those, above which another peak may be the higher one
_EDGE: Final = 1e-9


@dataclass(frozen=True, kw_only=True)
class PairedCounts:
    """How often two arms hit on the same prompts."""

    both: int
    first_only: int
    second_only: int
    neither: int

    @classmethod
    def of(cls, first: Sequence[bool], second: Sequence[bool]) -> "PairedCounts":
        """Count two columns of the same prompts in the same order."""
        pairs = list(zip(first, second, strict=True))
        return cls(
            both=sum(a and b for a, b in pairs),
            first_only=sum(a and not b for a, b in pairs),
            second_only=sum(b and not a for a, b in pairs),
            neither=sum(not a and not b for a, b in pairs),
        )

    def swapped(self) -> "PairedCounts":
        """The same with the second arm first."""
        return PairedCounts(
            both=self.both, first_only=self.second_only, second_only=self.first_only, neither=self.neither
        )

    @property
    def n(self) -> int:
        """Number of prompts."""
        return self.both + self.first_only + self.second_only + self.neither


def mcnemar_exact(counts: PairedCounts, *, two_sided: bool = True) -> float:
    """Exact p-value; one-sided asks whether the first arm hits more often than the second.

    McNemar 1947, by the binomial distribution of the differing pairs.
    """
    discordant = counts.first_only + counts.second_only
    if discordant == 0:
        return 1.0
    larger = max(counts.first_only, counts.second_only) if two_sided else counts.first_only
    tail = float(stats.binom.sf(larger - 1, discordant, 0.5))
    return min(1.0, 2 * tail) if two_sided else tail


def newcombe_paired(counts: PairedCounts, *, confidence: float = DEFAULT_CONFIDENCE) -> Interval:
    """Interval of ``rate(first) - rate(second)`` on paired prompts (Newcombe 1998, his method 10); for display.

    It takes back from the two Wilson intervals what the arms have in common, and takes back too much where many prompts
    are hit by both: with 30 of 104 in common a test by its upper end at 5 % errs in 10 %. So nothing is gated on it.
    """
    n = counts.n
    if n == 0:
        return Interval(value=math.nan, low=-1.0, high=1.0)
    first = wilson(counts.both + counts.first_only, n, confidence=confidence)
    second = wilson(counts.both + counts.second_only, n, confidence=confidence)
    phi = _phi(counts)
    down = (first.value - first.low, second.high - second.value)
    up = (first.high - first.value, second.value - second.low)
    difference = first.value - second.value
    return Interval(
        value=difference,
        low=difference - math.sqrt(max(0.0, down[0] ** 2 - 2 * phi * down[0] * down[1] + down[1] ** 2)),
        high=difference + math.sqrt(max(0.0, up[0] ** 2 - 2 * phi * up[0] * up[1] + up[1] ** 2)),
    )


def _phi(counts: PairedCounts) -> float:
    """Newcombe's continuity-corrected correlation of the pairs, zero where a margin is empty."""
    margins = (
        (counts.both + counts.first_only)
        * (counts.second_only + counts.neither)
        * (counts.both + counts.second_only)
        * (counts.first_only + counts.neither)
    )
    if margins == 0:
        return 0.0
    product: float = counts.both * counts.neither - counts.first_only * counts.second_only
    if product > 0:
        product = max(product - counts.n / 2, 0)
    return product / math.sqrt(margins)


def tango_paired(counts: PairedCounts, *, confidence: float = DEFAULT_CONFIDENCE) -> Interval:
    """Score interval of ``rate(first) - rate(second)``: the differences that the score test does not reject.

    Tango 1998. It reads the differing prompts alone. Close to exact, not exact: for display.
    """
    n = counts.n
    if n == 0:
        return Interval(value=math.nan, low=-1.0, high=1.0)
    z = float(stats.norm.ppf(1 - (1 - confidence) / 2))
    b, c = counts.first_only, counts.second_only
    difference = (b - c) / n

    def crossing(towards: float, level: float) -> float:
        def gap(at: float) -> float:
            return float(_score(np.float64(b), np.float64(c), n, at)) - level

        inner, outer = difference + math.copysign(_EDGE, towards), math.copysign(1 - _EDGE, towards)
        if inner * towards >= outer * towards or gap(outer) * gap(inner) > 0:
            return math.copysign(1.0, towards)
        return float(optimize.brentq(gap, inner, outer))

    return Interval(value=difference, low=crossing(-1.0, z), high=crossing(1.0, -z))


def _score(b: Any, c: Any, n: int, margin: float) -> Any:
    """Tango's statistic: how far ``b - c`` is from ``n * margin`` in standard errors, at the likeliest such share.

    ``b`` (first only) and ``c`` (second only) may be arrays.
    """
    linear = (2 * n - b + c) * margin - b - c
    root = np.sqrt(np.maximum(linear * linear + 8 * n * c * margin * (1 - margin), 0.0))
    # The share of "second only" of greatest likelihood under the margin; that of "first only" is larger by the margin.
    second_only = np.maximum((root - linear) / (4 * n), max(0.0, -margin))
    variance = n * np.maximum(2 * second_only + margin - margin * margin, 0.0)
    # No spread at all is a margin of zero and no prompt on which the arms differ: no distance either.
    return (b - c - n * margin) / np.sqrt(np.where(variance > 0, variance, 1.0))


def excess_p(counts: PairedCounts, *, margin: float) -> float:
    """Exact p-value of "the first arm's rate exceeds the second's by ``margin`` or more".

    Small where the excess is shown to be less. Unconditional: results are ordered by Tango's score, and the probability
    of one as extreme is maximised over the unknown share of prompts on which the arms differ (Suissa and Shuster 1991;
    Sidik 2003), so that it errs no more often than it says whatever that share is. 1 without prompts.
    """
    return _exact_p(counts.first_only, counts.second_only, counts.n, margin)


@cache
def _exact_p(b: int, c: int, n: int, margin: float) -> float:
    if n == 0:
        return 1.0
    counts = np.arange(n + 1, dtype=np.float64)
    scores = _score(counts[:, None], counts[None, :], n, margin)
    as_extreme = scores <= float(_score(np.float64(b), np.float64(c), n, margin)) + _EDGE
    # The score falls with the prompts that only the second arm hits, so each row is extreme from some column on.
    least = np.where(as_extreme.any(axis=1), as_extreme.argmax(axis=1), n + 1)
    return _largest(lambda shares: _tails(least, n, shares, margin), max(0.0, -margin), (1 - margin) / 2)


def _largest(chances: Callable[[Any], Any], lowest: float, highest: float) -> float:
    """The largest value between two ends: on a grid denser towards both, then ever closer around its best points."""
    grid = lowest + (highest - lowest) * (1 - np.cos(np.pi * np.linspace(0, 1, _GRID))) / 2
    found = chances(grid)
    before, after = np.r_[-1.0, found[:-1]], np.r_[found[1:], -1.0]
    largest = float(found.max())
    for at in np.flatnonzero((found >= _NEARLY * largest) & (found >= before) & (found >= after)).tolist():
        low, high = grid[max(at - 1, 0)], grid[min(at + 1, _GRID - 1)]
        for _ in range(_CLOSER):
            finer = np.linspace(low, high, _FINER)
            values = chances(finer)
            best = int(values.argmax())
            largest = max(largest, float(values[best]))
            low, high = finer[max(best - 1, 0)], finer[min(best + 1, _FINER - 1)]
    return largest


def _tails(least: Any, n: int, second_only: Any, margin: float) -> Any:
    """Probability of at least ``least[b]`` prompts that only the second arm hits, summed over ``b`` of the first's.

    One for each possible probability in ``second_only``.
    """
    b = np.flatnonzero(least <= n - np.arange(n + 1))
    wanted, left = least[b], n - b
    first_only = (second_only + margin)[:, None]
    ways = special.gammaln(n + 1) - special.gammaln(b + 1) - special.gammaln(left + 1)
    hits = np.exp(ways + special.xlogy(b, first_only) + special.xlog1py(left, -first_only))
    given = np.minimum(1.0, second_only[:, None] / np.where(first_only < 1, 1 - first_only, 1.0))
    # The binomial tail as a beta integral; none at all are always reached.
    reached = np.where(wanted > 0, special.betainc(np.maximum(wanted, 1), left - np.maximum(wanted, 1) + 1, given), 1.0)
    return (hits * reached).sum(axis=1)


def non_inferior(counts: PairedCounts, *, margin: float, confidence: float = DEFAULT_CONFIDENCE) -> bool:
    """Whether the first arm's hit rate is proven to exceed the second's by less than ``margin``."""
    return excess_p(counts, margin=margin) <= 1 - confidence


def shown_in_excess(counts: PairedCounts, *, margin: float, confidence: float = DEFAULT_CONFIDENCE) -> bool:
    """Whether the first arm's hit rate is proven to exceed the second's by more than ``margin``: the other side."""
    return excess_p(counts.swapped(), margin=-margin) <= 1 - confidence


def least_pairs(*, margin: float, confidence: float = DEFAULT_CONFIDENCE) -> int:
    """The fewest prompts on which two arms that never differ show an excess below ``margin``.

    At the margin this is likeliest where no prompt is hit by the second arm alone: (1 - margin)^n.
    """
    return max(1, math.ceil(math.log(1 - confidence) / math.log1p(-margin) - 1e-9))
