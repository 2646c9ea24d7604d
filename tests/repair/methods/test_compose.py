"""A composition against its stages run by hand, and what it refuses."""

from pathlib import Path
from typing import Any

import pytest
import torch

from repair.checkpoint import Checkpoint
from repair.context import RepairContext
from repair.errors import BadParameters, MissingReference
from repair.lora import LoraAdapter, LoraLayer
from repair.method import Decision, Need, RepairMethod
from repair.methods import METHODS
from repair.run import repair_adapter
from tests import tiny

SCALE: dict[str, Any] = {"method": "scale", "parameters": {"strength": 0.5}}
PATCH: dict[str, Any] = {"method": "patch", "parameters": {"strength": 0.7}}


def compose(*steps: Any) -> RepairMethod:
    return METHODS["compose"].parse({"steps": list(steps)})


@pytest.fixture
def context(tmp_path: Path) -> RepairContext:
    aligned, base = tiny.tiny_pair(tmp_path)
    patch = tiny.adapter(dict(list(tiny.SHAPES.items())[:2]), rank=2, seed=90)
    return RepairContext(aligned=Checkpoint.open(aligned), base=Checkpoint.open(base), patch=patch, tile_rows=16)


def dense(layer: LoraLayer) -> torch.Tensor:
    return torch.mul(layer.b.double() @ layer.a.double(), layer.scale)


def update(adapter: LoraAdapter, name: str) -> torch.Tensor:
    return dense(adapter.by_name[name])


def test_is_its_stages_run_by_hand(context: RepairContext) -> None:
    adapter = tiny.adapter()
    by_hand = adapter
    for step in (SCALE, PATCH):
        by_hand = repair_adapter(by_hand, METHODS[step["method"]].parse(step["parameters"]), context).adapter

    composed = repair_adapter(adapter, compose(SCALE, PATCH), context).adapter

    assert composed.names == by_hand.names
    for name in composed.names:
        assert torch.equal(update(composed, name), update(by_hand, name)), name


def test_the_dense_definition(context: RepairContext) -> None:
    """``D' = 0.5 D + 0.7 P``, from nothing but the factors that went in."""
    adapter, patch = tiny.adapter(), context.patch
    assert patch is not None

    composed = repair_adapter(adapter, compose(SCALE, PATCH), context).adapter

    for name, layer in adapter.by_name.items():
        wanted = 0.5 * dense(layer) + (0.7 * dense(patch.by_name[name]) if name in patch.by_name else 0)
        torch.testing.assert_close(update(composed, name), wanted, rtol=1e-5, atol=1e-7)


def test_order_matters_and_is_kept(context: RepairContext) -> None:
    one = repair_adapter(tiny.adapter(), compose(SCALE, PATCH), context).adapter
    other = repair_adapter(tiny.adapter(), compose(PATCH, SCALE), context).adapter
    name = next(iter(tiny.SHAPES))

    assert not torch.allclose(update(one, name), update(other, name))


def test_the_account_runs_from_the_start_to_the_end(context: RepairContext) -> None:
    adapter = tiny.adapter()

    repaired = repair_adapter(adapter, compose(SCALE, PATCH), context)

    for verdict in repaired.verdicts:
        before, after = dense(adapter.by_name[verdict.name]), update(repaired.adapter, verdict.name)
        assert verdict.energy_before == pytest.approx(float(before.square().sum()), rel=1e-5)
        assert verdict.energy_after == pytest.approx(float(after.square().sum()), rel=1e-5)
        assert verdict.shrink == pytest.approx(float(after.norm() / before.norm()), rel=1e-5)
    patched = {verdict.name for verdict in repaired.verdicts if verdict.decision is Decision.PATCHED}
    assert context.patch is not None
    assert patched == set(context.patch.names)
    assert {verdict.decision for verdict in repaired.verdicts if verdict.name not in patched} == {Decision.SCALED}
    assert all("then" in verdict.reason for verdict in repaired.verdicts)


def test_needs_what_its_stages_need() -> None:
    assert compose(SCALE, PATCH).demands == {Need.PATCH}
    assert compose({"method": "safe_lora"}, PATCH).demands == {Need.ALIGNED, Need.BASE, Need.PATCH}
    assert compose({"method": "refusal_tune"}).packs == ("calibration",)


def test_nothing_is_begun_that_cannot_be_finished(tmp_path: Path) -> None:
    """The second stage lacks the base: the first one must not have run."""
    aligned = tiny.write_checkpoint(tmp_path / "a", tiny.weights())
    told: list[str] = []
    context = RepairContext(aligned=Checkpoint.open(aligned), progress=lambda line, _share: told.append(line))

    with pytest.raises(MissingReference):
        repair_adapter(tiny.adapter(), compose(SCALE, {"method": "splora"}), context)

    assert told == []


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ({"method": "bless"}, "'bless' is no method"),
        ({"method": "compose"}, "'compose' is no method that can be a step"),
        ({"method": "scale", "parameters": {"strength": -1}}, "strength"),
        ({"method": "scale", "parameters": {"power": 1}}, "power"),
        ({"method": "scale", "settings": {}}, "settings"),
    ],
)
def test_a_wrong_step_is_named(step: object, said: str) -> None:
    with pytest.raises(BadParameters, match=said):
        compose(SCALE, step)


def test_parameters_are_written_out() -> None:
    """A report says what was run, defaults included."""
    steps = compose({"method": "safe_lora"}).model_dump(mode="json")["steps"]

    assert steps[0]["parameters"] == METHODS["safe_lora"].parse({}).model_dump(mode="json")
