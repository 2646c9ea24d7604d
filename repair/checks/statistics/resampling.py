"""Means and ratios of continuous numbers, one or several for each prompt."""

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from repair.checks.statistics.binomial import DEFAULT_CONFIDENCE, Interval


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
    """Percentile interval of ``sum(numerator) / sum(denominator)`` over resampled pairs (Efron 1979)."""
    top, bottom = np.asarray(numerator, dtype=np.float64), np.asarray(denominator, dtype=np.float64)
    picks = np.random.default_rng(seed).integers(0, len(top), size=(resamples, len(top)))
    sums = bottom[picks].sum(axis=1)
    ratios = np.divide(top[picks].sum(axis=1), sums, out=np.full(resamples, np.nan), where=sums != 0)
    tail = (1 - confidence) / 2
    low, high = np.nanquantile(ratios, [tail, 1 - tail])
    return Interval(value=float(top.sum() / bottom.sum()), low=float(low), high=float(high))


def cluster_bootstrap(
    samples: Sequence[Sequence[float]],
    *,
    confidence: float = DEFAULT_CONFIDENCE,
    resamples: int = 4000,
    seed: int = 0,
) -> Interval:
    """Percentile interval of the mean over all samples when each prompt gave several: prompts are drawn, not samples.

    Replies to one prompt resemble each other; to draw them one by one would take them for as many prompts. For the
    difference of two arms, give the differences. Field and Welsh 2007.
    """
    return bootstrap_ratio(
        [math.fsum(one) for one in samples],
        [float(len(one)) for one in samples],
        confidence=confidence,
        resamples=resamples,
        seed=seed,
    )
