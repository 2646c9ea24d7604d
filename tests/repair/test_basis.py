"""A basis pack against the dense definition and against reading both checkpoints; what it is refused for."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from repair.__main__ import main
from repair.adapter_file import read_adapter
from repair.alignment import gaussian_probe
from repair.basis import BasisIdentity, BasisPack, BasisSettings
from repair.basis_operator import operator_error, truncated_operator
from repair.basis_writer import write_basis
from repair.checkpoint import Checkpoint
from repair.context import RepairContext
from repair.errors import (
    BadParameters,
    InsufficientBasis,
    MissingReference,
    OutputExists,
    ShapeMismatch,
    WrongReference,
)
from repair.layer_basis import LayerBasis
from repair.lora import LayerReference, LoraAdapter, LoraLayer
from repair.measure_basis import left_out, measured_linears
from repair.method import Decision
from repair.methods import METHODS
from repair.run import Repaired, repair_adapter
from tests import tiny
from tests.repair import dense

UP = "model.layers.0.mlp.up_proj"
EXACT = BasisSettings(rank=8)
CLOSE = 2e-3
"""How far a repair out of a pack may be from one that reads the checkpoints: both look for the directions at random."""


class World:
    """A pair on disk, its basis packs, and the two ways to repair with it."""

    def __init__(self, folder: Path, pair: tuple[Path, Path]) -> None:
        self.folder, (self.aligned, self.base) = folder, pair

    def checkpoints(self) -> RepairContext:
        return RepairContext(aligned=Checkpoint.open(self.aligned), base=Checkpoint.open(self.base), tile_rows=16)

    def write(self, settings: BasisSettings = EXACT) -> Path:
        identity = BasisIdentity(aligned="sha256:a", base="sha256:b", settings=settings)
        where = identity.folder(self.folder / "packs")
        if not where.exists():
            context = self.checkpoints()
            write_basis(identity, measured_linears(context, settings), where, left_out=left_out(context), about={})
        return where

    def pack(self, settings: BasisSettings = EXACT, tolerance: float = 0.01) -> BasisPack:
        return BasisPack.open(self.write(settings), aligned="sha256:a", base="sha256:b", tolerance=tolerance)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Four strong directions in each weight, and a little of everything else."""
    folder = tmp_path_factory.mktemp("basis")
    return World(folder, tiny.tiny_pair(folder))


def noisy(folder: Path) -> World:
    """What alignment changed has no leading directions: no truncation can stand for it."""
    base = tiny.weights(dtype=torch.float32)
    source = tiny.generator(3)
    aligned = {key: weight + 0.1 * torch.randn(weight.shape, generator=source) for key, weight in base.items()}
    return World(folder, (tiny.write_checkpoint(folder / "a", aligned), tiny.write_checkpoint(folder / "b", base)))


def repaired(method: str, context: RepairContext, adapter: LoraAdapter | None = None, **parameters: object) -> Repaired:
    return repair_adapter(adapter or tiny.adapter(), METHODS[method].parse(parameters), context)


def known(pack: BasisPack, name: str = UP) -> LayerBasis:
    found = pack.for_layer(tiny.adapter().by_name[name])
    assert isinstance(found, LayerBasis)
    return found


@pytest.mark.parametrize("name", tiny.SHAPES)
def test_a_pack_holds_the_leading_triplets(world: World, name: str) -> None:
    """Norm, singular values, both sides, the following value and the measured errors, against a dense SVD."""
    v = dense.displacement(world.aligned, world.base, name)
    u, values, vh = torch.linalg.svd(v, full_matrices=False)
    basis = known(world.pack(), name)

    assert (basis.shape, basis.asked, basis.kept) == (tuple(v.shape), 8, 8)
    assert basis.norm == pytest.approx(float(v.norm()), rel=1e-5)
    strong = 4  # the others are noise of nearly one size: their directions are anybody's
    torch.testing.assert_close(basis.read("values")[:strong].double(), values[:strong], rtol=1e-4, atol=0)
    torch.testing.assert_close(basis.read("values").double(), values[:8], rtol=0.03, atol=0)
    assert basis.following == pytest.approx(float(values[8]), rel=0.05)
    for part, exact in (("u", u), ("v", vh.T)):
        found = basis.read(part)[:, :strong].double()
        assert float((found @ found.T - exact[:, :strong] @ exact[:, :strong].T).norm()) < 1e-3
    probe = gaussian_probe(v.shape[0]).double()
    whole = dense.published_operator(v) @ probe
    best = u[:, :8] @ (values[:8, None] ** 2 / v.norm() * (u[:, :8].T @ probe))
    assert basis.error == pytest.approx(dense.relative(best, whole), rel=0.2)
    assert basis.blank["cosine"] == pytest.approx(dense.cosine(whole, probe), rel=1e-5)


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("safe_lora", {"mode": "truncated", "rank": 4, "threshold": 1.0}),
        ("safe_lora", {"mode": "truncated", "rank": 4, "count": 3, "norm_share": 0.5}),
        ("safe_lora", {"mode": "truncated", "rank": 4, "energy": 0.7, "threshold": 1.0}),
        ("safe_lora", {"mode": "closest", "rank": 4, "penalty": 2.0, "threshold": 1.0}),
        ("safe_lora", {"mode": "soft", "rank": 3, "strength": 0.7, "adaptive": True, "ratio": 1.2}),
        ("resta", {"rank": 4}),
        ("lox", {"rank": 3, "limit": 0.5}),
        ("lssf", {"max_rank": 4}),
    ],
)
def test_a_repair_out_of_a_pack_is_the_repair_from_the_checkpoints(
    world: World, method: str, parameters: dict[str, Any]
) -> None:
    """Within `CLOSE`: every delta, every score; the same decisions. No model is given at all."""
    wanted = repaired(method, world.checkpoints(), **parameters)

    found = repaired(method, RepairContext(basis=world.pack()), **parameters)

    for one, two in zip(found.verdicts, wanted.verdicts, strict=True):
        assert (one.name, one.decision, one.reason.split(";")[0]) == (two.name, two.decision, two.reason.split(";")[0])
        assert one.score == pytest.approx(two.score, rel=CLOSE)
        assert one.null == (None if two.null is None else pytest.approx(two.null, rel=CLOSE))
    for layer in found.adapter.layers:
        assert dense.relative(dense.delta(layer), dense.delta(wanted.adapter.by_name[layer.name])) < CLOSE


def test_a_pack_of_the_same_rank_gives_the_very_bits(world: World) -> None:
    """The directions are the ones that a repair of that rank would look for itself."""
    parameters: dict[str, Any] = {"mode": "truncated", "rank": 8, "threshold": 1.0}
    wanted = repaired("safe_lora", world.checkpoints(), **parameters)

    found = repaired("safe_lora", RepairContext(basis=world.pack()), **parameters)

    assert all(torch.equal(layer.b, wanted.adapter.by_name[layer.name].b) for layer in found.adapter.layers)


@pytest.mark.parametrize("parameters", [{"threshold": 1.0}, {"threshold": 1.0, "unit_norm": True}])
def test_paper_mode_keeps_the_error_that_it_tells(world: World, parameters: dict[str, Any]) -> None:
    """Each delta is at most the told error from the dense one, and the cosine twice that; both below the tolerance."""
    adapter = tiny.adapter()
    found = repaired("safe_lora", RepairContext(basis=world.pack()), adapter, **parameters)

    for verdict in found.verdicts:
        told = float(verdict.reason.rpartition("operator error ")[2])
        v, d = dense.displacement(world.aligned, world.base, verdict.name), dense.delta(adapter.by_name[verdict.name])
        operator = dense.published_operator(v)
        exact = operator @ d
        assert verdict.score == pytest.approx(dense.cosine(exact, d), abs=2.1 * told)
        if "unit_norm" in parameters:
            exact = exact / torch.linalg.matrix_norm(operator, 2)
        assert 0 < told <= 0.01
        assert dense.relative(dense.delta(found.adapter.by_name[verdict.name]), exact) < 1.1 * told + 1e-4


@pytest.mark.parametrize("metric", ["absolute", "relative"])
def test_splora_out_of_a_pack_keeps_the_error_that_it_tells(world: World, metric: str) -> None:
    """Each distance is at most the told error times ``|c D|`` from the dense one; the null is the checkpoints'."""
    adapter = tiny.adapter()
    found = repaired("splora", RepairContext(basis=world.pack()), adapter, count=3, metric=metric)
    wanted = repaired("splora", world.checkpoints(), adapter, count=3, metric=metric)

    assert [one.decision for one in found.verdicts] == [one.decision for one in wanted.verdicts]
    for one, two in zip(found.verdicts, wanted.verdicts, strict=True):
        assert one.null == pytest.approx(two.null, rel=1e-5)
        told = float(one.reason.rpartition("operator error ")[2])
        assert 0 < told <= 0.01
        d = dense.delta(adapter.by_name[one.name])
        moved = dense.published_operator(dense.displacement(world.aligned, world.base, one.name)) @ d
        method = METHODS["splora"].parse({"metric": metric})
        basis_score = method.assess(
            adapter.by_name[one.name],
            RepairContext(basis=world.pack()).reference_for(adapter.by_name[one.name], need=method.basis_need),
        ).score
        size = float(d.norm()) if metric == "relative" else 1.0
        assert basis_score is not None
        assert abs(basis_score * size - float((moved - d).norm())) < 1.1 * told * float(moved.norm()) + 1e-5


def test_safemerge_out_of_a_pack_merges_as_from_the_checkpoints(world: World) -> None:
    """The cosine is within twice the told error; what is mixed in is exact, and so are the modules without a change."""
    adapter, safe = tiny.adapter(), tiny.adapter(rank=2, seed=60, scale=1.5)
    scores = sorted(one.score or 0.0 for one in repaired("safe_lora", world.checkpoints(), adapter).verdicts)
    wish = {"threshold": (scores[3] + scores[4]) / 2, "share": 0.4}
    wanted = repaired("safemerge", replace(world.checkpoints(), patch=safe), adapter, **wish)

    found = repaired("safemerge", RepairContext(basis=world.pack(), patch=safe), adapter, **wish)

    assert sum(one.decision is Decision.PATCHED for one in found.verdicts) == 4
    for one, two in zip(found.verdicts, wanted.verdicts, strict=True):
        told = float(one.reason.rpartition("operator error ")[2])
        assert one.decision is two.decision
        assert one.score == pytest.approx(two.score, abs=2.1 * told)
        assert 0 < told <= 0.01
        assert one.score != two.score
    for one_layer, two_layer in zip(found.adapter.layers, wanted.adapter.layers, strict=True):
        assert torch.equal(one_layer.b, two_layer.b)
        assert torch.equal(one_layer.a, two_layer.a)


@pytest.mark.parametrize("method", ["splora", "safemerge"])
def test_the_operator_of_other_methods_is_refused_beyond_the_tolerance(world: World, method: str) -> None:
    """As that of Safe LoRA; and where checkpoints are given, they are read and the verdict says so."""
    pack = world.pack(tolerance=1e-4)
    safe = tiny.adapter(rank=2, seed=60)
    with pytest.raises(InsufficientBasis, match=r"operator error is .* above 0\.0001"):
        repaired(method, RepairContext(basis=pack, patch=safe))

    direct = replace(world.checkpoints(), patch=safe)
    found, wanted = (repaired(method, context) for context in (replace(direct, basis=pack), direct))

    assert all("read from the checkpoints" in one.reason for one in found.verdicts)
    assert [one.score for one in found.verdicts] == [one.score for one in wanted.verdicts]


def test_the_published_ranking_of_splora_takes_nothing_from_a_pack(world: World) -> None:
    """Quartiles of entries are not bounded by an error in norm: both models are asked for."""
    assert METHODS["splora"].parse({"ranking": "published"}).basis_need is None
    with pytest.raises(MissingReference):
        repaired("splora", RepairContext(basis=world.pack()), ranking="published")


def test_modules_that_only_the_patch_adapts_must_be_known_to_the_pack(world: World) -> None:
    """Where there is no model to ask; their shape is compared too."""
    few = LoraAdapter(layers=tiny.adapter().layers[1:])
    context = RepairContext(basis=world.pack())

    known = replace(context, patch=tiny.adapter(rank=2, seed=60))
    assert repaired("safemerge", known, few, reach="everywhere").verdicts[0].decision is Decision.ADDED
    for stranger, problem in (
        (tiny.layer("model.layers.7.mlp.up_proj"), InsufficientBasis),
        (tiny.layer("model.layers.0.self_attn.k_proj", (18, 53)), ShapeMismatch),
    ):
        with pytest.raises(problem):
            repaired("safemerge", replace(context, patch=LoraAdapter(layers=(stranger,))), few, reach="everywhere")


def test_paper_mode_is_refused_by_module_beyond_the_tolerance(world: World) -> None:
    """Without checkpoints there is nothing else to go by; the refusal names module, error and tolerance."""
    with pytest.raises(InsufficientBasis, match=r"operator error is .* above 0\.0001") as caught:
        repaired("safe_lora", RepairContext(basis=world.pack(tolerance=1e-4)))
    assert caught.value.field in tiny.SHAPES


def test_paper_mode_falls_back_to_the_checkpoints_and_says_so(tmp_path: Path) -> None:
    """What the pack cannot tell is read; the numbers are then those of a repair without a pack, bit for bit."""
    made = noisy(tmp_path)
    context = made.checkpoints()
    wanted = repaired("safe_lora", context, threshold=1.0)
    pack = made.pack()
    both = RepairContext(aligned=context.aligned, base=context.base, tile_rows=16, basis=pack)

    found = repaired("safe_lora", both, threshold=1.0)

    assert all(known(pack, name).error > 0.1 for name in tiny.SHAPES)
    assert all("read from the checkpoints, the basis pack cannot answer" in one.reason for one in found.verdicts)
    assert [one.score for one in found.verdicts] == [one.score for one in wanted.verdicts]
    assert all(torch.equal(layer.b, wanted.adapter.by_name[layer.name].b) for layer in found.adapter.layers)
    with pytest.raises(InsufficientBasis):
        repaired("safe_lora", RepairContext(basis=pack), threshold=1.0)


def test_an_update_outside_of_the_directions_is_refused_though_the_probe_fits(world: World) -> None:
    """The error on columns without preference says nothing about an update that avoids what was kept."""
    basis = known(world.pack())
    layer = tiny.adapter().by_name[UP]
    u = basis.read("u").double()
    hidden = (layer.b.double() - u @ (u.T @ layer.b.double())).float() + 1e-4 * layer.b
    hiding = LoraAdapter(layers=(LoraLayer(name=UP, a=layer.a, b=hidden, scale=2.0),))

    with pytest.raises(InsufficientBasis):
        repaired("safe_lora", RepairContext(basis=world.pack()), hiding, threshold=1.0)

    truth = dense.published_operator(dense.displacement(world.aligned, world.base, UP)) @ dense.delta(hiding.layers[0])
    kept = truncated_operator(hidden, basis).double() @ layer.a.double() * 2.0
    assert basis.error < 0.01 < dense.relative(kept, truth)


def test_the_bound_of_a_layer_does_not_depend_on_how_it_is_factored(world: World) -> None:
    """``(b r)(r^-1 a)`` is the same update; and the bound holds against the dense truth."""
    basis, layer = known(world.pack()), tiny.adapter().by_name[UP]
    turn = torch.randn(3, 3, generator=tiny.generator(9), dtype=torch.float64) + 2 * torch.eye(3)
    again = LoraAdapter(
        layers=(LoraLayer(name=UP, a=(turn.inverse() @ layer.a.double()), b=layer.b.double() @ turn, scale=2.0),)
    ).layers[0]

    bound = operator_error(layer, basis)

    assert operator_error(again, basis) == pytest.approx(bound, rel=1e-6)
    exact = dense.published_operator(dense.displacement(world.aligned, world.base, UP)) @ dense.delta(layer)
    seen = truncated_operator(layer.b, basis).double() @ layer.a.double() * layer.scale
    assert float((exact - seen).norm() / seen.norm()) < bound


def test_no_row_of_a_checkpoint_is_read_where_the_pack_answers(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even when the folders are given: counted at the one place that reads rows."""
    pack = world.pack()  # made here when it is the first to be asked for, by reading the checkpoints
    read: list[str] = []
    tiles = LayerReference.alignment_tiles

    def counted(self: LayerReference, **how: bool) -> Iterator[Any]:
        read.append(self.name)
        return tiles(self, **how)

    monkeypatch.setattr(LayerReference, "alignment_tiles", counted)
    context = world.checkpoints()
    both = RepairContext(aligned=context.aligned, base=context.base, basis=pack)
    assert context.aligned is not None

    repaired("safe_lora", both, mode="truncated", rank=8, threshold=1.0)
    repaired("resta", both, rank=8)

    assert (read, context.aligned._opened) == ([], {})
    repaired("safe_lora", both, mode="truncated", rank=9, threshold=1.0)
    assert set(read) == set(tiny.SHAPES)


def test_more_directions_than_the_pack_has_are_refused_or_read(world: World) -> None:
    """Unless the weight has no more: then the pack has all of it."""
    with pytest.raises(InsufficientBasis, match="8 directions, 9 were asked for"):
        repaired("safe_lora", RepairContext(basis=world.pack()), mode="truncated", rank=9)

    whole = world.pack(BasisSettings(rank=60))
    found = repaired("safe_lora", RepairContext(basis=whole), mode="truncated", rank=70, threshold=1.0)

    assert {verdict.decision for verdict in found.verdicts} == {Decision.PROJECTED}


def test_a_pack_without_the_input_side_serves_projections_only(world: World) -> None:
    """Adding directions back takes both sides."""
    pack = world.pack(BasisSettings(rank=8, inputs=False))

    assert repaired("safe_lora", RepairContext(basis=pack), mode="truncated", rank=8).verdicts
    with pytest.raises(InsufficientBasis, match="without the input side"):
        repaired("lox", RepairContext(basis=pack))


def test_what_alignment_left_alone_and_what_it_has_no_base_for(tmp_path: Path) -> None:
    """An unchanged weight is unjudged as without a pack; a module without a base is left out by name."""
    base = tiny.weights()
    aligned = tiny.aligned_from(base)
    aligned[f"{UP}.weight"] = base[f"{UP}.weight"]
    missing = "model.layers.1.mlp.up_proj"
    del base[f"{missing}.weight"]
    pair = (tiny.write_checkpoint(tmp_path / "a", aligned), tiny.write_checkpoint(tmp_path / "b", base))
    pack = World(tmp_path, pair).pack()
    few = LoraAdapter(layers=tuple(layer for layer in tiny.adapter().layers if layer.name != missing))

    for parameters in ({}, {"mode": "truncated", "rank": 3}):
        verdicts = repaired("safe_lora", RepairContext(basis=pack), few, **parameters).verdicts
        reasons = {one.name: one.reason for one in verdicts if one.decision is Decision.UNJUDGED}
        assert reasons == {UP: "no alignment displacement: alignment did not change this weight"}
    assert pack.header["left_out"] == {missing: "the base has no such module"}
    with pytest.raises(InsufficientBasis, match="the base has no such module"):
        repaired("safe_lora", RepairContext(basis=pack))


def test_dora_magnitudes_still_need_the_aligned_model(world: World) -> None:
    """A pack knows what alignment changed, not the weight whose row norms are measured again."""
    layer = tiny.layer(UP, magnitude=torch.ones(97))

    with pytest.raises(MissingReference) as caught:
        repaired(
            "safe_lora",
            RepairContext(basis=world.pack()),
            LoraAdapter(layers=(layer,)),
            mode="truncated",
            rank=8,
            threshold=1.0,
        )
    assert caught.value.field == "aligned"


def test_names_that_differ_in_the_prefix_find_their_module(world: World) -> None:
    """As in a checkpoint."""
    layer = tiny.layer("base_model.layers.0.mlp.up_proj")
    found = world.pack().for_layer(layer)

    assert isinstance(found, LayerBasis)
    assert torch.equal(found.read("u"), known(world.pack()).read("u"))


def test_a_pack_is_refused_for_another_pair_shape_version_or_byte(world: World, tmp_path: Path) -> None:
    """Each by name."""
    where = world.write()
    others: list[dict[str, Any]] = [{"aligned": "sha256:x"}, {"base": "sha256:x"}]
    for wrong in others:
        with pytest.raises(WrongReference, match="made for another") as caught:
            BasisPack.open(where, **wrong)
        assert (caught.value.field, caught.value.file) == ("basis", str(where))
        with pytest.raises(WrongReference, match="none of"):
            BasisPack.open(where.parent, **wrong)
    with pytest.raises(ShapeMismatch, match="basis pack"):
        world.pack().for_layer(tiny.layer(UP, (53, 97)))
    copy = tmp_path / "copy"
    shutil.copytree(where, copy)
    header = json.loads((copy / "basis.json").read_text())
    (copy / header["modules"][UP]["file"]).write_bytes(b"\0" * 100)
    with pytest.raises(WrongReference, match="not what the header says"):
        repaired("safe_lora", RepairContext(basis=BasisPack.open(copy)), mode="truncated", rank=4)
    for lie in ({"aligned": "sha256:x"}, {"settings": header["settings"] | {"rank": 64}}, {"settings": {"rank": 0}}):
        (copy / "basis.json").write_text(json.dumps(header | lie))
        with pytest.raises(WrongReference, match="its identity is not that of"):
            BasisPack.open(copy)
    header["modules"][UP]["file"] = "../" + where.name + "/00000.safetensors"
    (copy / "basis.json").write_text(json.dumps(header))
    with pytest.raises(WrongReference, match="not what the header says"):
        repaired("safe_lora", RepairContext(basis=BasisPack.open(copy)), mode="truncated", rank=4)
    (copy / "basis.json").write_text(json.dumps(header | {"version": 0}))
    with pytest.raises(WrongReference, match="not a basis pack of version"):
        BasisPack.open(copy)


def test_a_pack_is_named_by_all_that_decides_it_and_never_written_over(world: World) -> None:
    """Another pair, another rank: another name."""
    one = BasisIdentity(aligned="sha256:a", base="sha256:b", settings=EXACT)
    others = [
        BasisIdentity(aligned="sha256:b", base="sha256:a", settings=EXACT),
        BasisIdentity(aligned="sha256:a", base="sha256:b", settings=BasisSettings(rank=9)),
        BasisIdentity(aligned="sha256:a", base="sha256:b", settings=BasisSettings(rank=8, inputs=False)),
    ]
    assert len({identity.digest for identity in (one, *others)}) == 4
    with pytest.raises(OutputExists):
        write_basis(one, iter(()), world.write(), left_out={}, about={})


def test_a_broken_off_pack_leaves_nothing(world: World, tmp_path: Path) -> None:
    """The folder takes its name only when it is whole."""

    def breaks() -> Iterator[Any]:
        yield next(iter(measured_linears(world.checkpoints(), EXACT)))
        raise KeyboardInterrupt

    identity = BasisIdentity(aligned="sha256:a", base="sha256:b", settings=EXACT)
    with pytest.raises(KeyboardInterrupt):
        write_basis(identity, breaks(), identity.folder(tmp_path), left_out={}, about={})
    assert list(tmp_path.iterdir()) == []


def test_settings_that_look_for_nothing_are_refused() -> None:
    """Named by field."""
    impossible: list[dict[str, Any]] = [{"rank": 0}, {"oversample": 0}, {"power": -1}]
    for wrong in impossible:
        with pytest.raises(BadParameters) as caught:
            BasisSettings(**wrong)
        assert caught.value.field in wrong


def test_of_two_that_make_the_same_pack_at_once_both_end_well(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one looks at the models, another comes, does the same and is done first."""
    tiny.tiny_pair(tmp_path)
    words = ["basis", "--aligned", str(tmp_path / "aligned"), "--base", str(tmp_path / "base"), "--device", "cpu"]
    words += ["--out", str(tmp_path / "packs"), "--rank", "8", "--json"]
    said: list[int] = []

    def overtaken(*parts: Any, **more: Any) -> Any:
        if not said:
            said.append(-1)
            said[0] = main(words)
        return measured_linears(*parts, **more)

    monkeypatch.setattr("repair.pair_commands.measured_linears", overtaken)
    try:
        assert (main(words), said) == (0, [0])
    finally:
        torch.use_deterministic_algorithms(mode=False)
    first, second = (json.loads(line)["outputs"]["basis"] for line in capsys.readouterr().out.splitlines())
    assert first == second


def test_the_command_makes_a_pack_once_and_repairs_with_the_models_gone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`basis`, then `repair --basis` after both model folders were deleted; the report names pack and pair."""
    tiny.tiny_pair(tmp_path)
    adapter = tiny.tiny_adapter_dir(tmp_path / "adapter")
    pair = ["--aligned", str(tmp_path / "aligned"), "--base", str(tmp_path / "base"), "--device", "cpu"]
    packs = str(tmp_path / "packs")

    def run(*words: str) -> tuple[int, dict[str, Any], dict[str, Any]]:
        code = main([*words, "--json"])
        torch.use_deterministic_algorithms(mode=False)
        said = capsys.readouterr()
        problem = said.err.splitlines()[-1] if code == 1 else "{}"  # above it stands progress
        return code, json.loads(said.out or "{}"), json.loads(problem)

    truncated = ["--method", "safe_lora", "--set", "mode=truncated", "--set", "rank=8"]
    _, made, _ = run("basis", *pair, "--out", packs, "--rank", "8")
    _, again, _ = run("basis", *pair, "--out", packs, "--rank", "8")
    _, direct, _ = run("repair", str(adapter), *truncated, *pair, "--out", str(tmp_path / "direct"))
    _, both, _ = run("repair", str(adapter), *truncated, *pair, "--basis", packs, "--out", str(tmp_path / "both"))
    other = [*pair[:3], pair[1], *pair[4:]]
    code, _, problem = run("repair", str(adapter), *truncated, *other, "--basis", packs, "--out", str(tmp_path / "no"))
    for folder in ("aligned", "base"):
        shutil.rmtree(tmp_path / folder)
    _, alone, _ = run("repair", str(adapter), *truncated, "--basis", packs, "--out", str(tmp_path / "alone"))
    wrong, _, reason = run("repair", str(adapter), "--method", "scale", "--basis", packs, "--out", str(tmp_path / "s"))

    assert (made["outputs"]["basis"]["cached"], again["outputs"]["basis"]["cached"]) == (False, True)
    assert [module["name"] for module in made["modules"]] == sorted(tiny.SHAPES)
    assert (code, problem["rule"], problem["field"]) == (1, "wrong-reference", "basis")
    assert (wrong, reason["rule"], reason["field"]) == (1, "bad-parameters", "basis")
    assert alone["inputs"]["basis"] == {
        "path": "packs",
        "digest": made["outputs"]["basis"]["digest"],
        "aligned": made["inputs"]["aligned"]["digest"],
        "base": made["inputs"]["base"]["digest"],
        "tolerance": 0.01,
    }
    assert set(alone["inputs"]) == {"adapter", "basis"}
    assert direct["outputs"]["adapter"]["digest"] == both["outputs"]["adapter"]["digest"]
    assert direct["outputs"]["adapter"]["digest"] == alone["outputs"]["adapter"]["digest"]
    assert read_adapter(tmp_path / "alone").names == tuple(sorted(tiny.SHAPES))


@pytest.mark.parametrize(
    "words",
    [
        ["--policy", "demo", "--basis-tolerance", "0.1"],
        ["--method", "safe_lora", "--basis-tolerance", "0.1"],
    ],
)
def test_a_flag_without_effect_is_an_error(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Never ignored in silence."""
    with pytest.raises(SystemExit) as caught:
        main(["repair", "adapter", "--out", "out", *words])
    assert caught.value.code == 1
    assert "has no meaning with" in json.loads(capsys.readouterr().err)["detail"]
