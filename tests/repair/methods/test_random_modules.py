"""`random_modules`: exactly so many, by a lot that anybody can draw again, and nothing else happens."""

import hashlib
import itertools
from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repair.context import RepairContext
from repair.errors import BadParameters
from repair.lora import LoraAdapter
from repair.method import Decision
from repair.methods.random_modules import DEFAULT_COUNT, RandomModules
from repair.run import Repaired, repair_adapter
from tests import tiny
from tests.repair import dense

MANY = {f"model.layers.{block}.mlp.up_proj": (5, 4) for block in range(16)}


def run(adapter: LoraAdapter | None = None, **parameters: object) -> Repaired:
    return repair_adapter(adapter or tiny.adapter(), RandomModules.parse(parameters), RepairContext())


def gone(repaired: Repaired) -> frozenset[str]:
    return frozenset(verdict.name for verdict in repaired.verdicts if verdict.decision is Decision.DROPPED)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("count", range(len(tiny.SHAPES) + 1))
def test_draws_exactly_that_many_and_the_same_again(count: int, seed: int) -> None:
    """The same lot for the same seed, whatever the order of modules in the file."""
    adapter = tiny.adapter()
    turned = replace(adapter, layers=tuple(reversed(adapter.layers)))

    drawn = gone(run(adapter, count=count, seed=seed))

    assert len(drawn) == count
    assert drawn == gone(run(adapter, count=count, seed=seed)) == gone(run(turned, count=count, seed=seed))


def test_the_lot_can_be_drawn_by_hand() -> None:
    """As the page of the method has it: modules by the SHA-256 of seed and path, the first of them."""
    for seed in range(20):
        ranked = sorted(tiny.SHAPES, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).hexdigest())
        for count in (1, 3, 5):
            assert gone(run(count=count, seed=seed)) == frozenset(ranked[:count])


def test_a_larger_count_takes_the_same_modules_and_more() -> None:
    """So a curve over counts is one lot, read further and further."""
    for seed in range(5):
        drawn = [gone(run(count=count, seed=seed)) for count in range(len(tiny.SHAPES) + 1)]
        assert all(few < more for few, more in itertools.pairwise(drawn))


def test_the_seed_decides_and_favours_no_module() -> None:
    """4 of 16 over 400 seeds: each module is gone about 100 times (standard deviation 8.7, so 5 of them)."""
    adapter = tiny.adapter(MANY, rank=1)
    lots = [gone(run(adapter, count=4, seed=seed)) for seed in range(400)]

    counted = Counter(name for lot in lots for name in lot)

    assert len(set(lots)) > 300
    assert counted.keys() == MANY.keys()
    assert all(abs(times - 100) < 44 for times in counted.values())


@settings(deadline=None)
@given(count=st.integers(0, len(tiny.SHAPES)), seed=st.integers(0, 2**32 - 1))
def test_nothing_but_the_drawn_modules_changes(count: int, seed: int) -> None:
    """What stays is the very object that came in; what goes adds exactly nothing, with its A and scale as they were."""
    adapter = tiny.adapter()

    repaired = run(adapter, count=count, seed=seed)

    assert repaired.changed is (count > 0)
    assert repaired.adapter.names == adapter.names
    for before, after in zip(adapter.layers, repaired.adapter.layers, strict=True):
        if before.name in gone(repaired):
            assert not after.b.any()
            assert torch.equal(after.a, before.a)
            assert (after.scale, after.dtype, after.shape) == (before.scale, before.dtype, before.shape)
        else:
            assert after is before


def test_a_bias_goes_with_its_module() -> None:
    """A module that shifts its output is reverted whole."""
    up = "model.layers.0.mlp.up_proj"
    layer = tiny.layer(up, bias=torch.ones(97))

    (after,) = run(LoraAdapter(layers=(layer,)), count=1).adapter.layers

    assert after.bias is not None
    assert not after.bias.any()


def test_energies_are_those_of_the_dense_updates() -> None:
    """Before and after, for what stays and what goes: what is kept of the whole is the sum over what stays."""
    adapter = tiny.adapter()
    energies = {layer.name: float(dense.delta(layer).square().sum()) for layer in adapter.layers}

    repaired = run(adapter, count=3, seed=2)

    for verdict in repaired.verdicts:
        lost = verdict.name in gone(repaired)
        whole = energies[verdict.name]
        assert verdict.energy_before == pytest.approx(whole, rel=1e-6)
        assert verdict.energy_after == pytest.approx(0.0 if lost else whole, rel=1e-6, abs=0)
        assert verdict.shrink == (0.0 if lost else 1.0)
        assert (verdict.score, verdict.null) == (None, None)
        assert lost or verdict.reason.startswith("not drawn")
    kept = sum(energy for name, energy in energies.items() if name not in gone(repaired))
    assert sum(verdict.energy_after for verdict in repaired.verdicts) == pytest.approx(kept, rel=1e-6)


def test_every_module_goes_where_as_many_are_drawn() -> None:
    """Then the adapter is the aligned model, exactly."""
    repaired = run(count=len(tiny.SHAPES))

    assert not any(layer.b.any() for layer in repaired.adapter.layers)


def test_ten_are_drawn_by_default_or_all_where_there_are_fewer() -> None:
    """A default suits every adapter; a number that was asked for is meant."""
    assert gone(run(tiny.adapter(MANY), seed=7)) == gone(run(tiny.adapter(MANY), seed=7, count=DEFAULT_COUNT))
    assert gone(run()) == tiny.SHAPES.keys()
    with pytest.raises(BadParameters, match=r"random_modules\.count: 10 modules were asked for, the adapter has 8"):
        run(count=10)


@pytest.mark.parametrize("parameters", [{"count": -1}, {"count": 2.5}, {"count": True}, {"seed": -1}, {"seed": 2**32}])
def test_refuses_impossible_parameters(parameters: dict[str, object]) -> None:
    """By name."""
    (name,) = parameters
    with pytest.raises(BadParameters) as caught:
        RandomModules.parse(parameters)
    assert caught.value.field == f"random_modules.{name}"
