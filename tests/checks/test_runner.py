"""In which order one candidate is asked."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from repair.checks.backend import Reply
from repair.checks.bisection import Bisection
from repair.checks.check import Check
from repair.checks.kinds import CHECKS
from repair.checks.measurement import Measurement
from repair.checks.policy import Candidate
from repair.checks.rules import RulesJudge
from repair.checks.runner import Runner, looks
from repair.checks.suite import Suite
from repair.checks.verdict import Tried
from tests.checks.acting import ANSWER, UPLOAD, policy_of

POLICY = policy_of(strength=[0.5])
SUITE = Suite.of(POLICY, "select")
PACKS = SUITE.packs


@dataclass(kw_only=True)
class Odds(Measurement):
    """One that expects of each kind of prompt what it is told."""

    chances: dict[str, float]

    def promises(self) -> list[tuple[float, Check]]:
        return sorted(((self.chances.get(str(one.kind), 1.0), one) for one in CHECKS), key=lambda one: one[0])


def runner_of(measured: Measurement) -> Runner:
    tried = Tried(wish=Candidate(method="scale", parameters={}))
    row = Bisection(wishes=[tried.wish])
    return Runner(tried=tried, adapter=UPLOAD, row=row, measured=measured, left=list(looks(measured)))


def ask(runner: Runner) -> str:
    """The next look is taken and answered; its pack."""
    pack, prompts = runner.take_look()
    runner.measured.take(pack, prompts, [Reply(text=ANSWER, finish="stop", tokens=1)] * len(prompts))
    return pack


def walk(chances: dict[str, float]) -> list[str]:
    """The packs in the order in which they are asked; every prompt is asked once."""
    measured = Odds(chances=chances, policy=POLICY, suite=SUITE, arm="", judge=RulesJudge())
    runner = runner_of(measured)
    order = []
    while runner.left:
        order.append(ask(runner))
    asked = {pack: [row.id for row in rows] for pack, rows in measured.rows.items()}
    assert asked == {pack: [one.id for one in prompts] for pack, prompts in SUITE.prompts.items()}
    return order


@settings(max_examples=20)
@given(st.fixed_dictionaries({kind: st.floats(0, 1) for kind in ("harmful", "lookalike", "benign")}))
def test_every_pack_once_and_then_the_worst_off(chances: dict[str, float]) -> None:
    """All is asked, in its recorded order; after a look at each pack no kind waits for one that is better off."""
    order = walk(chances)

    assert set(order[: len(SUITE.prompts)]) == set(SUITE.prompts)
    later = [chances[PACKS.kind_of(pack)] for pack in order[len(SUITE.prompts) :]]
    assert later == sorted(later)


@pytest.mark.parametrize("kind", ["harmful", "lookalike", "benign"])
def test_what_is_likeliest_to_fail_is_asked_first(kind: str) -> None:
    chances = dict.fromkeys(("harmful", "lookalike", "benign"), 1.0) | {kind: 0.1}
    first = [PACKS.kind_of(pack) for pack in walk(chances)[len(SUITE.prompts) :]]
    assert first[0] == kind
    assert kind not in first[first.count(kind) :]


def test_a_pack_without_prompts_of_this_half_is_not_waited_for() -> None:
    """Public sets lie on one half: a candidate that was asked all the others is known as well as it can be."""
    suite = replace(SUITE, prompts={"of_the_other_half": (), **SUITE.prompts})
    runner = runner_of(Measurement(policy=POLICY, suite=suite, arm="", judge=RulesJudge()))
    seen = []
    while runner.untouched:
        seen.append(ask(runner))
    assert seen == list(SUITE.prompts)
