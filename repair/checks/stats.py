"""Exact and score intervals, paired tests and the stopping rule; numbers in, numbers out.

Clopper-Pearson bounds gate a release, Wilson intervals are for the eye. Nothing here knows prompts or policies.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Final

import numpy as np
from scipy import stats

DEFAULT_CONFIDENCE: Final = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A closed interval with the value it surrounds."""

    value: float
    low: float
    high: float


def _check_counts(hits: int, n: int) -> None:
    if not 0 <= hits <= n:
        raise ValueError(f"{hits} hits in {n} trials")


def clopper_pearson_upper(hits: int, n: int, *, confidence: float = DEFAULT_CONFIDENCE) -> float:
    """One-sided exact upper bound: the largest rate at which ``hits`` or fewer are still this likely."""
    _check_counts(hits, n)
    return 1.0 if hits == n else float(stats.beta.ppf(confidence, hits + 1, n - hits))


def clopper_pearson_lower(hits: int, n: int, *, confidence: float = DEFAULT_CONFIDENCE) -> float:
    """One-sided exact lower bound."""
    _check_counts(hits, n)
    return 0.0 if hits == 0 else float(stats.beta.ppf(1 - confidence, hits, n - hits + 1))


def clopper_pearson(hits: int, n: int, *, confidence: float = DEFAULT_CONFIDENCE) -> Interval:
    """Two-sided exact interval; [0, 1] without trials."""
    each = 1 - (1 - confidence) / 2
    return Interval(
        value=hits / n if n else math.nan,
        low=clopper_pearson_lower(hits, n, confidence=each),
        high=clopper_pearson_upper(hits, n, confidence=each),
    )


def wilson(hits: int, n: int, *, confidence: float = DEFAULT_CONFIDENCE) -> Interval:
    """Two-sided score interval, for charts and for Newcombe's difference."""
    _check_counts(hits, n)
    if n == 0:
        return Interval(value=math.nan, low=0.0, high=1.0)
    z = float(stats.norm.ppf(1 - (1 - confidence) / 2))
    rate, spread = hits / n, z * z / n
    centre = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / n + spread / (4 * n)) / (1 + spread)
    return Interval(value=rate, low=max(0.0, centre - half), high=min(1.0, centre + half))


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
    """Exact p-value; one-sided asks whether the first arm hits more often than the second."""
    discordant = counts.first_only + counts.second_only
    if discordant == 0:
        return 1.0
    larger = max(counts.first_only, counts.second_only) if two_sided else counts.first_only
    tail = float(stats.binom.sf(larger - 1, discordant, 0.5))
    return min(1.0, 2 * tail) if two_sided else tail


def newcombe_paired(counts: PairedCounts, *, confidence: float = DEFAULT_CONFIDENCE) -> Interval:
    """Interval of ``rate(first) - rate(second)`` on paired prompts (Newcombe 1998, his method 10)."""
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


def excess_upper(counts: PairedCounts, *, confidence: float = DEFAULT_CONFIDENCE) -> float:
    """One-sided upper bound of how much more often the first arm hits than the second."""
    return newcombe_paired(counts, confidence=1 - 2 * (1 - confidence)).high


def non_inferior(counts: PairedCounts, *, margin: float, confidence: float = DEFAULT_CONFIDENCE) -> bool:
    """Whether the first arm's hit rate is proven to exceed the second's by less than ``margin``."""
    return excess_upper(counts, confidence=confidence) < margin


class Stop(StrEnum):
    """What a running count has already decided."""

    PASS = "pass"  # noqa: S105 -- no password: even if all that remain hit, the bound holds
    FAIL = "fail"  # more hits than the bound allows
    GO_ON = "go_on"  # undecided


@cache
def allowed_hits(n: int, *, bound: float, confidence: float = DEFAULT_CONFIDENCE, sensitivity: float = 1.0) -> int:
    """The most hits in ``n`` with an upper bound (over the sensitivity) within ``bound``; -1 if none are."""
    allowed = -1
    while allowed + 1 <= n and attack_bound(allowed + 1, n, confidence=confidence, sensitivity=sensitivity) <= bound:
        allowed += 1
    return allowed


def attack_bound(hits: int, n: int, *, confidence: float = DEFAULT_CONFIDENCE, sensitivity: float = 1.0) -> float:
    """Upper bound of the true rate when the judge sees a hit with at least this sensitivity."""
    if sensitivity <= 0:
        return 1.0  # a judge that may see nothing shows nothing
    return min(1.0, clopper_pearson_upper(hits, n, confidence=confidence) / sensitivity)


def curtailed(hits: int, seen: int, n: int, *, allowed: int) -> Stop:
    """Exact stopping for a fixed plan of ``n``: the answer is the one that all ``n`` would give."""
    _check_counts(hits, seen)
    if hits > allowed:
        return Stop.FAIL
    return Stop.PASS if hits + (n - seen) <= allowed else Stop.GO_ON


def paired_t(differences: Sequence[float], *, confidence: float = DEFAULT_CONFIDENCE) -> Interval:
    """Two-sided t interval of the mean difference; unbounded below two samples."""
    values = np.asarray(differences, dtype=np.float64)
    if len(values) < 2:  # noqa: PLR2004 -- no spread in one sample
        return Interval(value=float(values.mean()) if len(values) else math.nan, low=-math.inf, high=math.inf)
    mean, error = float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
    half = float(stats.t.ppf(1 - (1 - confidence) / 2, len(values) - 1)) * error
    return Interval(value=mean, low=mean - half, high=mean + half)


def bootstrap_ratio(
    numerator: Sequence[float],
    denominator: Sequence[float],
    *,
    confidence: float = DEFAULT_CONFIDENCE,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of ``sum(numerator) / sum(denominator)`` over resampled pairs."""
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(top), size=(resamples, len(top)))
    sums = bottom[picks].sum(axis=1)
    ratios = np.divide(top[picks].sum(axis=1), sums, out=np.full(resamples, np.nan), where=sums != 0)
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(ratios, [tail, 1 - tail])
    return Interval(value=float(top.sum() / bottom.sum()), low=float(low), high=float(high))


def chance_within(hits: int, seen: int, n: int, *, allowed: int) -> float:
    """How likely all ``n`` end with at most ``allowed`` hits, after ``hits`` in the first ``seen``.

    The predictive distribution under Jeffreys' prior: beta-binomial. For choosing what to look at next, never for a
    release.
    """
    _check_counts(hits, seen)
    return float(stats.betabinom.cdf(allowed - hits, n - seen, hits + 0.5, seen - hits + 0.5))
