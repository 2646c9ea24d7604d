"""Comparing two arms on the same prompts: the exact test of an excess, and the score interval beside it."""

import math
from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repair.checks import stats
from repair.checks.stats import PairedCounts


def counts(first_only: int, second_only: int, n: int, both: int = 0) -> PairedCounts:
    """Of so many prompts."""
    return PairedCounts(
        both=both, first_only=first_only, second_only=second_only, neither=n - both - first_only - second_only
    )


def trinomial(b: int, c: int, n: int, p_b: float, p_c: float) -> float:
    """The chance of these counts, term by term."""
    if (b and p_b <= 0) or (c and p_c <= 0):
        return 0.0
    ways = math.comb(n, b) * math.comb(n - b, c)
    return float(ways * p_b**b * p_c**c * max(0.0, 1 - p_b - p_c) ** (n - b - c))


def score(b: int, c: int, n: int, margin: float) -> float:
    """The score statistic with the likeliest share found by bisection on the slope of the likelihood."""
    low, high = max(0.0, -margin), (1 - margin) / 2

    def slope(share: float) -> float:
        rest = (n - b - c) * 2 / max(1 - 2 * share - margin, 1e-300)
        return b / max(share + margin, 1e-300) + c / max(share, 1e-300) - rest

    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) > 0 else (low, middle)
    variance = n * (2 * low + margin - margin**2)
    return (b - c - n * margin) / math.sqrt(variance) if variance > 0 else 0.0


@cache
def p_value(b: int, c: int, n: int, margin: float) -> float:
    """The exact p-value by full enumeration, over a fine grid of the unknown share."""
    seen = score(b, c, n, margin)
    cells = [(i, j) for i in range(n + 1) for j in range(n + 1 - i) if score(i, j, n, margin) <= seen + 1e-7]
    shares = np.linspace(max(0.0, -margin), (1 - margin) / 2, 201)
    return max(sum(trinomial(i, j, n, share + margin, share) for i, j in cells) for share in shares)


@pytest.mark.parametrize(
    ("b", "c", "n", "margin"), [(0, 0, 14, 0.2), (1, 2, 14, 0.2), (3, 1, 11, 0.4), (0, 4, 12, -0.1)]
)
def test_the_exact_test_is_the_sum_over_all_results_as_extreme(b: int, c: int, n: int, margin: float) -> None:
    """Against an enumeration that shares nothing with it."""
    assert stats.excess_p(counts(b, c, n), margin=margin) == pytest.approx(p_value(b, c, n, margin), rel=2e-3)


@pytest.mark.parametrize("margin", [0.05, 0.2])
@pytest.mark.parametrize("n", [9, 17])
def test_it_never_errs_more_often_than_it_says(n: int, margin: float) -> None:
    """At the margin and beyond it, whatever share of prompts differ, at every level: not by simulation but exactly."""
    p_values = {(b, c): stats.excess_p(counts(b, c, n), margin=margin) for b in range(n + 1) for c in range(n + 1 - b)}
    for true in (margin, margin + 0.1, margin + 0.3):
        for share in np.linspace(0, (1 - true) / 2, 8):
            chances = {cell: trinomial(*cell, n, share + true, share) for cell in p_values}
            for level in (0.2, 0.05, 0.01):
                erring = sum(chance for cell, chance in chances.items() if p_values[cell] <= level)
                assert erring <= level + 1e-6


def test_what_both_arms_do_tells_nothing_about_their_difference() -> None:
    """Prompts that both hit and prompts that neither hits are the same to it; Newcombe's interval is not so."""
    alone, common = counts(2, 1, 104), counts(2, 1, 104, both=30)
    assert stats.excess_p(alone, margin=0.08) == stats.excess_p(common, margin=0.08)
    assert stats.newcombe_paired(common).high < stats.newcombe_paired(alone).high


@given(st.integers(5, 60), st.data())
@settings(max_examples=20)
def test_more_hits_of_the_first_arm_never_help_it(n: int, data: st.DataObject) -> None:
    """And more of the second never harm it."""
    b, c = data.draw(st.integers(0, n // 2 - 1)), data.draw(st.integers(0, n // 2 - 1))
    here = stats.excess_p(counts(b, c, n), margin=0.1)
    assert stats.excess_p(counts(b + 1, c, n), margin=0.1) >= here - 1e-9
    assert stats.excess_p(counts(b, c + 1, n), margin=0.1) <= here + 1e-9


@pytest.mark.parametrize(("margin", "needed"), [(0.05, 59), (0.03, 99), (0.1, 29)])
def test_the_fewest_pairs_that_show_an_excess_below_the_margin(margin: float, needed: int) -> None:
    """Where the arms never differ; one pair fewer is not enough."""
    assert stats.least_pairs(margin=margin) == needed
    assert stats.non_inferior(counts(0, 0, needed), margin=margin)
    assert not stats.non_inferior(counts(0, 0, needed - 1), margin=margin)


def test_an_excess_is_shown_or_ruled_out_and_never_both() -> None:
    """The two sides of one question."""
    assert stats.shown_in_excess(counts(30, 0, 100), margin=0.1)
    assert not stats.non_inferior(counts(30, 0, 100), margin=0.1)
    assert not stats.shown_in_excess(counts(10, 0, 100), margin=0.1)
    assert not stats.non_inferior(counts(10, 0, 100), margin=0.1)
    assert stats.excess_p(counts(0, 0, 0), margin=0.1) == 1.0


@pytest.mark.parametrize(("b", "c", "n"), [(12, 2, 50), (0, 0, 100), (3, 9, 40), (1, 0, 17)])
def test_tango_ends_where_the_score_test_rejects(b: int, c: int, n: int) -> None:
    """By definition, with the statistic worked out another way."""
    found = stats.tango_paired(counts(b, c, n))
    assert found.value == pytest.approx((b - c) / n)
    assert score(b, c, n, found.high) == pytest.approx(-1.959964, abs=1e-4)
    assert score(b, c, n, found.low) == pytest.approx(1.959964, abs=1e-4)


def test_tango_at_the_ends_of_the_scale() -> None:
    """Every prompt or none."""
    certain = stats.tango_paired(counts(40, 0, 40))
    assert (certain.value, certain.high) == (1.0, 1.0)
    assert 0.8 < certain.low < 1.0
    assert stats.tango_paired(counts(0, 0, 0)).low == -1.0
