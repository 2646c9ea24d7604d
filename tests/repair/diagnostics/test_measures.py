"""Each number against its definition with whole matrices in float64, and the same for the same update."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
from torch import Tensor

from repair.basis import BasisIdentity, BasisPack, BasisSettings
from repair.basis_writer import write_basis
from repair.checkpoint import Checkpoint
from repair.context import RepairContext
from repair.diagnostics.account import diagnose
from repair.diagnostics.behaviour import GUARDS
from repair.diagnostics.space import from_pack
from repair.diagnostics.spectra import SAMPLES, kurtosis, spectrum_of
from repair.lora import ExtraKind, ExtraTensor, LoraAdapter, LoraLayer
from repair.measure_basis import left_out, measured_linears
from tests import tiny
from tests.repair import calibrated, dense, refactored

UP = "model.layers.0.mlp.up_proj"
DOWN = "model.layers.1.mlp.down_proj"
RANK = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("pair")


@pytest.fixture(scope="module")
def context(folder: Path) -> RepairContext:
    """Both models and a calibration."""
    aligned, base = tiny.tiny_pair(folder)
    calibration = tiny.calibration(folder / "calibration")
    return RepairContext(aligned=Checkpoint.open(aligned), base=Checkpoint.open(base), calibration=calibration)


@pytest.fixture(scope="module")
def pack(folder: Path, context: RepairContext) -> BasisPack:
    return made(folder / "pack", context, rank=RANK)


def made(where: Path, context: RepairContext, **settings: Any) -> BasisPack:
    identity = BasisIdentity(aligned="sha256:a", base="sha256:b", settings=BasisSettings(power=4, **settings))
    write_basis(identity, measured_linears(context, identity.settings), where, left_out=left_out(context), about={})
    return BasisPack.open(where)


def with_bias(layer: LoraLayer) -> Tensor:
    """The update and, as one more column, what its bias adds."""
    if layer.bias is None:
        return dense.delta(layer)
    return torch.cat([dense.delta(layer), layer.scale * layer.bias.double()[:, None]], dim=1)


def module(found: dict[str, Any], name: str) -> dict[str, Any]:
    (one,) = [entry for entry in found["modules"] if entry["name"] == name]
    return dict(one)


LAYERS = {
    "plain": tiny.layer(),
    "rank one": tiny.layer(rank=1),
    "bias": calibrated.with_bias(),
    "more ranks than inputs": tiny.layer(rank=60),
    "negative scale": tiny.layer(scale=-0.5),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_spectrum_is_that_of_the_whole_update(layer: LoraLayer) -> None:
    """By a dense SVD; the entropy of one direction is zero."""
    values = torch.linalg.svdvals(with_bias(layer))
    shares = values.square() / values.square().sum()
    shares = shares[shares > 0]

    found = spectrum_of(layer)

    assert found["norm"] == pytest.approx(float(with_bias(layer).norm()), rel=1e-9)
    assert found["largest_singular_value"] == pytest.approx(float(values[0]), rel=1e-9)
    assert found["share_of_largest"] == pytest.approx(float(shares[0]), rel=1e-9)
    assert found["stable_rank"] == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=1e-9)
    assert found["entropy"] == pytest.approx(float(-(shares * shares.log()).sum()), rel=1e-7, abs=1e-9)


def test_kurtosis_is_that_of_all_entries_up_to_sampling() -> None:
    """A Gaussian has 3; a sample as large as ours is within a few percent; a constant has none."""
    layer = tiny.layer(rank=40)
    assert spectrum_of(layer)["kurtosis"] == pytest.approx(
        scipy.stats.kurtosis(dense.delta(layer).flatten().numpy(), fisher=False), rel=0.05
    )
    gauss = torch.randn(SAMPLES, generator=tiny.generator(1), dtype=torch.float64)
    assert kurtosis(gauss) == pytest.approx(3, rel=0.05)
    assert kurtosis(torch.ones(9)) is None


def test_an_update_that_is_nothing_has_no_shape() -> None:
    """Norm zero; the rest is not a number, so it is none."""
    found = spectrum_of(tiny.layer().zeroed())

    assert (found.pop("norm"), found.pop("largest_singular_value")) == (0, 0)
    assert set(found.values()) == {None}


def test_norms_are_told_next_to_the_weight(context: RepairContext, folder: Path) -> None:
    """``|D| / |W|`` of the aligned weight, and where it is largest."""
    adapter = tiny.adapter()
    found = diagnose(adapter, context)
    wanted = {
        layer.name: float(dense.delta(layer).norm() / dense.model(folder / "aligned")[f"{layer.name}.weight"].norm())
        for layer in adapter.layers
    }

    assert {one["name"]: one["relative_norm"] for one in found["modules"]} == pytest.approx(wanted, rel=1e-6)
    worst = max(wanted, key=lambda name: wanted[name])
    assert found["summary"]["largest_relative_norm_in"] == worst
    assert found["summary"]["norm"] == pytest.approx(
        math.sqrt(sum(float(dense.delta(layer).square().sum()) for layer in adapter.layers)), rel=1e-9
    )


def oracle(layer: LoraLayer, v: Tensor, rank: int) -> dict[str, float]:
    """Every measure by its definition."""
    d, whole = dense.delta(layer), with_bias(layer)
    u = torch.linalg.svd(v, full_matrices=False).U[:, :rank]
    return {
        "rho": dense.cosine(dense.published_operator(v) @ whole, whole),
        "inside": float((u.T @ whole).square().sum() / whole.square().sum()),
        "inside_null": rank / len(v),
        "r_align": float((u.T @ v).norm() / v.norm()),
        "r_after": float((u.T @ (v + d)).norm() / (v + d).norm()),
    }


@pytest.mark.parametrize("layer", [tiny.layer(), calibrated.with_bias(), tiny.layer(DOWN, (53, 97), seed=4)])
def test_alignment_measures_are_the_definitions(
    context: RepairContext, pack: BasisPack, folder: Path, layer: LoraLayer
) -> None:
    """By the weights exactly; out of a pack as exactly as the pack says."""
    v = dense.displacement(folder / "aligned", folder / "base", layer.name)
    wanted = oracle(layer, v, RANK)
    adapter = LoraAdapter(layers=(layer,))

    exact = diagnose(adapter, context, directions=RANK)["modules"][0]["alignment"]
    by_pack = diagnose(adapter, replace(context, basis=pack))["modules"][0]["alignment"]

    assert (exact["source"], by_pack["source"]) == ("checkpoints", "basis pack")
    assert {key: exact[key] for key in wanted} == pytest.approx(wanted, rel=2e-3)
    assert by_pack["rho"] == pytest.approx(wanted["rho"], abs=2 * by_pack["rho_error"] + 1e-6)
    assert abs(by_pack["r_after"] - wanted["r_after"]) <= by_pack["r_after_error"] + 1e-6
    assert 0 < by_pack["r_after_error"] < 0.1
    for key in ("inside", "inside_null", "r_align"):
        assert by_pack[key] == pytest.approx(wanted[key], rel=2e-3), key
    for found in (exact, by_pack):
        assert found["rho_over_null"] == pytest.approx(found["rho"] / found["rho_null"])
    assert by_pack["rho_null"] == pytest.approx(exact["rho_null"], rel=1e-5)


def test_a_pack_of_one_side_tells_what_it_can(folder: Path, context: RepairContext) -> None:
    """Without the input side there is no sum with the update."""
    left = made(folder / "left", context, rank=RANK, inputs=False)
    found = diagnose(LoraAdapter(layers=(tiny.layer(),)), replace(context, basis=left))["modules"][0]["alignment"]

    assert "r_align" in found
    assert "r_after" not in found


def test_signals_of_the_guards_are_their_definitions(context: RepairContext) -> None:
    """``<G, D>`` with a whole gradient; the sum over modules stands in the summary; a leak is a share of the norm."""
    adapter = tiny.adapter()
    found = diagnose(adapter, context)
    wanted = {
        layer.name: float((calibrated.whole_gradient(context, layer) * dense.delta(layer)).sum())
        for layer in adapter.layers
    }

    seen = {one["name"]: one["behaviour"]["damage"]["value"] for one in found["modules"]}
    assert seen == pytest.approx(wanted, rel=1e-5)
    assert found["summary"]["damage"] == pytest.approx(sum(wanted.values()), rel=1e-5)
    for one in found["modules"]:
        assert set(one["behaviour"]) == set(GUARDS)
        assert 0 <= one["behaviour"]["response"]["value"] <= 1
        assert 0 <= one["behaviour"]["leak"]["value"] <= 1


def test_what_was_not_measured_says_why(context: RepairContext, pack: BasisPack) -> None:
    """For the whole adapter, and for a module that nothing is known about; nothing is left out in silence."""
    adapter = tiny.adapter()
    zero = replace(adapter, layers=(adapter.layers[0].zeroed(), *adapter.layers[1:]))

    alone = diagnose(adapter, RepairContext())
    assert set(alone["not_measured"]) == {"relative_norm", "alignment", "behaviour", "profile", "intruder_dimensions"}
    assert all(one["alignment"] is one["behaviour"] is one["relative_norm"] is None for one in alone["modules"])
    whole = diagnose(zero, replace(context, basis=pack))
    assert set(whole["not_measured"]) == {"relative_norm", "profile", "intruder_dimensions"}
    silent = module(whole, adapter.layers[0].name)
    assert "zero adapter" in silent["alignment"]["not_measured"]
    assert all("zero adapter" in silent["behaviour"][measure]["not_measured"] for measure in GUARDS)
    assert whole["summary"]["damage_known_for"] == len(adapter.layers) - 1
    strange = LoraAdapter(layers=(tiny.layer("model.embed_tokens", (9, 7)),))
    unknown = diagnose(strange, RepairContext(basis=pack))["modules"][0]["alignment"]
    assert "no such module" in unknown["not_measured"]


def test_with_a_pack_no_weight_is_read(
    context: RepairContext, pack: BasisPack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless that is asked for."""
    from repair.lora import LayerReference

    read: list[str] = []
    tiles = LayerReference.aligned_tiles

    def counted(self: LayerReference, **how: bool) -> Any:
        read.append(self.name)
        return tiles(self, **how)

    monkeypatch.setattr(LayerReference, "aligned_tiles", counted)
    monkeypatch.setattr(LayerReference, "alignment_tiles", counted)
    fresh = replace(context, aligned=Checkpoint.open(context.need_aligned("a test").directory), basis=pack)

    diagnose(tiny.adapter(), fresh)
    assert read == []
    diagnose(tiny.adapter(), fresh, weights=True)
    diagnose(tiny.adapter(), fresh, weights=True)
    assert sorted(read) == sorted(tiny.SHAPES), "each weight once, then it is remembered"


@pytest.mark.parametrize("with_pack", [False, True])
def test_the_same_update_in_other_factors_gives_the_same_numbers(
    context: RepairContext, pack: BasisPack, *, with_pack: bool
) -> None:
    """Diagnostics speak of the update, not of how it is factored."""
    place = replace(context, basis=pack) if with_pack else context
    one, two = (
        diagnose(adapter, place, directions=4) for adapter in (tiny.adapter(), refactored.adapter(tiny.adapter()))
    )

    for left, right in zip(numbers(one["modules"]), numbers(two["modules"]), strict=True):
        assert left == (pytest.approx(right, rel=2e-3, abs=1e-6) if isinstance(right, float) else right)


def numbers(tree: Any) -> list[Any]:
    """All leaves, in order."""
    if isinstance(tree, dict):
        return [leaf for key in sorted(tree) for leaf in numbers(tree[key])]
    if isinstance(tree, list):
        return [leaf for item in tree for leaf in numbers(item)]
    return [tree]


def test_the_payload_is_what_no_repair_of_factors_reaches() -> None:
    """Replacements, biases, magnitudes, unknown keys; a plain adapter has none."""
    plain = diagnose(tiny.adapter(), RepairContext())["payload"]
    assert not any(plain.values())

    rich = LoraAdapter(
        layers=(calibrated.with_bias(), tiny.layer(DOWN, (53, 97), magnitude=torch.ones(53))),
        extras=(ExtraTensor(key="lm_head.weight", kind=ExtraKind.MODULE, shape=(9, 7)),),
        notes=("config key kept but not understood: x",),
    )
    found = diagnose(rich, RepairContext())["payload"]
    assert found["replacements"] == [{"key": "lm_head.weight", "kind": "module", "shape": [9, 7]}]
    assert (found["output_biases"], found["magnitudes"]) == ([UP], [DOWN])
    assert found["notes"] == list(rich.notes)


def test_where_alignment_changed_nothing_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    """Two equal models: every module says so, by weights and by pack."""
    weights = tiny.weights()
    places = [tiny.write_checkpoint(tmp_path / name, weights) for name in ("aligned", "base")]
    context = RepairContext(aligned=Checkpoint.open(places[0]), base=Checkpoint.open(places[1]))
    pack = made(tmp_path / "pack", context, rank=2)

    for place in (context, replace(context, basis=pack)):
        for one in diagnose(tiny.adapter(), place)["modules"]:
            assert "no alignment displacement" in one["alignment"]["not_measured"]
    basis = pack.for_layer(tiny.layer())
    assert not isinstance(basis, str)
    assert "no alignment displacement" in from_pack(tiny.layer(), basis)
