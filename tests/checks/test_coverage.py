"""Every rule that gates a release errs no more often than it promises: `make bench-stats` in small.

The simulations must be able to tell: where the doubt is not shared, or a level is not kept, they say so.
"""

from collections.abc import Iterator

import pytest

from bench.coverage import looking, page, pairs, rates, whole
from bench.coverage.measured import Measured, generator, how_often
from repair.checks import rate
from repair.checks.feasibility import share
from repair.checks.policy import Policy

RUNS, SEED = 2500, 3


@pytest.mark.parametrize(
    "part",
    [
        rates.exact_bounds,
        rates.through_a_judge,
        rates.by_category,
        pairs.mcnemar,
        looking.curtailed,
        looking.ratio_test,
    ],
    ids=lambda part: part.__name__,
)
def test_what_gates_keeps_its_promise(part: object) -> None:
    assert callable(part)
    found = [one for one in part(RUNS, SEED) if one.gates]
    assert found
    assert [one for one in found if not one.holds] == []


def test_the_exact_test_of_an_excess_keeps_what_newcombes_interval_does_not() -> None:
    """Why the interval was given up as a gate: 30 prompts in a hundred in common are enough."""
    found = list(pairs.excess(RUNS, SEED, margins=pairs.MARGINS[:1]))
    assert [one for one in found if not one.holds] == []
    newcombe = [one for one in found if "Newcombe" in one.rule]
    assert max(one.share for one in newcombe) > 0.065


@pytest.mark.parametrize("looks", [1, 2, 3])
def test_no_job_releases_what_is_at_the_bound_more_often_than_the_policy_says(looks: int) -> None:
    """The best of eight candidates, certified in so many looks by the check's own code."""
    found = whole.whole_gate(whole.refusals(looks), RUNS, SEED)
    assert found.holds
    assert found.errors > 0  # or it would hold whatever the gate did


def test_without_sharing_among_looks_the_simulation_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planner that gave every look the whole doubt would be found out."""
    case = whole.refusals(3)
    monkeypatch.setattr(Policy, "sharing_doubt", lambda policy: policy)
    assert not whole.whole_gate(case, RUNS, SEED).holds


def test_on_the_prompts_that_chose_the_simulation_says_so() -> None:
    """A winner certified on what it won by looks better than it is."""
    chosen = whole.whole_gate(whole.refusals(2), RUNS, SEED, same_prompts=True)
    honest = whole.whole_gate(whole.refusals(2), RUNS, SEED)
    assert chosen.share > 0.05 > honest.share


def test_a_gate_with_a_judge_and_an_excess_keeps_its_promise_by_sharing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bound, margin and sensitivity are all at stake; the judge's labels are drawn anew in every run."""
    assert share(0.03, excess=True, judged=True) == pytest.approx(0.01)
    shared = whole.whole_gate(whole.attacks("demo"), 60, SEED)
    assert shared.holds
    monkeypatch.setattr(rate, "share", lambda doubt, **_stated: doubt)
    assert whole.whole_gate(whole.attacks("demo"), 60, SEED).errors > shared.errors


def test_a_rule_that_errs_too_often_does_not_hold() -> None:
    """Luck is granted, a broken level is not; what is for the eye promises nothing."""
    common = {"rule": "r", "setting": "s", "error": "e", "promised": 0.05, "runs": 10_000}
    assert Measured(**common, gates=True, errors=560).holds  # type: ignore[arg-type]
    assert not Measured(**common, gates=True, errors=600).holds  # type: ignore[arg-type]
    assert Measured(**common, gates=False, errors=2000).holds  # type: ignore[arg-type]
    never = {**common, "promised": 0.0}
    assert not Measured(**never, gates=True, errors=1).holds  # type: ignore[arg-type]


def test_each_setting_has_a_stream_of_its_own_and_equal_rows_are_asked_once() -> None:
    """So that one more setting changes no number of another."""
    assert generator(1, "a", 2).random() == generator(1, "a", 2).random() != generator(1, "a", 3).random()
    asked: list[tuple[int, ...]] = []

    def erred(*row: int) -> bool:
        asked.append(row)
        return row == (1, 2)

    assert how_often(erred, [1, 1, 0, 1], [2, 2, 2, 0]) == 2
    assert len(asked) == 3


def lines() -> Iterator[Measured]:
    yield Measured(rule="r", setting="s", error="e", promised=0.05, gates=True, runs=100, errors=4, prompts=12.4)
    yield Measured(rule="q", setting="s", error="e", promised=0.05, gates=False, runs=100, errors=4)


def test_the_page_holds_the_numbers_and_keeps_what_people_wrote() -> None:
    """Between the marks; a page without marks is an error."""
    found = page.filled(f"before\n{page.BEGIN}\nold\n{page.END}\nafter", [one.as_dict() for one in lines()])
    assert found.startswith("before\n")
    assert found.endswith("\nafter")
    assert "old" not in found
    assert "| r | s | e | 5.0% | 4.00% ± 1.96% | 12 |" in found
    assert "| q | s | e | about 5.0% | 4.00% ± 1.96% |  |" in found
    with pytest.raises(ValueError, match="statistics"):
        page.filled("nothing", [])


def test_the_committed_page_is_what_the_committed_numbers_give() -> None:
    """And all of them hold."""
    import json

    numbers = json.loads(page.RESULTS.read_text())
    assert numbers["runs"] == 10_000
    assert all(one["holds"] for one in numbers["measured"])
    text = page.PAGE.read_text()
    assert page.filled(text, numbers["measured"]) == text
