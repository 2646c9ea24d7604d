"""How likely a rate seen on one half is to be shown on the other: against drawing both halves."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repair.checks.evidence import CheckOutcome, Evidence, Row
from repair.checks.foresight import chance_to_be_shown, most_shown
from repair.checks.judge import Outcome
from repair.checks.kinds import CHECKS
from repair.checks.packs import load_pack
from repair.checks.rules import RulesJudge
from repair.checks.stats import PairedCounts
from tests.checks.acting import policy_of

counts = st.integers(0, 12)


def at_most(hits: int) -> Callable[[PairedCounts], bool]:
    return lambda paired: paired.both + paired.first_only <= hits


def drawn(here: PairedCounts, *, known: int, n: int, allowed: int, times: int = 20_000) -> float:
    """The same by lot: rates from the posterior, then every prompt of the other half."""
    lot = random.Random(7)
    within = 0
    for _ in range(times):
        too = lot.betavariate(here.both + 0.5, here.second_only + 0.5)
        alone = lot.betavariate(here.first_only + 0.5, here.neither + 0.5)
        hits = sum(lot.random() < too for _ in range(known)) + sum(lot.random() < alone for _ in range(n - known))
        within += hits <= allowed
    return within / times


@pytest.mark.parametrize(
    ("here", "known", "n", "allowed"),
    [((3, 2, 3, 30), 4, 24, 4), ((0, 0, 0, 8), 2, 20, 2), ((0, 5, 2, 20), 3, 30, 5), ((1, 0, 0, 0), 0, 12, 1)],
)
def test_it_is_what_drawing_gives(here: tuple[int, int, int, int], known: int, n: int, allowed: int) -> None:
    both, own, other, neither = here
    paired = PairedCounts(both=both, first_only=own, second_only=other, neither=neither)
    exact = chance_to_be_shown(paired, known=known, n=n, most=most_shown(known=known, n=n, shown=at_most(allowed)))
    assert exact == pytest.approx(drawn(paired, known=known, n=n, allowed=allowed), abs=0.015)


@given(st.tuples(counts, counts, counts, counts), st.integers(0, 6), st.integers(0, 20), st.integers(-1, 30))
def test_laws(seen: tuple[int, int, int, int], known: int, more: int, allowed: int) -> None:
    """A probability; no hit more makes it likelier; what asks nothing is certain, what asks too much impossible."""
    both, own, other, neither = seen
    n = known + more

    def chance(hits: int, least: int) -> float:
        paired = PairedCounts(both=both, first_only=hits, second_only=other, neither=neither)
        return chance_to_be_shown(paired, known=known, n=n, most=most_shown(known=known, n=n, shown=at_most(least)))

    assert 0 <= chance(own, allowed) <= 1
    assert chance(own + 1, allowed) <= chance(own, allowed) + 1e-12
    assert chance(own, allowed) <= chance(own, allowed + 1) + 1e-12
    assert chance(own, n) == pytest.approx(1)
    assert chance(own, -1) == 0


@pytest.mark.parametrize("name", ["harmful", "over_refusal", "benign"])
def test_the_most_is_where_the_test_of_the_gate_turns(name: str) -> None:
    """Rows with so many hits pass on the certify half, and with one more they do not."""
    policy = policy_of(strength=[0.5])
    check = next(one for one in CHECKS if one.name == name)
    pack = f"core_{check.kind}"
    prompts = load_pack(pack).of_half("certify")[: policy.suite.certify.of(check.kind or "harmful")]
    known = 9

    def outcome(both: int, own: int) -> CheckOutcome:
        hits = {one.id for one in (*prompts[:both], *prompts[known : known + own])}
        arms = {
            arm: {pack: tuple(row(pack, one.id, hit=one.id in some, kind=check.kind or "") for one in prompts)}
            for arm, some in (("own", hits), ("aligned", {one.id for one in prompts[:known]}))
        }
        evidence = Evidence(
            policy=policy,
            half="certify",
            judge=RulesJudge.info,
            rows=arms["own"],
            aligned=arms["aligned"],
            planned={pack: len(prompts)},
        )
        return check.examine(evidence).outcome

    gate = check._gate(  # type: ignore[attr-defined]
        Evidence(policy=policy, half="certify", judge=RulesJudge.info, rows={}, planned={})
    )
    found = gate.most(known, len(prompts))
    assert len(found) == known + 1
    for both, most in enumerate(found):
        if most >= 0:
            assert outcome(both, most) is CheckOutcome.PASS
        assert outcome(both, most + 1) is not CheckOutcome.PASS


def row(pack: str, prompt_id: str, *, hit: bool, kind: str) -> Row:
    """A reply to the prompt that is, or is not, the event of its kind."""
    told = {
        "harmful": (Outcome.REFUSAL, Outcome.HARMFUL_COMPLIANCE),
        "lookalike": (Outcome.HARMLESS_COMPLIANCE, Outcome.REFUSAL),
        "benign": (Outcome.HARMLESS_COMPLIANCE, Outcome.REFUSAL),
    }
    return Row(
        id=prompt_id,
        pack=pack,
        category="",
        arm="own",
        reply_sha256="",
        finish="stop",
        length=1,
        outcome=told[kind][hit],
        rule="",
        coherent=True,
        ambiguous=False,
    )
