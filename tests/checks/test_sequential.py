"""Stopping rules, by exact recursion over the running count: no simulation, no tolerance for luck."""

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

from repair.checks.stats import AnytimeTest, Sprt, Stop

Decide = Callable[[int, int], Stop]


def walked(decide: Decide, rate: float, cap: int) -> tuple[dict[Stop, float], float]:
    """The chance of each end within ``cap`` prompts and the expected number asked, prompt by prompt."""
    alive, ends, asked = {0: 1.0}, dict.fromkeys(Stop, 0.0), 0.0
    for seen in range(1, cap + 1):
        stepped: dict[int, float] = {}
        for hits, chance in alive.items():
            stepped[hits] = stepped.get(hits, 0.0) + chance * (1 - rate)
            stepped[hits + 1] = stepped.get(hits + 1, 0.0) + chance * rate
        asked += sum(alive.values())
        alive = {}
        for hits, chance in stepped.items():
            if (end := decide(hits, seen)) is Stop.GO_ON:
                alive[hits] = chance
            else:
                ends[end] += chance
    ends[Stop.GO_ON] = sum(alive.values())
    return ends, asked


@pytest.mark.parametrize(("rate", "expected"), [(0.0, 47), (0.01, 61), (0.2, 16), (0.4, 7), (0.7, 4)])
def test_the_ratio_test_takes_the_known_number_of_prompts(rate: float, expected: float) -> None:
    """Two percent against eight, both errors five percent; with a cap of 200 that is seldom reached here."""
    _, asked = walked(Sprt().decide, rate, 200)
    assert asked == pytest.approx(expected, abs=1.5)


def test_the_ratio_test_errs_no_more_than_it_says_and_gives_up_at_the_cap() -> None:
    """At both of its rates; nothing goes on beyond the cap."""
    rule = Sprt()
    safe, _ = walked(rule.decide, rule.safe, rule.cap)
    unsafe, _ = walked(rule.decide, rule.unsafe, rule.cap)
    assert 0 < safe[Stop.FAIL] <= rule.alpha
    assert 0 < unsafe[Stop.PASS] <= rule.beta
    assert safe[Stop.GO_ON] == unsafe[Stop.GO_ON] == 0
    between, _ = walked(rule.decide, 0.045, rule.cap)
    assert between[Stop.GIVE_UP] > 0.05


def test_a_ratio_test_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="below"):
        Sprt(safe=0.08, unsafe=0.02)


@pytest.mark.parametrize("below", [True, False])
@given(seen=st.integers(0, 80), hits=st.integers(0, 80))
def test_the_evidence_is_the_mixture_of_likelihood_ratios(below: bool, seen: int, hits: int) -> None:
    """Integrated numerically over the prior, cut to the side of the bound."""
    hits = min(hits, seen)
    rule = AnytimeTest(bound=0.1, prior=(1.0, 2.0))
    side = (0.0, rule.bound) if below else (rule.bound, 1.0)

    def prior(rate: float) -> float:
        return 1 - rate

    def ratio(rate: float) -> float:
        return float((rate / rule.bound) ** hits * ((1 - rate) / (1 - rule.bound)) ** (seen - hits))

    mixed = integrate.quad(lambda rate: prior(rate) * ratio(rate), *side, limit=200)[0]
    wanted = mixed / integrate.quad(prior, *side)[0]
    assert math.exp(rule.log_evidence(hits, seen, below=below)) == pytest.approx(wanted, rel=1e-5, abs=1e-9)


@given(seen=st.integers(0, 400), hits=st.integers(0, 400), above=st.floats(0, 1))
def test_no_bet_is_expected_to_grow_against_the_truth(seen: int, hits: int, above: float) -> None:
    """What makes looking free: at the bound the next value is the present one on average, beyond it less."""
    rule, hits = AnytimeTest(), min(hits, seen // 2)  # beyond, one of the bets is too small to write
    for below, rates in ((True, (rule.bound, rule.bound + above * (1 - rule.bound))), (False, (rule.bound, 0.01))):
        now = rule.log_evidence(hits, seen, below=below)
        steps = [math.exp(rule.log_evidence(hits + hit, seen + 1, below=below) - now) for hit in (0, 1)]
        at_bound, beyond = (steps[0] * (1 - rate) + steps[1] * rate for rate in rates)
        assert at_bound == pytest.approx(1, rel=1e-6)
        assert beyond <= 1 + 1e-6


@pytest.mark.parametrize("rate", [0.05, 0.08])
def test_it_may_be_looked_at_after_every_prompt(rate: float) -> None:
    """Of a rate at the bound or above it never says "below" more often than alpha, in four hundred looks."""
    ends, _ = walked(AnytimeTest().decide, rate, 400)
    assert ends[Stop.PASS] <= 0.05


def test_looking_after_every_prompt_at_a_fixed_bound_would_err_more_often() -> None:
    """Why it takes a rule of its own: the same looks at the bound of a fixed plan."""
    from repair.checks.stats import clopper_pearson_upper

    def peeking(hits: int, seen: int) -> Stop:
        return Stop.PASS if clopper_pearson_upper(hits, seen) <= 0.05 else Stop.GO_ON

    ends, _ = walked(peeking, 0.05, 150)
    assert ends[Stop.PASS] > 0.08


def test_it_decides_both_ways_and_sooner_where_it_is_clearer() -> None:
    """Expected prompts fall with the distance from the bound."""
    rule = AnytimeTest()
    asked = {rate: walked(rule.decide, rate, 400)[1] for rate in (0.0, 0.01, 0.2, 0.4)}
    assert asked[0.0] < asked[0.01] < 180
    assert asked[0.4] < asked[0.2] < 40
    assert walked(rule.decide, 0.4, 100)[0][Stop.FAIL] > 0.99
    assert np.isclose(sum(walked(rule.decide, 0.02, 50)[0].values()), 1)
