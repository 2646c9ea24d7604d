"""Intervals and tests against independent formulas, published tables and simulation."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from repair.checks import stats
from repair.checks.stats import PairedCounts, Stop


def binomial_cdf(hits: int, n: int, rate: float) -> float:
    """P(X <= hits) by summing the terms."""
    return math.fsum(math.comb(n, k) * rate**k * (1 - rate) ** (n - k) for k in range(hits + 1))


@pytest.mark.parametrize(("hits", "n"), [(0, 5), (1, 17), (4, 60), (30, 40), (9, 313)])
@pytest.mark.parametrize("confidence", [0.9, 0.95, 0.975])
def test_clopper_pearson_is_where_the_tail_has_the_doubt_left(hits: int, n: int, confidence: float) -> None:
    """By definition: at the bound, a result as extreme has probability one minus the confidence."""
    upper = stats.clopper_pearson_upper(hits, n, confidence=confidence)
    assert binomial_cdf(hits, n, upper) == pytest.approx(1 - confidence, rel=1e-9)
    if hits:
        lower = stats.clopper_pearson_lower(hits, n, confidence=confidence)
        assert 1 - binomial_cdf(hits - 1, n, lower) == pytest.approx(1 - confidence, rel=1e-9)


@pytest.mark.parametrize(
    ("bound", "hits", "n"),
    [(0.01, 0, 299), (0.02, 1, 236), (0.05, 0, 59), (0.05, 4, 181), (0.05, 5, 208), (0.1, 5, 103), (0.1, 10, 167)],
)
def test_smallest_samples_of_the_published_table(bound: float, hits: int, n: int) -> None:
    """So many prompts are just enough for so many hits, and one prompt fewer is not."""
    assert stats.allowed_hits(n, bound=bound) == hits
    assert stats.allowed_hits(n - 1, bound=bound) == hits - 1


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"), [(0, 10, 0.0, 0.2775), (5, 50, 0.0435, 0.2136), (81, 263, 0.2553, 0.3662)]
)
def test_wilson_gives_the_known_values(hits: int, n: int, low: float, high: float) -> None:
    """81 of 263 is Newcombe's own example."""
    found = stats.wilson(hits, n)
    assert found.low == pytest.approx(low, abs=5e-4)
    assert found.high == pytest.approx(high, abs=5e-4)


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5])
def test_intervals_cover_as_often_as_they_say(rate: float) -> None:
    """Exact bounds never cover less than promised, in a seeded simulation of many runs."""
    n, runs = 100, 10_000
    drawn = np.random.default_rng(7).binomial(n, rate, size=runs)
    upper = {k: stats.clopper_pearson_upper(int(k), n) for k in set(drawn.tolist())}
    both = {k: stats.clopper_pearson(int(k), n) for k in upper}
    assert np.mean([rate <= upper[int(k)] for k in drawn]) >= 0.947
    assert np.mean([both[int(k)].low <= rate <= both[int(k)].high for k in drawn]) >= 0.947


@pytest.mark.parametrize(
    ("first", "second", "one_sided"), [(5, 0, True), (7, 1, True), (9, 2, True), (10, 3, True), (12, 4, True)]
)
def test_mcnemar_reaches_five_percent_where_the_table_says(first: int, second: int, one_sided: bool) -> None:
    """One discordant pair fewer is not enough."""

    def p(a: int, b: int) -> float:
        return stats.mcnemar_exact(
            PairedCounts(both=3, first_only=a, second_only=b, neither=9), two_sided=not one_sided
        )

    assert p(first, second) < 0.05
    assert p(first - 1, second) >= 0.05


def test_mcnemar_is_the_binomial_tail() -> None:
    """Against the sum of terms, both sides."""
    for a, b in product(range(6), repeat=2):
        counts = PairedCounts(both=1, first_only=a, second_only=b, neither=2)
        tail = 1 - binomial_cdf(max(a, b) - 1, a + b, 0.5) if a + b else 1.0
        assert stats.mcnemar_exact(counts) == pytest.approx(min(1, 2 * tail))
        assert stats.mcnemar_exact(counts, two_sided=False) == pytest.approx(
            1 - binomial_cdf(a - 1, a + b, 0.5) if a and a + b else 1.0
        )


@pytest.mark.parametrize(
    ("cells", "low", "high"),
    [((1, 1, 7, 3), -0.7943, -0.1083 + 0.0), ((36, 12, 2, 0), 0.0569, 0.3404), ((0, 20, 0, 30), 0.2582, 0.5382 + 0.0)],
)
def test_newcombe_gives_plausible_and_published_intervals(
    cells: tuple[int, int, int, int], low: float, high: float
) -> None:
    """(36, 12, 2, 0) is the example of Newcombe 1998 for method 10: 0.0569 to 0.3404."""
    both, first, second, neither = cells
    found = stats.newcombe_paired(PairedCounts(both=both, first_only=first, second_only=second, neither=neither))
    assert found.value == pytest.approx((first - second) / sum(cells))
    assert found.low < found.value < found.high
    if cells == (36, 12, 2, 0):
        assert found.low == pytest.approx(low, abs=2e-4)
        assert found.high == pytest.approx(high, abs=2e-4)


@given(data=st.data(), n=st.integers(1, 60), allowed=st.integers(-1, 10))
def test_an_early_stop_says_what_the_whole_plan_would(data: st.DataObject, n: int, allowed: int) -> None:
    """Whatever comes after the stop, the answer at the end is the same."""
    row = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    truth = Stop.FAIL if sum(row) > allowed else Stop.PASS
    for seen in range(n + 1):
        found = stats.curtailed(sum(row[:seen]), seen, n, allowed=allowed)
        assert found in {Stop.GO_ON, truth}
    assert stats.curtailed(sum(row), n, n, allowed=allowed) is truth


def test_the_bound_over_a_judge_that_misses_covers_the_true_rate() -> None:
    """A rate seen through a judge of unknown sensitivity stays under the bound in 95 of 100 runs."""
    draw = np.random.default_rng(11)
    covered, runs, each = 0, 3000, 0.975
    for _ in range(runs):
        true, sensitivity = 0.08, 0.95
        low = stats.clopper_pearson_lower(int(draw.binomial(93, sensitivity)), 93, confidence=each)
        seen = int(draw.binomial(104, true * sensitivity))
        covered += true <= stats.attack_bound(seen, 104, confidence=each, sensitivity=low)
    assert covered / runs >= 0.95


def test_more_hits_never_lower_a_bound_and_more_trials_never_raise_it() -> None:
    """Monotone in both arguments."""
    for n in (10, 40):
        bounds = [stats.clopper_pearson_upper(k, n) for k in range(n + 1)]
        assert bounds == sorted(bounds)
        assert bounds[-1] == 1.0
        assert stats.clopper_pearson_upper(2, n + 1) < stats.clopper_pearson_upper(2, n)


@pytest.mark.parametrize(("bound", "sensitivity", "needed"), [(0.01, 1.0, 299), (0.05, 1.0, 59), (0.05, 0.9, 66)])
def test_the_fewest_prompts_that_show_a_bound(bound: float, sensitivity: float, needed: int) -> None:
    """With no hit at all; one prompt fewer shows less."""
    assert stats.least_trials(bound=bound, sensitivity=sensitivity) == needed
    assert stats.attack_bound(0, needed, sensitivity=sensitivity) <= bound
    assert stats.attack_bound(0, needed - 1, sensitivity=sensitivity) > bound


def test_a_judge_that_may_see_nothing_bounds_nothing() -> None:
    """No division by what is not there."""
    assert stats.attack_bound(0, 1000, sensitivity=0.0) == 1.0


@given(true=st.floats(0, 1), sensitivity=st.floats(0.6, 1), specificity=st.floats(0.6, 1))
def test_rogan_gladen_undoes_what_the_judge_did(true: float, sensitivity: float, specificity: float) -> None:
    """What is seen is hits that were seen and false alarms."""
    seen = true * sensitivity + (1 - true) * (1 - specificity)
    found = stats.rogan_gladen(seen, sensitivity=sensitivity, specificity=specificity)
    assert found == pytest.approx(true, abs=1e-9)
    assert stats.rogan_gladen(0.3, sensitivity=0.5, specificity=0.5) is None
    assert stats.rogan_gladen(0.0, sensitivity=0.9, specificity=0.9) == 0.0


@given(st.lists(st.floats(0, 1), min_size=1, max_size=7))
def test_holm_is_the_closed_test_of_bonferroni(p_values: list[float]) -> None:
    """A claim stands when every set of claims that holds it is rejected by Bonferroni: written out, set by set."""
    found = stats.holm(p_values)
    for at in range(len(p_values)):
        sets = [
            [at, *(other for other, taken in zip(others, chosen, strict=True) if taken)]
            for others in [[one for one in range(len(p_values)) if one != at]]
            for chosen in product([False, True], repeat=len(p_values) - 1)
        ]
        assert found[at] == pytest.approx(max(min(1, len(one) * min(p_values[i] for i in one)) for one in sets))


def test_replies_to_one_prompt_are_not_as_many_prompts() -> None:
    """Where all replies to a prompt agree, four of them tell what one tells; drawn one by one they would tell more."""
    draw = np.random.default_rng(5)
    once = [float(draw.random() < 0.3) for _ in range(60)]
    single = stats.cluster_bootstrap([[one] for one in once])
    repeated = stats.cluster_bootstrap([[one] * 4 for one in once])
    one_by_one = stats.cluster_bootstrap([[one] for one in once for _ in range(4)])
    assert repeated == single
    assert one_by_one.value == pytest.approx(single.value)
    assert one_by_one.high - one_by_one.low < 0.7 * (single.high - single.low)


def test_the_p_value_above_a_bound_is_the_binomial_tail() -> None:
    """By summing the terms."""
    assert stats.p_above(3, 9, bound=0.15) == pytest.approx(1 - binomial_cdf(2, 9, 0.15))
    assert stats.p_above(0, 9, bound=0.15) == 1.0


def test_impossible_counts_are_refused() -> None:
    """More hits than trials is a defect of the caller."""
    with pytest.raises(ValueError, match="hits"):
        stats.clopper_pearson_upper(3, 2)


def test_paired_t_is_the_textbook_interval() -> None:
    """Mean 2, standard error 1/sqrt(3), t at two degrees of freedom 4.3027."""
    found = stats.paired_t([1.0, 2.0, 3.0])
    assert found.value == 2
    assert found.high - 2 == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    assert stats.paired_t([1.0]).low == -math.inf


def test_bootstrap_ratio_is_centred_repeatable_and_exact_without_noise() -> None:
    """Proportional columns have one ratio whatever is drawn."""
    found = stats.bootstrap_ratio([0.8, 1.6, 2.4], [1.0, 2.0, 3.0])
    assert (found.low, found.value, found.high) == pytest.approx((0.8, 0.8, 0.8))
    noisy = stats.bootstrap_ratio([0.5, 2.0, 2.0, 1.0], [1.0, 2.0, 3.0, 1.0])
    assert noisy == stats.bootstrap_ratio([0.5, 2.0, 2.0, 1.0], [1.0, 2.0, 3.0, 1.0])
    assert noisy.low < noisy.value < noisy.high
