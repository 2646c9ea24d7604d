"""RESTA, and what the three safety-vector methods share, against whole matrices in float64."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from repair.__main__ import main
from repair.adapter_file import read_adapter
from repair.checkpoint import Checkpoint
from repair.context import RepairContext
from repair.errors import BadParameters, MissingReference, UnsupportedAdapter
from repair.lora import LayerKind, LoraAdapter
from repair.method import Decision
from repair.methods import METHODS
from repair.methods.resta import Resta
from repair.run import Repaired, repair_adapter
from tests import tiny
from tests.repair import dense, gauge
from tests.repair.test_every_method import BIG, Allocations

UP = "model.layers.0.mlp.up_proj"
NEW = "model.layers.9.mlp.up_proj"
TWIN = {**dict(list(tiny.SHAPES.items())[1:]), NEW: (97, 53)}
"""The twin lacks one module of the adapter and has one more, which is the last by name."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny.tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def twin() -> LoraAdapter:
    return tiny.adapter(TWIN, rank=2, seed=60, scale=1.5)


def folder(path: Path, adapter: LoraAdapter) -> str:
    return str(tiny.write_adapter_files(path, tiny.adapter_tensors(adapter), adapter.config))


def run(pair: tuple[Path, Path], adapter: LoraAdapter | None = None, **parameters: object) -> Repaired:
    aligned, base = (Checkpoint.open(path) for path in pair)
    context = RepairContext(aligned=aligned, base=base, tile_rows=16, rank_limit=512)
    return repair_adapter(adapter or tiny.adapter(), Resta.parse(parameters), context)


def cut(v: Tensor, rank: int) -> Tensor:
    """The best approximation of a rank."""
    u, values, vh = torch.linalg.svd(v, full_matrices=False)
    found: Tensor = u[:, :rank] * values[:rank] @ vh[:rank]
    return found


@pytest.mark.parametrize("strength", [0.5, 2.0])
def test_adds_the_largest_part_of_the_displacement(pair: tuple[Path, Path], strength: float) -> None:
    """``D + strength V_k`` in every module; the score is the share of V that this is; the rank grows by k."""
    adapter = tiny.adapter()

    repaired = run(pair, adapter, rank=4, strength=strength)

    for layer, verdict in zip(repaired.adapter.layers, repaired.verdicts, strict=True):
        v = dense.displacement(*pair, layer.name)
        d = dense.delta(adapter.by_name[layer.name])
        assert dense.relative(dense.delta(layer) - d, strength * cut(v, 4)) < 1e-3
        assert verdict.score == pytest.approx(float((cut(v, 4).norm() / v.norm()).square()), rel=1e-4)
        assert (verdict.decision, layer.rank) == (Decision.PATCHED, 7)
        assert verdict.addition is not None
        assert verdict.addition.rank == 4


def test_a_rank_that_holds_it_all_is_the_whole_displacement(pair: tuple[Path, Path]) -> None:
    """Then nothing is cut: ``D + V``, as published."""
    adapter = tiny.adapter({"model.layers.0.self_attn.k_proj": (17, 53)})

    layer = run(pair, adapter, rank=17, strength=1.0).adapter.layers[0]

    wanted = dense.delta(adapter.layers[0]) + dense.displacement(*pair, layer.name)
    assert dense.relative(dense.delta(layer), wanted) < 1e-5


def test_takes_sixteen_directions_of_a_model_pair_by_default(pair: tuple[Path, Path]) -> None:
    """Close to the best sixteen, though noise has no directions that an iteration could find sharply."""
    adapter = tiny.adapter()

    repaired = run(pair, adapter, strength=1.0)

    for layer in repaired.adapter.layers:
        v = dense.displacement(*pair, layer.name)
        left = v - (dense.delta(layer) - dense.delta(adapter.by_name[layer.name]))
        assert layer.rank == 3 + 16
        assert float(left.norm()) < 1.05 * float((v - cut(v, 16)).norm())


def test_the_limit_bounds_what_is_added_and_keeps_its_direction(pair: tuple[Path, Path]) -> None:
    """At most so many norms of the module's own update; what is within the limit is left as it is."""
    free, held = run(pair, rank=4), run(pair, rank=4, limit=0.5)
    norms = [math.sqrt(one.addition.energy / one.energy_before) for one in free.verdicts if one.addition is not None]
    loose = run(pair, rank=4, limit=max(norms) * 1.01)

    for before, after in zip(free.verdicts, held.verdicts, strict=True):
        assert before.addition is not None
        assert after.addition is not None
        assert before.addition.energy > 0.25 * before.energy_before
        assert after.addition.energy == pytest.approx(0.25 * after.energy_before, rel=1e-5)
        assert after.addition.cosine == pytest.approx(before.addition.cosine, rel=1e-4, abs=1e-9)
    assert loose.verdicts == free.verdicts


def test_a_limit_needs_an_update_to_be_read_against(pair: tuple[Path, Path]) -> None:
    """A zero module is unjudged with one, and gets its vector without."""
    adapter = LoraAdapter(layers=(tiny.layer(UP).zeroed(),))

    held, free = run(pair, adapter, limit=1.0).verdicts[0], run(pair, adapter).verdicts[0]

    assert (held.decision, held.energy_after) == (Decision.UNJUDGED, 0)
    assert (free.decision, free.energy_after > 0) == (Decision.PATCHED, True)


def test_what_is_added_does_not_depend_on_the_adapter(pair: tuple[Path, Path]) -> None:
    """Neither on its values nor on how they are factored."""
    one, two = run(pair, rank=4), run(pair, gauge.refactored(tiny.adapter()), rank=4)
    other = run(pair, tiny.adapter(seed=40, rank=2), rank=4)

    for layer in one.adapter.layers:
        assert dense.relative(dense.delta(two.adapter.by_name[layer.name]), dense.delta(layer)) < 1e-5
        assert torch.equal(other.adapter.by_name[layer.name].a[2:], layer.a[3:])
        assert torch.equal(other.adapter.by_name[layer.name].b[:, 2:], layer.b[:, 3:])


def test_a_weight_that_alignment_left_alone_is_unjudged(tmp_path: Path) -> None:
    """There is nothing to add; the layer stays and the verdict says why."""
    base = tiny.weights()
    aligned = tiny.aligned_from(base)
    aligned[f"{UP}.weight"] = base[f"{UP}.weight"]
    folders = (tiny.write_checkpoint(tmp_path / "a", aligned), tiny.write_checkpoint(tmp_path / "b", base))
    adapter = tiny.adapter()

    repaired = run(folders, adapter)

    verdicts = {one.name: one for one in repaired.verdicts}
    assert verdicts.pop(UP).decision is Decision.UNJUDGED
    assert repaired.adapter.by_name[UP] is adapter.by_name[UP]
    assert {one.decision for one in verdicts.values()} == {Decision.PATCHED}


def test_embeddings_get_the_displacement_in_their_own_orientation(tmp_path: Path) -> None:
    """Held as dim x vocabulary, the transpose of what the model stores."""
    name = "model.embed_tokens"
    folders = tiny.tiny_pair(tmp_path, shapes={name: (131, 53)})
    layer = tiny.layer(name, (53, 131), kind=LayerKind.EMBEDDING, transposed=True)

    found = run(folders, LoraAdapter(layers=(layer,)), rank=4, strength=1.0).adapter.layers[0]

    wanted = cut(dense.displacement(*folders, name).T, 4)
    assert dense.relative(dense.delta(found) - dense.delta(layer), wanted) < 1e-3
    assert (found.kind, found.transposed) == (LayerKind.EMBEDDING, True)


def test_a_twin_is_subtracted_exactly(tmp_path: Path, twin: LoraAdapter) -> None:
    """``D - strength D_h`` at the twin's own rank, without any model; each module tells who adapts it."""
    adapter = tiny.adapter()
    method = Resta.parse({"twin": folder(tmp_path / "twin", twin), "strength": 0.75})

    repaired = repair_adapter(adapter, method, RepairContext())

    for layer, verdict in zip(repaired.adapter.layers, repaired.verdicts, strict=True):
        own, other = adapter.by_name.get(layer.name), twin.by_name.get(layer.name)
        wanted = torch.zeros(layer.shape, dtype=torch.float64) if own is None else dense.delta(own)
        wanted = wanted if other is None else wanted - 0.75 * dense.delta(other)
        assert dense.relative(dense.delta(layer), wanted) < 1e-6
        decision = Decision.ADDED if own is None else Decision.KEPT if other is None else Decision.PATCHED
        assert verdict.decision is decision
        assert layer.rank == {Decision.ADDED: 2, Decision.KEPT: 3, Decision.PATCHED: 5}[decision]
        assert (verdict.reason == "the twin does not adapt this module") is (decision is Decision.KEPT)


def test_an_adapter_that_is_its_own_twin_is_undone(tmp_path: Path) -> None:
    """At full strength nothing is left; the account says that the two oppose each other entirely."""
    adapter = tiny.adapter()
    method = Resta.parse({"twin": folder(tmp_path / "twin", adapter), "strength": 1.0})

    repaired = repair_adapter(adapter, method, RepairContext())

    for verdict in repaired.verdicts:
        assert verdict.energy_after < 1e-10 * verdict.energy_before
        assert verdict.addition is not None
        assert verdict.addition.cosine == pytest.approx(-1)
        assert verdict.addition.opposed == pytest.approx(1)


def test_a_rank_cuts_the_twin_to_its_largest_directions(tmp_path: Path, twin: LoraAdapter) -> None:
    """By the spectrum of the update, whatever its factors; a zero module of the twin adds nothing."""
    turned = gauge.refactored(twin)
    turned = LoraAdapter(layers=(*turned.layers[:-1], turned.layers[-1].zeroed()), config=twin.config)
    method = Resta.parse({"twin": folder(tmp_path / "twin", turned), "strength": 1.0, "rank": 1})
    adapter = tiny.adapter()

    repaired = repair_adapter(adapter, method, RepairContext())

    assert repaired.adapter.names == adapter.names
    for layer in repaired.adapter.layers:
        if layer.name not in TWIN:
            continue
        wanted = -cut(dense.delta(twin.by_name[layer.name]), 1)
        assert dense.relative(dense.delta(layer) - dense.delta(adapter.by_name[layer.name]), wanted) < 1e-5
        assert layer.rank == 4


def test_a_twin_makes_no_whole_delta(tmp_path: Path) -> None:
    """Factors only."""
    path = folder(tmp_path / "twin", tiny.adapter(BIG, rank=2, seed=90))
    adapter, method = tiny.adapter(BIG), Resta.parse({"twin": path, "limit": 0.5})

    with Allocations() as made:
        repair_adapter(adapter, method, RepairContext())

    assert not {shape for shape in made.seen if len([side for side in shape if side in {211, 197}]) > 1}
    assert made.largest < 211 * 197 / 4


def test_a_twin_must_be_a_plain_lora(tmp_path: Path) -> None:
    """Its bias has no singular direction of its own: refused by name."""
    layer = tiny.layer(UP, bias=torch.ones(97))
    tensors = tiny.adapter_tensors(LoraAdapter(layers=(layer,)))
    path = tiny.write_adapter_files(tmp_path / "twin", tensors, tiny.adapter_config(lora_bias=True))

    with pytest.raises(UnsupportedAdapter) as caught:
        repair_adapter(tiny.adapter(), Resta.parse({"twin": str(path)}), RepairContext())
    assert caught.value.field == "twin"


def test_a_twin_is_among_the_inputs(tmp_path: Path, twin: LoraAdapter, capsys: pytest.CaptureFixture[str]) -> None:
    """On the command line, with its digest, and without a model; over HTTP a folder is not offered."""
    tiny.tiny_adapter_dir(tmp_path / "adapter")
    words = ["--method", "resta", "--set", f"twin={folder(tmp_path / 'twin', twin)}", "--out", str(tmp_path / "out")]
    try:
        code = main(["repair", str(tmp_path / "adapter"), *words, "--device", "cpu", "--json"])
    finally:
        torch.use_deterministic_algorithms(mode=False)

    said = json.loads(capsys.readouterr().out)
    assert (code, set(said["inputs"])) == (0, {"adapter", "twin"})
    assert said["inputs"]["twin"]["digest"].startswith("sha256:")
    rank, serving = said["notes"]
    assert rank == "rank: 8 modules grew; the largest was 3 and is 5"
    assert serving.startswith("serving: TGI will leave out ")
    assert set(Resta.catalogue_entry()["parameters"]["properties"]) == {"strength", "rank", "limit", "source"}


@pytest.mark.parametrize("name", ["resta", "lox", "lssf"])
def test_the_references_own_twin_does_what_a_named_one_does(tmp_path: Path, twin: LoraAdapter, name: str) -> None:
    """To the bit, and no model is read; a named one stands before it."""
    path, adapter = folder(tmp_path / "twin", twin), tiny.adapter()
    named = repair_adapter(adapter, METHODS[name].parse({"twin": path}), RepairContext())
    own, other = RepairContext(twin=read_adapter(Path(path))), RepairContext(twin=tiny.adapter(seed=7))
    for context, parameters in ((own, {"source": "twin"}), (other, {"source": "twin", "twin": path})):
        found = repair_adapter(adapter, METHODS[name].parse(parameters), context)
        assert found.verdicts == named.verdicts
        for one, two in zip(found.adapter.layers, named.adapter.layers, strict=True):
            assert torch.equal(one.a, two.a)
            assert torch.equal(one.b, two.b)
    with pytest.raises(MissingReference) as caught:
        repair_adapter(adapter, METHODS[name].parse({"source": "twin"}), RepairContext())
    assert caught.value.field == "twin"


def test_a_twin_at_hand_is_used_only_where_it_is_asked_for(pair: tuple[Path, Path], twin: LoraAdapter) -> None:
    """The default is the model pair, whatever else the reference has."""
    aligned, base = map(Checkpoint.open, pair)
    plain = repair_adapter(tiny.adapter(), Resta(), RepairContext(aligned=aligned, base=base))
    beside = repair_adapter(tiny.adapter(), Resta(), RepairContext(aligned=aligned, base=base, twin=twin))
    assert all(map(torch.equal, (one.b for one in plain.adapter.layers), (one.b for one in beside.adapter.layers)))


def test_needs_both_models_or_a_twin(pair: tuple[Path, Path]) -> None:
    """Without the base there is no displacement."""
    with pytest.raises(MissingReference) as caught:
        repair_adapter(tiny.adapter(), Resta(), RepairContext(aligned=Checkpoint.open(pair[0])))
    assert caught.value.field == "base"


@pytest.mark.parametrize(
    ("name", "value"),
    [("strength", 2.1), ("rank", 0), ("rank", 65), ("limit", 0), ("gamma", 1), ("strength", math.nan)],
)
def test_refuses_impossible_parameters(name: str, value: float) -> None:
    """By name."""
    with pytest.raises(BadParameters) as caught:
        Resta.parse({name: value})
    assert caught.value.field == f"resta.{name}"
