"""What a verdict took: every token of the backend is in exactly one part, and what is remembered is paid once."""

from pathlib import Path
from typing import Any

import pytest

from repair.checkpoint import Checkpoint
from repair.checks.planner import Plan, Reference, plan
from repair.checks.policy import Policy
from repair.checks.robustness_settings import framings_named
from repair.checks.toy import ToyChat
from tests.checks.acting import CERTIFY, SAMPLES, UPLOAD, Character, chat_of, policy_of
from tests.tiny import tiny_pair

GRID = policy_of(strength=[0.95, 0.85, 0.82])
Pair = tuple[Checkpoint, Checkpoint]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    aligned, base = map(Checkpoint.open, tiny_pair(tmp_path_factory.mktemp("pair")))
    return aligned, base


def run(pair: Pair, chat: ToyChat, work: Path, policy: Policy = GRID, **more: Any) -> tuple[Plan, int]:
    """The plan, and what the backend counted meanwhile."""
    before = chat.tokens
    aligned, base = pair
    reference = Reference(aligned=aligned, base=base, chat=chat, digest="sha256:feed")
    found = plan(UPLOAD, reference=reference, policy=policy, work_dir=work, **more)
    return found, chat.tokens - before


class Harder(Character):
    """What passes on select obeys on the certify half: a second look is needed."""

    def says(self, prompt: str, on: Any) -> str:
        self.obeys_above = 0.86 if prompt in CERTIFY else 0.9
        return super().says(prompt, on)


@pytest.mark.parametrize("samples", [SAMPLES, ()], ids=["with samples", "without samples"])
@pytest.mark.parametrize("character", [Character(obeys_above=2), Character(), Character(obeys_above=0.1), Harder()])
def test_every_token_is_in_exactly_one_part(pair: Pair, character: Character, samples: Any, tmp_path: Path) -> None:
    """Released as it was, repaired, quarantined, or after a second look: the parts sum to what the backend counted."""
    policy = GRID.model_copy(update={"budget": GRID.budget.model_copy(update={"finalists": 2})})
    found, counted = run(pair, chat_of(character), tmp_path, policy, samples=samples)
    cost = found.cost
    assert cost.in_all == cost.spent == counted > 0
    assert cost.as_dict()["in_all"] == counted
    chose = bool(found.candidates)
    assert (cost.choosing > 0, cost.choosing_limit > 0, cost.aligned_select > 0) == (chose, chose, chose)
    assert cost.full_check == cost.aligned_certify == found.aligned_report.tokens
    assert cost.upload >= found.input_report.tokens > 0
    assert cost.aligned_robustness == cost.building == 0


def test_the_robustness_stage_is_told_apart(pair: Pair, tmp_path: Path) -> None:
    """The aligned model's part of it is the reference's, the rest the upload's."""
    plain, _ = run(pair, chat_of(Character(obeys_above=2)), tmp_path / "a", samples=SAMPLES)
    policy = GRID.put_to(framings_named("prefill"))
    found, counted = run(pair, chat_of(Character(obeys_above=2)), tmp_path / "b", policy, samples=SAMPLES)
    assert found.cost.in_all == counted
    assert found.input_report.robustness is not None
    assert found.cost.aligned_robustness == found.input_report.robustness["aligned_tokens"] > 0
    assert found.cost.upload - plain.cost.upload == found.input_report.robustness["tokens"] > 0


def test_what_is_remembered_is_paid_once_and_changes_no_report(pair: Pair, tmp_path: Path) -> None:
    """A report says what the numbers rest on; only what was spent knows who paid."""
    (first, paid), (second, later) = (
        run(pair, chat_of(Character()), tmp_path / name, samples=SAMPLES, aligned_cache=tmp_path / "cache")
        for name in ("a", "b")
    )
    assert first.as_dict() == second.as_dict()
    assert (first.cost.spent, second.cost.spent) == (paid, later)
    assert paid - later == first.cost.aligned_certify + first.cost.aligned_select
    assert "spent" not in second.as_dict()["cost"]
