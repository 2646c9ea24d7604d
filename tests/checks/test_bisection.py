"""Bisecting a row of candidates against looking at every one of them."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repair.checks.bisection import Bisection, Reading, between
from repair.checks.policy import Candidate, Family


def row(size: int) -> Bisection:
    wishes = tuple(Candidate(method="scale", parameters={"strength": 1 - at / size}) for at in range(size))
    return Bisection.of(Family(wishes=wishes))


def walk(one: Bisection, truth: Callable[[int], Reading]) -> list[int]:
    asked = []
    while (place := one.next()) is not None:
        asked.append(place)
        one.readings[place] = truth(place)
    return asked


@given(size=st.integers(1, 40), mild=st.integers(0, 40), strong=st.integers(0, 40))
def test_finds_the_mildest_good_one_in_few_looks(size: int, mild: int, strong: int) -> None:
    """Too mild below ``mild``, too strong from ``strong`` on, good in between, where there is a between."""
    one = row(size)

    def truth(place: int) -> Reading:
        if place < mild:
            return Reading.TOO_MILD
        return Reading.GOOD if place < strong else Reading.TOO_STRONG

    asked = walk(one, truth)

    good = [at for at in range(size) if truth(at) is Reading.GOOD]
    found = [at for at, reading in one.readings.items() if reading is Reading.GOOD]
    assert (min(found) if found else None) == (good[0] if good else None)
    assert len(asked) <= size.bit_length()
    assert len(set(asked)) == len(asked)
    assert all(one.closed(one.wishes[at]) for at in set(range(size)) - set(asked))


def test_what_cannot_be_built_says_nothing_about_the_others() -> None:
    one = row(5)

    asked = walk(one, lambda place: Reading.GOOD if place in {0, 1} else Reading.IMPOSSIBLE)

    assert one.readings[0] is Reading.GOOD
    assert one.next() is None
    assert asked[0] == 2


def test_one_that_is_beaten_leaves_only_milder_ones() -> None:
    one = row(3)
    one.readings[1] = Reading.DOMINATED

    assert one.next() == 0
    assert one.closed(one.wishes[0]) == ""
    assert one.closed(one.wishes[2]) == "stronger than one of its kind that is dominated"


def test_a_refinement_lies_between_the_good_one_and_the_milder_one_that_obeyed() -> None:
    one = row(4)  # strengths 1, .75, .5, .25
    walk(one, lambda place: Reading.GOOD if place >= 2 else Reading.TOO_MILD)

    assert one.refine()

    assert [wish.parameters["strength"] for wish in one.wishes] == [1.0, 0.75, 0.625, 0.5, 0.25]
    assert one.next() == 2
    one.readings[2] = Reading.TOO_MILD
    assert one.next() is None
    assert one.refine()
    assert one.wishes[3].parameters["strength"] == 0.5625


def test_nothing_is_refined_where_nothing_milder_failed() -> None:
    one = row(3)
    walk(one, lambda _place: Reading.GOOD)
    assert not one.refine()

    nothing = row(3)
    walk(nothing, lambda _place: Reading.TOO_MILD)
    assert not nothing.refine()


def steps(first: float, second: float) -> dict[str, object]:
    return {
        "steps": [
            {"method": "scale", "parameters": {"strength": first}},
            {"method": "patch", "parameters": {"strength": second}},
        ]
    }


@pytest.mark.parametrize(
    ("mild", "strong", "middle"),
    [
        ({"strength": 0.8, "seed": 1}, {"strength": 0.4, "seed": 1}, {"strength": 0.6, "seed": 1}),
        (steps(0.9, 1.0), steps(0.7, 1.0), steps(0.8, 1.0)),
        (steps(0.9, 1.0), steps(0.7, 0.5), None),  # two numbers differ
        ({"count": 2}, {"count": 4}, None),  # a count has no middle that is one for sure
        ({"mode": "paper"}, {"mode": "truncated"}, None),
        ({"strength": 0.5}, {"strength": 0.5}, None),
        ({"strength": 0.5}, {"share": 0.5}, None),
    ],
)
def test_between(mild: dict[str, object], strong: dict[str, object], middle: dict[str, object] | None) -> None:
    assert between(mild, strong) == middle
