"""What half of the prompts foretells of the other: how likely a rate, seen on *select*, is to be shown on *certify*.

For choosing whom to look at, never for a release: the look itself tests what `rate.py` tests.
"""

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats

from repair.checks.stats import PairedCounts

_PRIOR = 0.5  # Jeffreys'


def most_shown(*, known: int, n: int, shown: Callable[[PairedCounts], bool]) -> tuple[int, ...]:
    """By how many of the ``known`` hits of the aligned model are hits here too, the most others that ``shown`` allows.

    Of ``n`` prompts; -1 where not even none will do. More hits never show what fewer do not.
    """
    found, most = [], n - known
    for both in range(known + 1):
        while most >= 0 and not shown(_counts(both, most, known=known, n=n)):
            most -= 1
        found.append(most)
    return tuple(found)


def chance_to_be_shown(here: PairedCounts, *, known: int, n: int, most: Sequence[int]) -> float:
    """The chance that the other half stays within ``most``, by what was seen on this one.

    ``here`` is the candidate against the aligned model on the prompts asked so far; the aligned model hits ``known`` of
    the ``n`` prompts of the other half. Prompts on which the aligned model hits are another kind than the others: of
    each kind the candidate hits a beta-binomial number (Jeffreys' prior), so halves that are not equally hard for the
    aligned model are not taken to be so for the candidate.
    """
    too, alone = _weights(here.both, here.second_only, known), _weights(here.first_only, here.neither, n - known)
    within = np.append(np.cumsum(alone), 0.0)  # the last stands for -1
    return min(1.0, float(too @ within[list(most)]))


def _counts(both: int, own: int, *, known: int, n: int) -> PairedCounts:
    return PairedCounts(both=both, first_only=own, second_only=known - both, neither=n - known - own)


def _weights(hits: int, misses: int, n: int) -> np.ndarray:
    """How likely each number of hits is in ``n`` more, after so many hits and misses."""
    found: np.ndarray = stats.betabinom.pmf(np.arange(n + 1), n, hits + _PRIOR, misses + _PRIOR)
    return found
