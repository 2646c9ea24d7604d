"""Laws for every method in the folder. A new method is held to them by lying there; nothing is edited here."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from repair.checkpoint import Checkpoint
from repair.checks.chat import ChatModel
from repair.context import RepairContext
from repair.linalg import delta_energy
from repair.lora import LoraAdapter
from repair.method import Need, RepairMethod
from repair.methods import METHODS
from repair.run import Repaired, repair_adapter
from tests import tiny
from tests.repair import dense, refactored

every = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
WORDS = "how do I a the to make help me write with your you for is of i'm can't sorry, but that".split()  # noqa: SIM905


@dataclass(frozen=True, kw_only=True)
class World:
    """What a method is tried in: an adapter for a model, and all that there is to know about that model."""

    shapes: tiny.Shapes
    context: RepairContext

    def adapter(self) -> LoraAdapter:
        return tiny.adapter(self.shapes)


def still(folder: Path, shapes: tiny.Shapes = tiny.SHAPES, *, shards: int = 1) -> World:
    """A model that has weights and does not run."""
    aligned, base = tiny.tiny_pair(folder, shapes=shapes, shards=shards)
    return world_of(aligned, base, shapes)


def living(folder: Path, sizes: tuple[int, int] = (32, 56), *, shards: int = 1) -> World:
    """A model that chats, for methods that train on one or listen to it."""
    aligned = tiny.tiny_llama(folder / "aligned", words=WORDS, sizes=sizes, shards=shards)
    base = tiny.tiny_llama(folder / "base", words=WORDS, sizes=sizes, shards=shards, seed=1)
    hidden, inner = sizes
    linears = {"self_attn.q_proj": (hidden, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    shapes = {f"model.layers.{block}.{name}": shape for block in (1, 0) for name, shape in linears.items()}
    # The last module is one that no method adds anything to: a law leaves it without an update.
    world = world_of(aligned, base, dict(list(shapes.items())[:-2]))
    return replace(world, context=replace(world.context, chat=ChatModel.load(aligned, "cpu")))


def world_of(aligned: Path, base: Path, shapes: tiny.Shapes) -> World:
    return World(
        shapes=shapes,
        context=RepairContext(
            aligned=Checkpoint.open(aligned),
            base=Checkpoint.open(base),
            patch=tiny.adapter(dict(list(shapes.items())[:3]), rank=2, seed=90),
            calibration=tiny.calibration(aligned.parent / "calibration", shapes),
            tile_rows=16,
        ),
    )


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[type[RepairMethod]], World]:
    """The world that a method needs; each is made once."""

    @cache
    def made(make: Callable[[Path], World]) -> World:
        return make(tmp_path_factory.mktemp("world"))

    return lambda method: made(maker_of(method))


def maker_of(method: type[RepairMethod]) -> Callable[..., World]:
    return living if Need.CHAT in method.needs else still


@pytest.fixture
def world(worlds: Callable[[type[RepairMethod]], World], method: type[RepairMethod]) -> World:
    return worlds(method)


def tensors(adapter: LoraAdapter) -> dict[str, torch.Tensor]:
    return {f"{layer.name}.{part}": getattr(layer, part) for layer in adapter.layers for part in ("a", "b")}


def settings_of(method: type[RepairMethod]) -> Iterator[Mapping[str, Any]]:
    laws = method.laws
    yield from (
        one for one in (laws.trial, laws.noop, laws.revert, laws.idempotent, laws.never_grows) if one is not None
    )


def same(one: Repaired, two: Repaired) -> None:
    for key, tensor in tensors(one.adapter).items():
        assert torch.equal(tensor, tensors(two.adapter)[key]), key
    assert one.verdicts == two.verdicts


@every
def test_leaves_its_argument_untouched(method: type[RepairMethod], world: World) -> None:
    """A repair returns a new adapter; the uploaded one stays as evidence."""
    adapter = world.adapter()
    before = {key: tensor.clone() for key, tensor in tensors(adapter).items()}

    for parameters in settings_of(method):
        repair_adapter(adapter, method.parse(parameters), world.context)

    assert all(torch.equal(tensor, before[key]) for key, tensor in tensors(adapter).items())


@every
def test_noop_parameters_return_the_same_bits(method: type[RepairMethod], world: World) -> None:
    """Then the uploaded bytes can be released as they are."""
    adapter = world.adapter()

    repaired = repair_adapter(adapter, method.parse(method.laws.noop), world.context)

    assert not repaired.changed
    assert all(torch.equal(tensor, tensors(adapter)[key]) for key, tensor in tensors(repaired.adapter).items())
    assert [layer.scale for layer in repaired.adapter.layers] == [layer.scale for layer in adapter.layers]


@every
def test_full_revert_leaves_exactly_nothing(method: type[RepairMethod], world: World) -> None:
    """``D' = 0``, not nearly."""
    if method.laws.revert is None:
        pytest.skip("the method has no such setting")

    repaired = repair_adapter(world.adapter(), method.parse(method.laws.revert), world.context)

    assert not any(layer.b.any() for layer in repaired.adapter.layers)
    assert all(verdict.energy_after == 0 and verdict.shrink == 0 for verdict in repaired.verdicts)


@every
def test_does_not_depend_on_the_order_of_modules(method: type[RepairMethod], world: World) -> None:
    """Names are the only key."""
    adapter = world.adapter()
    shuffled = replace(adapter, layers=tuple(reversed(adapter.layers)))

    for parameters in settings_of(method):
        one = repair_adapter(adapter, method.parse(parameters), world.context)
        same(one, repair_adapter(shuffled, method.parse(parameters), world.context))


@every
def test_the_same_update_in_other_factors_is_repaired_alike(method: type[RepairMethod], world: World) -> None:
    """``(B R, R^-1 A)`` is the same upload: the same modules are edited, into the same updates.

    Methods that act on entries of the factors do so on canonical ones.
    """
    one = world.adapter()
    two = refactored.adapter(one)
    assert not any(torch.allclose(x.b, y.b.float()) for x, y in zip(one.layers, two.layers, strict=True))

    for parameters in settings_of(method):
        left, right = (repair_adapter(each, method.parse(parameters), world.context) for each in (one, two))
        assert [verdict.decision for verdict in left.verdicts] == [verdict.decision for verdict in right.verdicts]
        for verdict, other in zip(left.verdicts, right.verdicts, strict=True):
            assert (verdict.score is None) == (other.score is None)
            assert verdict.score is None or verdict.score == pytest.approx(other.score, rel=1e-3, abs=1e-5)
        for layer in left.adapter.layers:
            wanted, found = dense.delta(layer), dense.delta(right.adapter.by_name[layer.name])
            uploaded = dense.delta(one.by_name[layer.name]).norm() if layer.name in one.by_name else 0.0
            assert (wanted - found).norm() <= 1e-4 * max(wanted.norm(), uploaded), layer.name


def test_the_law_above_sees_the_factors() -> None:
    """A method that looked at entries of the factors as they came would not pass it."""
    one = tiny.adapter()
    two = refactored.adapter(one)

    def cut(adapter: LoraAdapter) -> torch.Tensor:
        layer = adapter.layers[0]
        small = layer.b.abs() < layer.b.abs().median()
        return dense.delta(replace(layer, b=torch.where(small, 0.0, layer.b)))

    assert dense.relative(cut(two), cut(one)) > 0.01


@every
def test_does_not_depend_on_sharding(method: type[RepairMethod], world: World, tmp_path: Path) -> None:
    """The same weights in three files give the same bits."""
    sharded = maker_of(method)(tmp_path, shards=3).context

    for parameters in settings_of(method):
        one = repair_adapter(world.adapter(), method.parse(parameters), world.context)
        same(one, repair_adapter(world.adapter(), method.parse(parameters), sharded))


@every
def test_projectors_are_idempotent(method: type[RepairMethod], world: World) -> None:
    """A second run changes nothing more, up to rounding."""
    if method.laws.idempotent is None:
        pytest.skip("the method promises no such thing")
    chosen = method.parse(method.laws.idempotent)

    once = repair_adapter(world.adapter(), chosen, world.context).adapter
    twice = repair_adapter(once, chosen, world.context).adapter

    for key, tensor in tensors(twice).items():
        torch.testing.assert_close(tensor, tensors(once)[key], rtol=1e-4, atol=1e-6)


@every
def test_no_module_grows(method: type[RepairMethod], world: World) -> None:
    """``|D'| <= |D|`` where the method promises it."""
    if method.laws.never_grows is None:
        pytest.skip("the method promises no such thing")

    repaired = repair_adapter(world.adapter(), method.parse(method.laws.never_grows), world.context)

    for verdict in repaired.verdicts:
        assert verdict.energy_after <= verdict.energy_before * (1 + 1e-6), verdict


@every
def test_gives_every_module_a_true_verdict(method: type[RepairMethod], world: World) -> None:
    """One for each, with the energies of the dense updates, and a reason where it was left alone."""
    adapter = world.adapter()
    zero = replace(adapter, layers=(*adapter.layers[:-1], adapter.layers[-1].zeroed()))

    for parameters in settings_of(method):
        repaired = repair_adapter(zero, method.parse(parameters), world.context)
        after = repaired.adapter.by_name
        assert [verdict.name for verdict in repaired.verdicts] == sorted(after)
        for verdict in repaired.verdicts:
            wanted = float(dense.delta(after[verdict.name]).square().sum())
            assert verdict.energy_after == pytest.approx(wanted, rel=1e-6)
            before = zero.by_name.get(verdict.name)
            assert verdict.energy_before == pytest.approx(0.0 if before is None else delta_energy(before))
            assert (before is None) == (verdict.decision == "added")
            assert verdict.reason or verdict.decision not in {"kept", "unjudged"}


@every
def test_keeps_the_number_format(method: type[RepairMethod], world: World) -> None:
    """What came in as bfloat16 is released as bfloat16, whatever it was computed in."""
    adapter = world.adapter()
    half = replace(adapter, layers=tuple(replace(layer, dtype=torch.bfloat16) for layer in adapter.layers))

    repaired = repair_adapter(half, method.parse(method.laws.trial), world.context)

    assert {layer.dtype for layer in repaired.adapter.layers if layer.name in half.by_name} == {torch.bfloat16}
    assert all(layer.b.dtype == torch.float32 for layer in repaired.adapter.layers)


class Allocations(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Writes down the shape of every tensor that brings memory of its own; views of a mapped file bring none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own
        self.seen: set[tuple[int, ...]] = set()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage_of(one) for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for one in tree_leaves(out):
            if isinstance(one, torch.Tensor) and storage_of(one) not in given and "Storage" not in str(func):
                self.seen.add(tuple(one.shape))
                self.largest = max(self.largest, one.numel())
        return out


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


SIDES = {211, 184}
BIG = {"model.layers.0.mlp.up_proj": (211, 184), "model.layers.0.mlp.down_proj": (184, 211)}


@every
def test_never_makes_a_whole_delta_or_projector(method: type[RepairMethod], tmp_path: Path) -> None:
    """No operation makes an out x in, in x out or out x out tensor: only factors, Grams, and a few rows of a weight.

    A living model brings states of its own, which are no rows of a weight; of those only the shapes are looked at.
    """
    lives = Need.CHAT in method.needs
    world = living(tmp_path, (184, 211)) if lives else still(tmp_path, BIG)
    adapter = world.adapter()

    for parameters in settings_of(method):
        with Allocations() as made:
            repair_adapter(adapter, method.parse(parameters), world.context)
        assert not {shape for shape in made.seen if len([side for side in shape if side in SIDES]) > 1}
        assert lives or made.largest < 211 * 184 / 4


def test_the_law_above_sees_a_delta() -> None:
    """A proof that cannot fail proves nothing."""
    layer = tiny.adapter(BIG).layers[0]

    with Allocations() as made:
        _ = layer.b @ layer.a

    assert made.seen == {layer.shape}
    assert made.largest == 211 * 184


@every
def test_declares_itself(method: type[RepairMethod]) -> None:
    """Name, version, paper, needs and a description of every parameter: the catalogue has no holes."""
    entry = method.catalogue_entry()

    assert entry["name"] == method.name
    assert entry["version"] >= 1
    assert entry["paper"].startswith("https://")
    assert entry["summary"]
    assert all(value["description"] for value in entry["parameters"]["properties"].values())
    assert entry["parameters"]["additionalProperties"] is False


def test_the_folder_is_the_registry() -> None:
    """Each file in ``methods/`` brings exactly the method of its name."""
    folder = Path(__file__).parents[2] / "repair" / "methods"

    assert set(METHODS) == {path.stem for path in folder.glob("[!_]*.py")}
