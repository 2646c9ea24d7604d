"""Every layout fact of an adapter folder: read as PEFT means it, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from gate.errors import Refused
from repair.adapter_file import read_adapter, write_adapter
from repair.context import RepairContext
from repair.errors import NotRepresentable, OutputExists, RepairError, UnsupportedAdapter
from repair.layout import refuse_config
from repair.lora import ExtraKind, LayerKind, LoraAdapter, concatenate
from repair.methods import METHODS
from repair.run import repair_adapter
from repair.treatment import Replacements
from tests import tiny
from tests.repair import dense

UP = "model.layers.0.mlp.up_proj"


def written(directory: Path, made: LoraAdapter | None = None, **keys: Any) -> Path:
    made = made or tiny.adapter()
    return tiny.write_adapter_files(directory, tiny.adapter_tensors(made), {**made.config, **keys})


def refusal(directory: Path) -> dict[str, str]:
    """Why this folder is not read, whoever says so first."""
    try:
        read_adapter(directory)
    except (Refused, UnsupportedAdapter) as error:
        return error.as_dict()
    pytest.fail("the folder was read")


def test_reads_names_factors_and_scale(tmp_path: Path) -> None:
    """Alpha / r, and the module paths of the base model."""
    made = tiny.adapter()

    found = read_adapter(written(tmp_path))

    assert found.names == made.names
    for one, wanted in zip(found.layers, made.layers, strict=True):
        assert torch.equal(one.a, wanted.a)
        assert torch.equal(one.b, wanted.b)
        assert one.scale == 2.0


def test_rslora_changes_only_the_scale(tmp_path: Path) -> None:
    """Alpha / sqrt(r)."""
    found = read_adapter(written(tmp_path, use_rslora=True))

    assert {layer.scale for layer in found.layers} == {6 / 3**0.5}


def test_patterns_give_each_module_its_rank_and_scale(tmp_path: Path) -> None:
    """The first pattern that matches a module's path wins; ranks come from the tensors."""
    made = tiny.adapter()
    wide = tiny.layer(UP, (97, 53), rank=5)
    made = LoraAdapter(layers=tuple(wide if layer.name == UP else layer for layer in made.layers), config=made.config)
    alphas = {r".*\.0\.mlp\.up_proj": 20, "up_proj": 9}
    keys = {"rank_pattern": {r"layers\.0\.mlp\.up_proj": 5}, "alpha_pattern": alphas}

    found = read_adapter(written(tmp_path, made, **keys)).by_name

    assert (found[UP].rank, found[UP].scale) == (5, 4.0)
    assert found["model.layers.1.mlp.up_proj"].scale == 3.0
    assert found["model.layers.1.mlp.down_proj"].scale == 2.0


def test_reads_bias_magnitude_and_embedding(tmp_path: Path) -> None:
    """Each part under its own spelling; embeddings as dim x vocabulary, turned against what is stored."""
    linear = tiny.layer(UP, bias=torch.randn(97), seed=1)
    embedding = tiny.layer("model.embed_tokens", (53, 131), kind=LayerKind.EMBEDDING)
    keys: dict[str, Any] = {"lora_bias": True, "target_modules": ["up_proj", "embed_tokens"]}
    made = LoraAdapter(layers=(linear, embedding), config=tiny.adapter_config(**keys))

    found = read_adapter(written(tmp_path / "a", made)).by_name

    bias = found[UP].bias
    assert bias is not None
    assert linear.bias is not None
    assert torch.equal(bias, linear.bias)
    assert found["model.embed_tokens"].kind is LayerKind.EMBEDDING
    assert found["model.embed_tokens"].transposed
    assert found["model.embed_tokens"].shape == (53, 131)

    dora = LoraAdapter(layers=(tiny.layer(UP, magnitude=torch.rand(97)),), config=tiny.adapter_config(use_dora=True))
    assert read_adapter(written(tmp_path / "b", dora, target_modules=["up_proj"])).uses_dora


def test_fan_in_fan_out_turns_the_base_weight_not_the_factors(tmp_path: Path) -> None:
    """B stays out x rank."""
    found = read_adapter(written(tmp_path, fan_in_fan_out=True))

    assert all(layer.transposed for layer in found.layers)
    assert found.by_name[UP].shape == (97, 53)


def test_order_of_the_file_does_not_matter(tmp_path: Path) -> None:
    """Layers come sorted by name."""
    made = tiny.adapter()
    tensors = dict(reversed(tiny.adapter_tensors(made).items()))
    tiny.write_adapter_files(tmp_path, tensors, made.config)

    assert read_adapter(tmp_path).names == tuple(sorted(made.names))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("peft_type", "LOHA"),
        ("use_qalora", True),
        ("alora_invocation_tokens", [1, 2]),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 3}),
        ("kasa_config", {}),
        ("monteclora_config", {"x": 1}),
        ("layer_replication", [[0, 1]]),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
    ],
)
def test_refuses_by_name_what_it_does_not_repair(tmp_path: Path, key: str, value: Any) -> None:
    """The refusal names the file and the key; an empty value asks for nothing."""
    if not value:
        refuse_config({"peft_type": "LORA", key: value})
        return
    at_the_door = refusal(written(tmp_path, **{key: value}))
    with pytest.raises(UnsupportedAdapter) as here:
        refuse_config({"peft_type": "LORA", key: value})

    for problem in (at_the_door, here.value.as_dict()):
        assert problem["file"] == "adapter_config.json"
        assert problem["field"] == key


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        ("base_model.model.conv.lora_A.weight", (3, 4, 5, 5)),
        ("base_model.model.conv.lora_A.default.weight", (3, 4)),
        ("model.layers.0.lora_A.weight", (3, 4)),
        ("base_model.model.experts.base_layer.lora_A.weight", (3, 4)),
        ("base_model.model.x.lora_embedding_C", (3, 4)),
        ("base_model.model.x.something", (3, 4)),
        ("base_model.model.lonely.lora_A.weight", (3, 4)),
    ],
)
def test_refuses_tensors_it_cannot_place(tmp_path: Path, key: str, shape: tuple[int, ...]) -> None:
    """Never dropped in silence, whichever of gate and reader sees it first."""
    made = tiny.adapter()
    tensors = {**tiny.adapter_tensors(made), key: torch.ones(shape)}

    assert refusal(tiny.write_adapter_files(tmp_path, tensors, made.config))["file"] == "adapter_model.safetensors"


def test_full_replacements_are_listed_then_refused_or_dropped(tmp_path: Path) -> None:
    """They bypass every low-rank repair: refused unless their loss was asked for, and then reported."""
    made = tiny.adapter()
    tensors = {
        **tiny.adapter_tensors(made),
        "base_model.model.lm_head.weight": torch.ones(11, 4),
        f"base_model.model.{UP}.bias": torch.ones(97),
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(2, 4),
    }
    keys = {"modules_to_save": ["lm_head"], "bias": "all", "trainable_token_indices": [1, 2]}
    found = read_adapter(tiny.write_adapter_files(tmp_path / "in", tensors, {**made.config, **keys}))
    half = METHODS["scale"].parse({"strength": 1.0})

    assert {extra.kind for extra in found.extras} == set(ExtraKind)
    with pytest.raises(UnsupportedAdapter) as caught:
        repair_adapter(found, half, RepairContext())
    assert caught.value.field in tensors
    repaired = repair_adapter(found, half, RepairContext(replacements=Replacements.parse("drop")))
    assert repaired.changed
    assert sum(note.startswith("dropped: ") for note in repaired.notes) == 3
    write_adapter(repaired.adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["modules_to_save"], config["bias"], config["trainable_token_indices"]) == (None, "none", None)


def test_unknown_config_keys_are_kept_and_reported(tmp_path: Path) -> None:
    """What we do not understand is the uploader's, not ours to lose."""
    found = read_adapter(written(tmp_path / "in", house_rule={"a": [1]}))

    write_adapter(found, tmp_path / "out")

    assert any("house_rule" in note for note in found.notes)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["house_rule"] == {"a": [1]}


@pytest.mark.parametrize("balanced", [False, True])
def test_export_folds_scales_and_pads_ranks_without_changing_the_update(tmp_path: Path, *, balanced: bool) -> None:
    """Alpha = r, no patterns, one rank; the update of each module is the same."""
    layers = (tiny.layer("x.one", (61, 53), rank=2, scale=0.7), tiny.layer("x.two", (17, 53), rank=5, scale=3.0))
    made = LoraAdapter(layers=layers, config=tiny.adapter_config(use_rslora=True, rank_pattern={"two": 5}))

    export = write_adapter(made, tmp_path, balanced=balanced)
    found = read_adapter(tmp_path)

    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (5, 5, False)
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert export.rank == 5
    for one, wanted in zip(found.layers, made.layers, strict=True):
        assert (one.scale, one.rank) == (1.0, 5)
        assert dense.relative(dense.delta(one), dense.delta(wanted)) < 1e-6


def test_export_keeps_the_number_format_and_measures_what_it_costs(tmp_path: Path) -> None:
    """bfloat16 in, bfloat16 out, and the error of the cast next to it."""
    source = tiny.tiny_adapter_dir(tmp_path / "in", dtype=torch.bfloat16)
    repaired = repair_adapter(read_adapter(source), METHODS["scale"].parse({"strength": 0.7}), RepairContext())

    export = write_adapter(repaired.adapter, tmp_path / "out")

    assert {t.dtype for t in load_file(tmp_path / "out" / "adapter_model.safetensors").values()} == {torch.bfloat16}
    found = read_adapter(tmp_path / "out")
    for one, wanted in zip(found.layers, repaired.adapter.layers, strict=True):
        error = dense.relative(dense.delta(one), dense.delta(wanted))
        assert export.rounding[one.name] == pytest.approx(error, rel=1e-3)
        assert 0 < error < 2**-7


def test_an_update_that_overflows_its_format_is_an_error_not_an_infinity(tmp_path: Path) -> None:
    """Folding 1e5 into float16 would; balanced factors fit, if the update does."""
    big = tiny.layer(UP, scale=1e6, dtype=torch.float16)
    made = LoraAdapter(layers=(big,), config=tiny.adapter_config())

    with pytest.raises(NotRepresentable) as caught:
        write_adapter(made, tmp_path / "out")

    assert caught.value.field == UP
    assert not list(tmp_path.iterdir())
    write_adapter(made, tmp_path / "balanced", balanced=True)


def test_never_overwrites_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    """The uploaded file is evidence."""
    source = written(tmp_path / "in")
    before = (source / "adapter_model.safetensors").read_bytes()

    with pytest.raises(OutputExists):
        write_adapter(tiny.adapter(), source)

    assert (source / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_same_adapter_same_bytes(tmp_path: Path) -> None:
    """Digests are names here."""
    for name in ("one", "two"):
        write_adapter(tiny.adapter(), tmp_path / name)

    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_concatenation_is_the_exact_sum() -> None:
    """I11: different ranks, scales and modules; what one has alone is copied."""
    one = tiny.adapter(scale=0.7)
    names = list(tiny.SHAPES.items())
    two = tiny.adapter(dict([*names[:2], ("model.extra", (7, 9))]), rank=2, seed=30, scale=1.3)

    found = concatenate(one, two)

    for layer in found.layers:
        parts = [dense.delta(a.by_name[layer.name]) for a in (one, two) if layer.name in a.by_name]
        assert dense.relative(dense.delta(layer), torch.stack(parts).sum(0)) < 1e-6
    assert found.by_name["model.extra"] is two.by_name["model.extra"]
    assert found.by_name[names[-1][0]] is one.by_name[names[-1][0]]


def test_concatenation_refuses_what_is_no_plain_lora() -> None:
    """A DoRA patch has no sum."""
    dora = LoraAdapter(layers=(tiny.layer(UP, magnitude=torch.rand(97)),))

    with pytest.raises(UnsupportedAdapter):
        concatenate(tiny.adapter(), dora)
    with pytest.raises(RepairError, match=UP):
        concatenate(tiny.adapter(), LoraAdapter(layers=(tiny.layer(UP, (97, 54)),)))
