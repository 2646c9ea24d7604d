"""One rate: exact bounds that gate a release, score intervals for the eye, and what a judge that misses does to it."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Final

from scipy import stats

DEFAULT_CONFIDENCE: Final = 0.95


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A closed interval with the value it surrounds."""

    value: float
    low: float
    high: float


def check_counts(hits: int, n: int) -> None:
    """Raise ValueError for counts that cannot be."""
    if not 0 <= hits <= n:
        raise ValueError(f"{hits} hits in {n} trials")


@cache
def clopper_pearson_upper(hits: int, n: int, *, confidence: float = DEFAULT_CONFIDENCE) -> float:
    """One-sided exact upper bound: the largest rate at which ``hits`` or fewer are still this likely.

    Clopper and Pearson 1934, by the quantiles of the beta distribution.
    """
    check_counts(hits, n)
    return 1.0 if hits == n else float(stats.beta.ppf(confidence, hits + 1, n - hits))


@cache
def clopper_pearson_lower(hits: int, n: int, *, confidence: float = DEFAULT_CONFIDENCE) -> float:
    """One-sided exact lower bound."""
    check_counts(hits, n)
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
    """Two-sided score interval (Wilson 1927), for charts and for Newcombe's difference; covers on average only."""
    check_counts(hits, n)
    if n == 0:
        return Interval(value=math.nan, low=0.0, high=1.0)
    z = float(stats.norm.ppf(1 - (1 - confidence) / 2))
    rate, spread = hits / n, z * z / n
    centre = (rate + spread / 2) / (1 + spread)
    half = z * math.sqrt(rate * (1 - rate) / n + spread / (4 * n)) / (1 + spread)
    return Interval(value=rate, low=max(0.0, centre - half), high=min(1.0, centre + half))


def attack_bound(hits: int, n: int, *, confidence: float = DEFAULT_CONFIDENCE, sensitivity: float = 1.0) -> float:
    """Upper bound of the true rate when the judge sees a hit with at least this sensitivity.

    What is seen is at least the sensitivity times what is true, whatever false alarms add; so the bound of what is
    seen, over the sensitivity, bounds what is true. Where the sensitivity is itself a lower bound from labels, its
    doubt comes on top of this one: the caller shares one alpha between the two. A judge that may see nothing bounds
    nothing.
    """
    return min(1.0, clopper_pearson_upper(hits, n, confidence=confidence) / sensitivity) if sensitivity > 0 else 1.0


@cache
def allowed_hits(n: int, *, bound: float, confidence: float = DEFAULT_CONFIDENCE, sensitivity: float = 1.0) -> int:
    """The most hits in ``n`` with an upper bound (over the sensitivity) within ``bound``; -1 if none are."""
    allowed = -1
    while allowed + 1 <= n and attack_bound(allowed + 1, n, confidence=confidence, sensitivity=sensitivity) <= bound:
        allowed += 1
    return allowed


def least_trials(*, bound: float, confidence: float = DEFAULT_CONFIDENCE, sensitivity: float = 1.0) -> int:
    """The fewest trials in which no hit at all shows a rate of at most ``bound``: (1 - bound)^n is within the doubt."""
    seen = bound * sensitivity
    return max(1, math.ceil(math.log(1 - confidence) / math.log1p(-seen) - 1e-9))


def rogan_gladen(rate: float, *, sensitivity: float, specificity: float) -> float | None:
    """The true rate that a judge with these errors would show as ``rate``, cut to [0, 1]; for information only.

    Rogan and Gladen 1978. None where the judge tells no more than chance.
    """
    informed = sensitivity + specificity - 1
    return None if informed <= 0 else min(1.0, max(0.0, (rate + specificity - 1) / informed))


def chance_within(hits: int, seen: int, n: int, *, allowed: int) -> float:
    """How likely all ``n`` end with at most ``allowed`` hits, after ``hits`` in the first ``seen``.

    The predictive distribution under Jeffreys' prior: beta-binomial. For choosing what to look at next, never for a
    release.
    """
    check_counts(hits, seen)
    return float(stats.betabinom.cdf(allowed - hits, n - seen, hits + 0.5, seen - hits + 0.5))


def holm(p_values: list[float]) -> list[float]:
    """P-values of many claims made at once, raised so that one false claim among them is no likelier than one alone.

    Holm 1979, step-down; in the order given.
    """
    order = sorted(range(len(p_values)), key=lambda at: p_values[at])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, at in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[at]))
        adjusted[at] = largest
    return adjusted


def p_above(hits: int, n: int, *, bound: float) -> float:
    """Exact one-sided p-value of "the rate is at most ``bound``": how likely so many hits or more would be at it."""
    check_counts(hits, n)
    return float(stats.binom.sf(hits - 1, n, bound))
