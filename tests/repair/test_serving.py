"""What engines make of an adapter, and the law that a repair never makes it worse."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from repair.adapter_file import read_adapter, write_adapter
from repair.checkpoint import Checkpoint
from repair.context import RepairContext
from repair.errors import UnsupportedAdapter
from repair.lora import LayerKind, LoraAdapter, ParameterSlot, concatenate
from repair.method import RepairMethod
from repair.methods import METHODS
from repair.ranks import STEPS, fitted, limit_of, step_of
from repair.run import repair_adapter
from repair.serving import lost, serving, serving_report
from tests import tiny
from tests.repair import calibrated, dense
from tests.repair.test_every_method import World, every, maker_of, settings_of

UP = "model.layers.0.mlp.up_proj"
MINIMAL = {"method": "gradient_guard", "parameters": {"form": "minimal"}}
COMPOSED = {"steps": [MINIMAL, {"method": "scale", "parameters": {"strength": 0.5}}]}


def adapter(rank: int = 3, **config: Any) -> LoraAdapter:
    made = tiny.adapter(rank=rank)
    return replace(made, config={**made.config, **config})


def taken(found: LoraAdapter) -> dict[str, str]:
    return {one.engine: one.taken.value for one in serving(found)}


def changed(**fields: Any) -> LoraAdapter:
    made = adapter()
    return replace(made, layers=(replace(made.layers[0], **fields), *made.layers[1:]))


def on_disk(folder: Path, *, extras: dict[str, tuple[int, ...]], **config: Any) -> LoraAdapter:
    made = adapter(**config)
    tensors = tiny.adapter_tensors(made) | {f"base_model.model.{k}": torch.ones(v) for k, v in extras.items()}
    return read_adapter(tiny.write_adapter_files(folder, tensors, made.config))


ALL = dict.fromkeys(("vllm", "sglang", "tgi", "llama.cpp"), "yes")
EXPERT = ParameterSlot(parameter="model.layers.0.mlp.experts.down_proj", expert=0, experts=1)
CASES: dict[str, tuple[Callable[[Path], LoraAdapter], dict[str, str]]] = {
    "plain": (lambda _: adapter(), {}),
    "rank 16": (lambda _: adapter(rank=16), {}),
    "rank 17": (lambda _: adapter(rank=17), {"vllm": "if"}),
    "rank 513": (lambda _: adapter(rank=513), {"vllm": "no"}),
    "rslora": (
        lambda _: replace(
            adapter(use_rslora=True), layers=tuple(replace(one, scale=6 / 3**0.5) for one in adapter().layers)
        ),
        {"sglang": "altered", "llama.cpp": "altered"},
    ),
    "alpha_pattern": (
        lambda _: changed(scale=9.0),
        {"vllm": "altered", "sglang": "altered", "tgi": "altered", "llama.cpp": "altered"},
    ),
    "rank_pattern": (
        lambda _: changed(a=torch.ones(6, 97), b=torch.ones(53, 6), scale=1.0),
        {"vllm": "altered", "sglang": "altered", "tgi": "altered"},  # llama.cpp divides by the module's own rank
    ),
    "dora": (
        lambda _: changed(magnitude=torch.ones(53)),
        {"vllm": "no", "sglang": "no", "tgi": "altered", "llama.cpp": "no"},
    ),
    "lora_bias": (
        lambda _: changed(bias=torch.ones(53)),
        {"vllm": "no", "sglang": "altered", "tgi": "altered", "llama.cpp": "no"},
    ),
    "modules_to_save": (
        lambda folder: on_disk(folder, extras={"lm_head.weight": (5, 3)}, modules_to_save=["lm_head"]),
        {"vllm": "no", "sglang": "altered", "tgi": "altered", "llama.cpp": "no"},
    ),
    "biases": (
        lambda folder: on_disk(folder, extras={"model.x.bias": (5,)}, bias="all"),
        {"vllm": "no", "sglang": "altered", "tgi": "altered", "llama.cpp": "no"},
    ),
    "head": (lambda _: changed(name="lm_head"), {"vllm": "if", "sglang": "if", "tgi": "altered", "llama.cpp": "if"}),
    "embedding": (
        lambda _: changed(name="model.embed_tokens", kind=LayerKind.EMBEDDING),
        {"vllm": "if", "sglang": "if", "tgi": "altered"},
    ),
    "fused experts": (
        lambda _: changed(name="model.layers.0.mlp.experts.0.down_proj", slot=EXPERT),
        {"vllm": "if", "sglang": "if", "tgi": "altered", "llama.cpp": "no"},
    ),
    "experts apart": (
        lambda _: changed(name="model.layers.0.mlp.experts.0.down_proj"),
        {"vllm": "if", "sglang": "if", "tgi": "altered", "llama.cpp": "if"},
    ),
    "a pattern": (lambda _: adapter(target_modules=r".*_proj"), {"sglang": "if"}),
    "turned": (lambda _: adapter(fan_in_fan_out=True), {"llama.cpp": "if"}),
    "other names": (lambda _: changed(name="transformer.h.0.attn.c_attn"), {"tgi": "altered"}),
    "some blocks": (
        lambda _: replace(adapter(), layers=tuple(one for one in adapter().layers if one.name != UP)),
        {"tgi": "altered"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_each_trait_has_its_answer(tmp_path: Path, case: str) -> None:
    """And whatever is not plainly yes has a reason, and the version it is about."""
    make, wanted = CASES[case]
    found = make(tmp_path)

    assert taken(found) == ALL | wanted
    for one in serving(found):
        assert one.source
        assert bool(one.reasons) == (one.taken.value != "yes")


def test_the_step_is_named() -> None:
    """A server must be started with the step, not with the rank."""
    assert {one.engine: dict(one.settings) for one in serving(adapter(rank=40))}["vllm"] == {"--max-lora-rank": 64}
    assert [step_of(rank) for rank in (1, 16, 17, 320, 512, 513)] == [16, 16, 32, 320, 512, None]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[type[RepairMethod]], World]:
    made: dict[Any, World] = {}

    def world(method: type[RepairMethod]) -> World:
        maker = maker_of(method)
        if maker not in made:
            made[maker] = maker(tmp_path_factory.mktemp("world"))
        return made[maker]

    return world


@every
@pytest.mark.parametrize("rank", [3, 16, 32])
def test_no_method_makes_an_adapter_less_servable(
    method: type[RepairMethod], worlds: Callable[[type[RepairMethod]], World], tmp_path: Path, rank: int
) -> None:
    """Written and read again, every engine takes it as it took the upload; also when the rank had no room left."""
    world = worlds(method)
    made = tiny.adapter(world.shapes, rank=rank)
    source = tiny.write_adapter_files(tmp_path / "in", tiny.adapter_tensors(made), made.config)
    uploaded = read_adapter(source)

    for at, parameters in enumerate(settings_of(method)):
        repaired = repair_adapter(uploaded, method.parse(parameters), world.context)
        write_adapter(repaired.adapter, tmp_path / str(at))
        after = read_adapter(tmp_path / str(at))
        assert max(layer.rank for layer in after.layers) <= STEPS[STEPS.index(max(rank, 16))]
        assert lost(uploaded, after) == []


LAYOUTS: dict[str, Callable[[], LoraAdapter]] = {
    "scales": lambda: changed(scale=9.0),
    "lora_bias": lambda: replace(
        adapter(lora_bias=True),
        layers=tuple(replace(one, bias=torch.ones(one.shape[0])) for one in adapter().layers),
    ),
    "pattern": lambda: adapter(target_modules=r".*_proj"),
    "rank 31": lambda: adapter(rank=31),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_comes_out_at_least_as_servable(tmp_path: Path, layout: str) -> None:
    """What the export does to scales, ranks and targets only ever helps."""
    before = LAYOUTS[layout]()
    repaired = repair_adapter(before, METHODS["scale"].parse({"strength": 0.5}), RepairContext())

    write_adapter(repaired.adapter, tmp_path)

    found = serving_report(before, read_adapter(tmp_path))
    assert found["lost"] == []
    assert set(found) == {"input", "output", "lost"}


def test_what_is_lost_is_said() -> None:
    """The law would be empty if nothing could break it."""
    assert lost(adapter(rank=16), adapter(rank=17)) == [
        {
            "engine": "vllm",
            "was": "yes",
            "is": "if",
            "reasons": ["rank 17: the server must be started with --max-lora-rank 32 or more"],
        }
    ]
    assert [one["engine"] for one in lost(adapter(rank=17), adapter(rank=33))] == ["vllm"]
    assert lost(adapter(rank=33), adapter(rank=17)) == []
    assert [one["engine"] for one in lost(changed(bias=torch.ones(53)), changed(scale=9.0))] == ["vllm", "llama.cpp"]


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, values, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    found: torch.Tensor = u[:, :rank] * values[:rank] @ vh[:rank]
    return found


def test_a_small_patch_is_kept_whole_and_the_module_gives_way() -> None:
    """``D' = best(D, 16 - 2) + P``, and the share of energy that went is that of the smallest components."""
    edited, patch = tiny.adapter(rank=16, scale=0.7), tiny.adapter(rank=2, seed=60)

    room = fitted(edited, patch, limit_of(edited))

    for name, layer in edited.by_name.items():
        values = torch.linalg.svdvals(dense.delta(layer))
        assert room.discarded[name] == pytest.approx(float((values[14:] ** 2).sum() / (values**2).sum()), rel=1e-4)
        assert dense.relative(dense.delta(room.edited.by_name[name]), best(dense.delta(layer), 14)) < 1e-5
        assert room.edited.by_name[name].rank == 14
        assert room.added.by_name[name] is patch.by_name[name]


def test_a_large_addition_shares_the_room() -> None:
    """Neither has a claim of its own: the sum is cut to the best that one rank less can hold."""
    edited, added = tiny.adapter(rank=16, scale=0.7), tiny.adapter(rank=12, seed=60, scale=1.5)

    room = fitted(edited, added, 16)

    for name, layer in edited.by_name.items():
        whole = dense.delta(layer) + dense.delta(added.by_name[name])
        found = dense.delta(room.edited.by_name[name]) + dense.delta(room.added.by_name[name])
        assert dense.relative(found, best(whole, 15)) < 1e-5
        assert room.edited.by_name[name].rank + room.added.by_name[name].rank == 16


def test_where_there_is_room_nothing_is_touched() -> None:
    """The very same layers; a limit of one's own is kept as well."""
    edited, added = tiny.adapter(rank=3), tiny.adapter(rank=13, seed=60)

    room = fitted(edited, added, 16)

    assert room.discarded == {}
    assert all(one is edited.by_name[one.name] for one in room.edited.layers)
    alone = tiny.adapter({"model.layers.5.mlp.up_proj": (97, 53)}, rank=13, seed=70)
    assert fitted(edited, alone, 8).added.layers[0].rank == 8
    assert fitted(edited, added, None).added is added


def test_a_cut_is_in_the_verdict_and_in_the_notes() -> None:
    """With what it cost."""
    context = RepairContext(patch=tiny.adapter(rank=1, seed=60), rank_limit=3)

    repaired = repair_adapter(tiny.adapter(rank=3), METHODS["patch"](), context)

    assert {layer.rank for layer in repaired.adapter.layers} == {3}
    assert all("cut in rank" in verdict.reason for verdict in repaired.verdicts)
    assert any("cut to what engines take" in note for note in repaired.notes)
    for verdict, layer in zip(repaired.verdicts, repaired.adapter.layers, strict=True):
        assert verdict.energy_after == pytest.approx(float(dense.delta(layer).square().sum()), rel=1e-5)


@pytest.mark.parametrize(("limit", "left"), [(None, 16), (8, 8)])
@pytest.mark.parametrize(
    ("method", "parameters"),
    [("gradient_guard", {"form": "minimal"}), ("scale", {"strength": 0.5}), ("compose", COMPOSED)],
)
def test_no_edit_leaves_a_rank_above_the_limit(
    tmp_path: Path, method: str, parameters: dict[str, Any], limit: int | None, left: int
) -> None:
    """An edit that adds ranks, one that keeps them, and two in a row; nothing that served the upload is lost."""
    uploaded = tiny.adapter(rank=16)
    uncut, context = replace(calibrated.context_in(tmp_path), rank_limit=512), calibrated.context_in(tmp_path / "again")

    wanted = repair_adapter(uploaded, METHODS[method].parse(parameters), uncut).adapter.by_name
    repaired = repair_adapter(uploaded, METHODS[method].parse(parameters), replace(context, rank_limit=limit))

    assert {layer.rank for layer in repaired.adapter.layers} == {left}
    write_adapter(repaired.adapter, tmp_path / "out")
    assert lost(uploaded, read_adapter(tmp_path / "out")) == []
    for verdict in repaired.verdicts:
        layer = repaired.adapter.by_name[verdict.name]
        if method != "compose":  # that cuts after each step
            assert dense.relative(dense.delta(layer), best(dense.delta(wanted[verdict.name]), left)) < 1e-5
        assert ("cut in rank" in verdict.reason) == (wanted[verdict.name].rank > left)
        assert verdict.energy_after == pytest.approx(float(dense.delta(layer).square().sum()), rel=1e-5)


def test_a_cut_sum_keeps_the_shift_of_the_output() -> None:
    """``scale * bias`` of the module, whatever becomes of its scale."""
    bias = torch.randn(97, generator=tiny.generator(9))
    edited = LoraAdapter(layers=(tiny.layer(UP, rank=16, scale=2.0, bias=bias),))
    added = LoraAdapter(layers=(tiny.layer(UP, rank=16, seed=60, scale=0.01),))

    room = fitted(edited, added, 16)

    (found,) = concatenate(room.edited, room.added).layers
    assert found.bias is not None
    torch.testing.assert_close(found.scale * found.bias, 2.0 * bias)


BLOCKS = 3
KINDS: dict[str, tuple[int, int]] = {"self_attn.q_proj": (24, 16), "self_attn.v_proj": (8, 16), "mlp.up_proj": (40, 16)}


def blocks_of(kind: str, *numbers: int) -> dict[str, tuple[int, int]]:
    return {f"model.layers.{number}.{kind}": KINDS[kind] for number in numbers}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    shapes = {name: shape for kind in KINDS for name, shape in blocks_of(kind, *range(BLOCKS)).items()}
    return Checkpoint.open(tiny.tiny_pair(tmp_path_factory.mktemp("deep"), shapes=shapes)[0])


Q_AND_V = {**blocks_of("self_attn.q_proj", 0, 1, 2), **blocks_of("self_attn.v_proj", 0, 1, 2)}
UPLOADS: dict[str, tuple[dict[str, tuple[int, int]], tuple[str, ...]]] = {
    "whole": (Q_AND_V, ("0.mlp.up_proj", "2.mlp.up_proj")),
    "up to where it reached": (
        blocks_of("self_attn.q_proj", 0),
        ("0.mlp.up_proj", "1.self_attn.q_proj", "2.mlp.up_proj", "2.self_attn.q_proj"),
    ),
    "with gaps of its own": (blocks_of("self_attn.q_proj", 0, 2), ()),
    "unknown to TGI": ({**Q_AND_V, "model.layers.0.mlp.router": (4, 16)}, ()),
}


@pytest.mark.parametrize("upload", UPLOADS)
def test_a_patch_on_some_blocks_is_filled_up_for_tgi(tmp_path: Path, deep: Checkpoint, upload: str) -> None:
    """Where TGI took the upload, and only there; the zeros add exactly nothing and have a verdict."""
    shapes, zeros = UPLOADS[upload]
    made = tiny.adapter(shapes)
    uploaded = read_adapter(tiny.write_adapter_files(tmp_path / "in", tiny.adapter_tensors(made), made.config))
    patch = tiny.adapter(blocks_of("mlp.up_proj", 1), rank=2, seed=60)
    extra = {name: torch.ones(shape) for name, shape in shapes.items() if name.endswith("router")}
    context = RepairContext(patch=patch, aligned=deep if not extra else with_weights(deep, extra, tmp_path))

    repaired = repair_adapter(uploaded, METHODS["patch"](), context)

    alone = repair_adapter(uploaded, METHODS["patch"](), RepairContext(patch=patch))
    empty = set(repaired.adapter.names) - set(alone.adapter.names)
    assert empty == {f"model.layers.{name}" for name in zeros}
    for layer in repaired.adapter.layers:
        if layer.name in empty:
            assert not layer.a.any()
            assert not layer.b.any()
        else:
            assert torch.equal(layer.a, alone.adapter.by_name[layer.name].a)
            assert torch.equal(layer.b, alone.adapter.by_name[layer.name].b)
    assert {one.name for one in repaired.verdicts if "zeros" in one.reason} == empty
    assert [one.name for one in repaired.verdicts] == list(repaired.adapter.names)
    write_adapter(repaired.adapter, tmp_path / "out")
    assert lost(uploaded, read_adapter(tmp_path / "out")) == []
    write_adapter(alone.adapter, tmp_path / "alone")
    left = lost(uploaded, read_adapter(tmp_path / "alone"))
    assert [one["engine"] for one in left] == (["tgi"] if zeros else [])
    assert any("TGI will leave out" in note for note in alone.notes) == bool(zeros)


def with_weights(aligned: Checkpoint, extra: dict[str, torch.Tensor], folder: Path) -> Checkpoint:
    """The model with more modules."""
    own = {f"{name}.weight": aligned.weight(name) for name in aligned.modules}
    more = {f"{name}.weight": tensor for name, tensor in extra.items()}
    return Checkpoint.open(tiny.write_checkpoint(folder / "model", own | more))


def test_nothing_is_filled_up_that_zeros_do_not_help(tmp_path: Path, deep: Checkpoint) -> None:
    """A model that has no such module in some block stays with its gaps, and the report says so."""
    kept = [name for name in deep.modules if name != "model.layers.0.mlp.up_proj"]
    lacking = Checkpoint.open(
        tiny.write_checkpoint(tmp_path / "model", {f"{name}.weight": deep.weight(name) for name in kept})
    )
    uploaded, patch = tiny.adapter(Q_AND_V), tiny.adapter(blocks_of("mlp.up_proj", 1), seed=60)

    repaired = repair_adapter(uploaded, METHODS["patch"](), RepairContext(patch=patch, aligned=lacking))

    assert set(repaired.adapter.names) == {*Q_AND_V, "model.layers.1.mlp.up_proj"}
    write_adapter(repaired.adapter, tmp_path / "out")
    assert [one["engine"] for one in lost(uploaded, read_adapter(tmp_path / "out"))] == ["tgi"]


def test_a_patch_may_not_bring_what_engines_refuse() -> None:
    """An output shift, where the adapter had none."""
    patch = LoraAdapter(layers=(tiny.layer(UP, bias=torch.ones(97)),))

    with pytest.raises(UnsupportedAdapter, match="lora_bias") as caught:
        repair_adapter(adapter(), METHODS["patch"](), RepairContext(patch=patch))

    assert caught.value.field == UP
