"""The efficacy harness: what it chooses, what it compares with, and that the page says what the numbers say."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from bench.efficacy import table
from bench.efficacy.choose import at_utility, best, safest
from bench.efficacy.lab import Store, task_samples
from bench.efficacy.menu import ALIKE, FULL, UNSEEN, controls, groups
from repair.checks.policy import load_policy
from repair.method import Cost
from repair.methods import METHODS

if TYPE_CHECKING:
    from pathlib import Path


def row(outcome: str, harmful: float, utility: float | None) -> dict[str, Any]:
    return {"outcome": outcome, "harmful": {"rate": harmful}, "utility": {"rate": utility}}


def test_of_those_that_meet_the_screen_the_most_useful_one_is_best() -> None:
    rows = [row("pass", 0.02, 0.8), row("fail", 0.0, 1.0), row("pass", 0.09, 0.9), {"error": "no such module"}]
    assert best(rows) == 2


def test_where_none_meets_it_the_safest_one_is_and_of_equals_the_most_useful() -> None:
    assert best([row("fail", 0.5, 0.9), row("fail", 0.3, 0.1), row("fail", 0.3, 0.4)]) == 2


def test_the_safest_is_told_beside_it_where_it_keeps_enough() -> None:
    rows = [row("pass", 0.1, 1.0), row("pass", 0.05, 0.92), row("pass", 0.0, 0.85), row("fail", 0.0, 0.95)]
    assert safest(rows) == 1
    assert safest(rows[2:]) is None


def test_nothing_that_could_be_built_is_nothing_to_choose() -> None:
    assert best([{"error": "no such module"}]) is None


def test_a_control_is_read_between_two_measured_points() -> None:
    curve = [(1.0, 0.9), (0.0, 0.1), (0.5, 0.3)]
    assert at_utility(curve, 0.75) == pytest.approx(0.6)
    assert at_utility(curve, 0.5) == pytest.approx(0.3)


def test_where_a_curve_turns_back_the_control_gets_the_better_branch() -> None:
    assert at_utility([(0.0, 0.0), (0.6, 0.8), (0.6, 0.4), (1.0, 1.0)], 0.6) == pytest.approx(0.4)


def test_outside_of_what_was_measured_nothing_is_said() -> None:
    assert at_utility([(0.2, 0.5), (0.8, 0.5)], 0.9) is None
    assert at_utility([], 0.5) is None


@pytest.mark.parametrize("name", [*FULL, *ALIKE, *UNSEEN])
def test_every_recipe_can_be_parsed(name: str) -> None:
    recipes = [recipe for one in groups(name, 90) for recipe in one.recipes] + controls(name, 90)
    for method, parameters in [step for recipe in recipes for step in recipe.steps]:
        METHODS[method].parse(parameters)


@pytest.mark.parametrize("name", FULL)
def test_every_method_of_the_registry_is_tried_at_two_settings_or_more(name: str) -> None:
    sizes = {one.name: len(one.recipes) for one in groups(name, 90)}
    composed = {"compose"}  # the menu composes by itself
    assert set(METHODS) - composed - set(table.CONTROLS) <= set(sizes)
    singles = {
        name: size for name, size in sizes.items() if name in METHODS and METHODS[name].cost is not Cost.TRAINING
    }
    assert min(singles.values()) >= 2
    assert {recipe.steps[0][0] for recipe in controls(name, 90)} == set(table.CONTROLS)


def test_what_was_measured_is_found_again_and_a_cut_off_line_is_not(tmp_path: Path) -> None:
    Store(tmp_path).add({"key": "a", "harmful": 1})
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"key": "b", "harm')
    assert Store(tmp_path).rows == {"a": {"key": "a", "harmful": 1}}


def test_the_halves_of_the_task_share_no_sample() -> None:
    policy = load_policy("demo")
    select, certify = (task_samples(policy, half) for half in ("select", "certify"))
    assert select
    assert certify
    assert not set(select) & set(certify)


def test_the_page_says_what_the_numbers_say() -> None:
    page = table.PAGE.read_text()
    assert table.filled(page, json.loads(table.RESULTS.read_text())) == page


def auto(verdict: str) -> dict[str, Any]:
    return {"group": "auto", "verdict": verdict, **row("pass", 0.04, 0.98)}


def single(method: str, outcome: str, harmful: float, utility: float) -> dict[str, Any]:
    return {"group": method, "label": f"{method} x=1", **row(outcome, harmful, utility)}


def test_auto_stands_beside_the_safest_single_method_that_keeps_as_much_within_the_bounds() -> None:
    others = [
        single("mild", "pass", 0.05, 1.0),
        single("safest", "pass", 0.02, 0.975),
        single("strong", "pass", 0.01, 0.9),
        single("refuser", "fail", 0.0, 1.0),
        single("one+other", "pass", 0.0, 1.0),
    ]
    said = table.beside_singles([auto("released_repaired"), *others])
    assert said.endswith("`safest` (safest x=1) leaves least: 2 % with 98 %.")
    assert table.beside_singles([auto("released_repaired"), *others[2:]]).endswith("as much within the bounds.")
    for other in ("released_unchanged", "quarantined"):
        assert not table.beside_singles([auto(other), *others])
    assert not table.beside_singles(others)


def test_a_page_without_marks_is_refused() -> None:
    with pytest.raises(ValueError, match="efficacy: generated"):
        table.filled("nothing here", {"rows": []})
