"""Every family and every layout that PEFT can write: read, repaired, written, and loaded again without a stray key."""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gate.admission import admit
from gate.errors import Refused, Rule
from gate.model import model_shapes
from repair.__main__ import main
from repair.adapter_file import read_adapter, write_adapter
from repair.checkpoint import Checkpoint
from repair.checks.arms import adapter_hooks
from repair.context import RepairContext
from repair.lora import LoraAdapter
from repair.methods import METHODS
from repair.run import repair_adapter
from tests import tiny
from tests.repair import dense, families

pytestmark = [
    pytest.mark.usefixtures("threads"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*lora_bias=True.*"),
    pytest.mark.filterwarnings("ignore:.*lora_B.bias.*"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*"),
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module.*"),  # it does not look at parameters
]
LAYOUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {},
    "dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True},
    "one block": {"layers_to_transform": [1]},
}
EMBEDDINGS = {"llama": ["embed_tokens", "lm_head"], "llama-tied": ["embed_tokens", "lm_head"], "gpt2": ["wte", "c_fc"]}
EMBEDDINGS |= {"gemma": ["embed_tokens", "q_proj"], "phi": ["embed_tokens", "lm_head"]}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A model of one family before and after alignment, in memory and on disk, and the context of a repair."""

    family: str
    model: Any
    aligned: Path
    base: Path

    @property
    def context(self) -> RepairContext:
        return RepairContext(aligned=Checkpoint.open(self.aligned), base=Checkpoint.open(self.base))

    @property
    def experts(self) -> dict[str, Any]:
        """What else there is to adapt."""
        return {"target_parameters": families.PARAMETERS} if self.family in families.FUSED else {}

    def config(self, layout: str) -> dict[str, Any]:
        turned: dict[str, Any] = {"fan_in_fan_out": True} if self.family == "gpt2" else {}
        targets = families.TARGETS[self.family]
        if layout == "patterns":
            turned |= {"rank_pattern": {targets[0]: 7}, "alpha_pattern": {r".*\.1\..*": 9}}
        return {"target_modules": targets, **turned, **LAYOUTS[layout]}


Pairs = Callable[[str], Pair]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    """Pairs are made once; the base lies in three shards."""
    known: dict[str, Pair] = {}

    def pair(family: str) -> Pair:
        if family not in known:
            place = tmp_path_factory.mktemp(family)
            aligned = families.folder(family, place / "aligned")
            base = families.folder(family, place / "base", seed=1, shards=3)
            known[family] = Pair(family=family, model=families.model(family), aligned=aligned, base=base)
        return known[family]

    return pair


def close(found: Tensor, wanted: Tensor) -> None:
    """The promise: 1e-5 in float32."""
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def written(pair: Pair, source: Path, out: Path, method: str = "scale", **parameters: Any) -> Tensor:
    """Repair, write, load with PEFT: what it says there, held against our own sum of the repaired layers."""
    admit(source, shapes=model_shapes(pair.aligned))
    uploaded = read_adapter(source)
    repaired = repair_adapter(uploaded, METHODS[method].parse(parameters), pair.context)
    write_adapter(repaired.adapter, out)
    admit(out, shapes=model_shapes(pair.aligned))
    said = families.logits(families.loaded(pair.model, out))
    close(said, families.dense_logits(pair.model, repaired.adapter))
    return said


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", families.MODELS)
def test_what_peft_wrote_is_what_we_read(pairs: Pairs, tmp_path: Path, family: str, layout: str) -> None:
    """The adapter of PEFT, our sum over the layers that we read, and what we write at strength 1 and 0.5."""
    pair = pairs(family)
    before = families.trained(pair.model, tmp_path / "in", **pair.config(layout))
    plain = families.logits(pair.model)
    assert not torch.allclose(before, plain, atol=1e-2)

    found = read_adapter(tmp_path / "in")
    close(families.dense_logits(pair.model, found), before)
    with adapter_hooks(pair.model, found):
        close(families.logits(pair.model), before)
    write_adapter(found, tmp_path / "same")
    close(families.logits(families.loaded(pair.model, tmp_path / "same")), before)
    half = written(pair, tmp_path / "in", tmp_path / "half", strength=0.5)
    assert not torch.allclose(half, before, atol=1e-3)
    nothing = written(pair, tmp_path / "in", tmp_path / "nothing", strength=0.0)
    close(nothing, plain)


METHODS_TRIED: dict[str, dict[str, Any]] = {
    "safe_lora": {"threshold": 1.0},
    "splora": {"count": 2},
    "resta": {"rank": 2},
    "spectral": {},
    "s3lora": {"count": 2},
}


@pytest.mark.parametrize("method", METHODS_TRIED)
@pytest.mark.parametrize("family", families.MODELS)
def test_methods_work_on_every_family(pairs: Pairs, tmp_path: Path, family: str, method: str) -> None:
    """With both checkpoints, one of them sharded; the file says what was computed."""
    pair = pairs(family)
    before = families.trained(pair.model, tmp_path / "in", **pair.config("plain"), **pair.experts)

    after = written(pair, tmp_path / "in", tmp_path / "out", method, **METHODS_TRIED[method])

    assert not torch.allclose(after, before, atol=1e-4)


@pytest.mark.parametrize("family", families.MODELS)
def test_safe_lora_is_its_definition_on_every_module(pairs: Pairs, tmp_path: Path, family: str) -> None:
    """``C D`` with the operator of the weights that the *model* holds, fused experts and turned weights included."""
    pair = pairs(family)
    families.trained(pair.model, tmp_path / "in", **pair.config("plain"), **pair.experts)
    uploaded = read_adapter(tmp_path / "in")

    repaired = repair_adapter(uploaded, METHODS["safe_lora"].parse({"threshold": 1.0}), pair.context).adapter

    other = families.model(family, seed=1)
    for layer in uploaded.layers:
        v = families.matrix(pair.model, layer) - families.matrix(other, layer)
        wanted = dense.published_operator(v) @ dense.delta(layer)
        assert dense.relative(dense.delta(repaired.by_name[layer.name]), wanted) < 1e-4, layer.name


@pytest.mark.parametrize("family", families.MODELS)
def test_a_patch_is_added_exactly(pairs: Pairs, tmp_path: Path, family: str) -> None:
    """A second adapter of the same family, on other blocks and ranks."""
    pair = pairs(family)
    families.trained(pair.model, tmp_path / "in", **pair.config("plain"), **pair.experts)
    families.trained(pair.model, tmp_path / "patch", **pair.config("one block"), r=2)

    written(pair, tmp_path / "in", tmp_path / "out", "patch", patch=str(tmp_path / "patch"), strength=0.7)

    layers, patch = read_adapter(tmp_path / "in").by_name, read_adapter(tmp_path / "patch").by_name
    for layer in read_adapter(tmp_path / "out").layers:
        parts = [dense.delta(layers[layer.name])] if layer.name in layers else []
        parts += [0.7 * dense.delta(patch[layer.name])] if layer.name in patch else []
        assert dense.relative(dense.delta(layer), torch.stack(parts).sum(0)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_number_formats(pairs: Pairs, tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    """What was uploaded in 16 bits is computed in 32 and leaves in 16."""
    pair = pairs(family)
    before = families.trained(pair.model, tmp_path / "in", dtype=dtype, **pair.config("plain"), **pair.experts)

    found = read_adapter(tmp_path / "in")
    assert {layer.dtype for layer in found.layers} == {dtype}
    close(families.dense_logits(pair.model, found), before)
    repaired = repair_adapter(found, METHODS["scale"].parse({"strength": 0.5}), pair.context)
    export = write_adapter(repaired.adapter, tmp_path / "out")
    again = read_adapter(tmp_path / "out")
    assert {layer.dtype for layer in again.layers} == {dtype}
    for layer in again.layers:
        error = dense.relative(dense.delta(layer), dense.delta(repaired.adapter.by_name[layer.name]))
        assert error <= export.rounding[layer.name] * 1.01 + 1e-7
    said = families.logits(families.loaded(pair.model, tmp_path / "out"))
    close(said, families.dense_logits(pair.model, again))


@pytest.mark.parametrize("family", EMBEDDINGS)
def test_embeddings_and_heads(pairs: Pairs, tmp_path: Path, family: str) -> None:
    """Adapted words and heads, tied ones among them, where each of the two has factors of its own."""
    pair = pairs(family)
    config = {**pair.config("plain"), "target_modules": EMBEDDINGS[family]}
    before = families.trained(pair.model, tmp_path / "in", **config)

    found = read_adapter(tmp_path / "in")
    close(families.dense_logits(pair.model, found), before)
    written(pair, tmp_path / "in", tmp_path / "half", strength=0.5)
    written(pair, tmp_path / "in", tmp_path / "safe", "safe_lora", threshold=1.0)


FUSED_LAYOUTS: dict[str, dict[str, Any]] = {
    "both": {"target_parameters": families.PARAMETERS},
    "one": {"target_parameters": ["experts.down_proj"]},
    "experts alone": {"target_parameters": families.PARAMETERS, "target_modules": []},
    "rslora": {"target_parameters": families.PARAMETERS, "use_rslora": True},
    "patterns": {
        "target_parameters": families.PARAMETERS,
        "rank_pattern": {"experts.gate_up_proj": 2, "q_proj": 5},
        "alpha_pattern": {r".*\.1\.mlp\.experts\.down_proj": 11, r".*\.1\.feed_forward\.experts\.down_proj": 11},
    },
    "one block": {"target_parameters": ["layers.1.mlp.experts.down_proj", "layers.1.feed_forward.experts.down_proj"]},
}


@pytest.mark.parametrize("layout", FUSED_LAYOUTS)
@pytest.mark.parametrize("family", families.FUSED)
def test_fused_experts(pairs: Pairs, tmp_path: Path, family: str, layout: str) -> None:
    """Each expert is a layer of its own, whatever the model class makes of the order of its sides."""
    pair = pairs(family)
    config = {**pair.config("plain"), **FUSED_LAYOUTS[layout]}
    if "alpha_pattern" in config:  # PEFT warns of a pattern that matches nothing
        place = "feed_forward" if family == "llama4" else "mlp"
        config["alpha_pattern"] = {key: value for key, value in config["alpha_pattern"].items() if place in key}
    before = families.trained(pair.model, tmp_path / "in", **config)

    found = read_adapter(tmp_path / "in")
    experts = [layer for layer in found.layers if layer.slot is not None]
    assert len(experts) == {"one": 8, "one block": 4}.get(layout, 16)
    close(families.dense_logits(pair.model, found), before)
    assert not torch.allclose(before, families.logits(pair.model), atol=1e-2)
    with adapter_hooks(pair.model, found):
        close(families.logits(pair.model), before)
    half = written(pair, tmp_path / "in", tmp_path / "half", strength=0.5)
    assert not torch.allclose(half, before, atol=1e-4)
    nothing = written(pair, tmp_path / "in", tmp_path / "nothing", strength=0.0)
    close(nothing, families.logits(pair.model))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_a_router_is_adapted_as_the_parameter_that_it_became(pairs: Pairs, tmp_path: Path, family: str) -> None:
    """Once a linear called gate; PEFT targets its weight now, and Mixtral's files know it by another path."""
    pair = pairs(family)
    before = families.trained(pair.model, tmp_path / "in", target_modules=["q_proj", "gate"])
    found = read_adapter(tmp_path / "in")

    assert [layer.name for layer in found.layers if layer.slot is not None] == [
        f"model.layers.{block}.mlp.gate" for block in range(2)
    ]
    close(families.dense_logits(pair.model, found), before)
    with adapter_hooks(pair.model, found):
        close(families.logits(pair.model), before)
    for method, parameters in {"scale": {"strength": 0.5}, "safe_lora": {"threshold": 1.0}}.items():
        after = written(pair, tmp_path / "in", tmp_path / f"by {method}", method, **parameters)
        assert not torch.allclose(after, before, atol=1e-4)


def test_a_measured_model_is_left_as_it_was(pairs: Pairs, tmp_path: Path) -> None:
    """The very parameters, and bit for bit what it said, also when something breaks inside."""
    pair = pairs("qwen3_moe")
    families.trained(pair.model, tmp_path / "in", target_modules=["q_proj"], target_parameters=families.PARAMETERS)
    adapter, plain = read_adapter(tmp_path / "in"), families.logits(pair.model)
    before = {name: id(parameter) for name, parameter in pair.model.named_parameters()}

    with adapter_hooks(pair.model, adapter):
        assert not torch.equal(families.logits(pair.model), plain)
    with pytest.raises(ZeroDivisionError), adapter_hooks(pair.model, adapter):
        raise ZeroDivisionError

    assert {name: id(parameter) for name, parameter in pair.model.named_parameters()} == before
    assert torch.equal(families.logits(pair.model), plain)


APART = {"qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"), "mixtral": ("block_sparse_moe", "w1", "w3", "w2")}


@pytest.mark.parametrize("family", APART)
def test_experts_that_are_spelt_one_by_one(pairs: Pairs, tmp_path: Path, family: str) -> None:
    """As they were before model classes fused them: PEFT fuses such a file when it loads it, and we do not."""
    pair = pairs(family)
    place, gate, up, down = APART[family]
    shapes = {
        f"model.layers.{block}.{place}.experts.{expert}.{name}": shape
        for block in range(2)
        for expert in range(4)
        for name, shape in ((gate, (24, 32)), (up, (24, 32)), (down, (32, 24)))
    }
    shapes |= {f"model.layers.{block}.self_attn.q_proj": (32, 32) for block in range(2)}
    made = tiny.adapter(shapes)
    config = {**made.config, "target_modules": ["q_proj", gate, up, down], "base_model_name_or_path": "tiny/model"}
    tiny.write_adapter_files(tmp_path / "in", tiny.adapter_tensors(made), config)

    admit(tmp_path / "in", shapes=model_shapes(pair.aligned))
    before = families.logits(families.loaded(pair.model, tmp_path / "in"))
    found = read_adapter(tmp_path / "in")
    assert found.names == made.names
    close(fused_logits(pair.model, found, APART[family]), before)
    with adapter_hooks(pair.model, found):
        close(families.logits(pair.model), before)
    for method, parameters in {"scale": {"strength": 0.5}, "safe_lora": {"threshold": 1.0}}.items():
        repaired = repair_adapter(found, METHODS[method].parse(parameters), pair.context)
        write_adapter(repaired.adapter, tmp_path / method)
        said = families.logits(families.loaded(pair.model, tmp_path / method))
        close(said, fused_logits(pair.model, repaired.adapter, APART[family]))
        assert not torch.allclose(said, before, atol=1e-4)


@torch.no_grad()
def fused_logits(model: Any, adapter: LoraAdapter, spelling: tuple[str, str, str, str]) -> Tensor:
    """Rows of the gate above those of the other, in the fused weights that the model holds."""
    changed = copy.deepcopy(model)
    _, gate, up, down = spelling
    for layer in adapter.layers:
        home, _, name = layer.name.rpartition(".")
        if name == "q_proj":
            families.merge(changed, layer)
            continue
        block, expert = int(home.split(".")[2]), int(home.rpartition(".")[2])
        experts = changed.model.layers[block].mlp.experts
        half = experts.gate_up_proj.shape[1] // 2
        rows = {gate: experts.gate_up_proj[expert, :half], up: experts.gate_up_proj[expert, half:]}
        rows[down] = experts.down_proj[expert]
        rows[name].copy_((rows[name].double() + dense.delta(layer)).float())
    return families.logits(changed)


@pytest.mark.parametrize("family", families.MODELS)
def test_from_the_command_line(pairs: Pairs, tmp_path: Path, family: str, capsys: pytest.CaptureFixture[str]) -> None:
    """`repair --method scale` and `inspect` on an adapter of each family, as a user's shell meets them."""
    pair = pairs(family)
    before = families.trained(pair.model, tmp_path / "in", **pair.config("plain"), **pair.experts)
    words = ["--aligned", pair.aligned, "--base", pair.base, "--method", "scale", "--set", "strength=0.5"]

    codes = [main(["inspect", str(tmp_path / "in"), "--json"])]
    inspected = json.loads(capsys.readouterr().out)
    codes.append(main(["repair", str(tmp_path / "in"), *map(str, words), "--out", str(tmp_path / "out"), "--json"]))
    torch.use_deterministic_algorithms(mode=False)
    said = json.loads(capsys.readouterr().out)

    assert codes == [0, 0]
    assert said["summary"] == {"scaled": len(read_adapter(tmp_path / "in").layers)}
    assert said["serving"]["input"] == inspected["serving"]
    assert said["serving"]["lost"] == []
    after = families.logits(families.loaded(pair.model, tmp_path / "out"))
    assert not torch.allclose(after, before, atol=1e-4)
    close(after, families.dense_logits(pair.model, read_adapter(tmp_path / "out")))


TIED = {"both": ["embed_tokens", "lm_head"], "words": ["embed_tokens", "q_proj"]}


@pytest.mark.parametrize("targets", TIED)
def test_a_tied_head_follows_the_embedding(pairs: Pairs, tmp_path: Path, targets: str) -> None:
    """PEFT writes one update twice, turned over: whatever a method does to one is done to the other."""
    pair = pairs("llama-tied")
    config: dict[str, Any] = {"target_modules": TIED[targets], "ensure_weight_tying": True}
    before = families.trained(pair.model, tmp_path / "in", **config)
    found = read_adapter(tmp_path / "in")
    close(families.dense_logits(pair.model, found), before)
    families.trained(pair.model, tmp_path / "patch", target_modules=["embed_tokens"], r=2)

    tries: dict[str, dict[str, Any]] = {
        "scale": {"strength": 0.5},
        "safe_lora": {"threshold": 1.0},
        "patch": {"patch": str(tmp_path / "patch")},
    }
    for method, parameters in tries.items():
        after = written(pair, tmp_path / "in", tmp_path / f"by {method}", method, **parameters)
        assert not torch.allclose(after, before, atol=1e-4)
        tensors = load_file(tmp_path / f"by {method}" / "adapter_model.safetensors")
        head, words = "base_model.model.lm_head.", "base_model.model.model.embed_tokens."
        assert torch.equal(tensors[f"{head}lora_A.weight"], tensors[f"{words}lora_embedding_B"].T)
        assert torch.equal(tensors[f"{head}lora_B.weight"], tensors[f"{words}lora_embedding_A"].T)
    for layer in read_adapter(tmp_path / "by safe_lora").layers:
        if layer.name.endswith("embed_tokens"):
            v = families.matrix(pair.model, layer) - families.matrix(families.model("llama-tied", 1), layer)
            wanted = dense.published_operator(v) @ dense.delta(found.by_name[layer.name])
            assert dense.relative(dense.delta(layer), wanted) < 1e-4
    untouched = repair_adapter(found, METHODS["scale"].parse({"strength": 1.0}), pair.context)
    assert not untouched.changed
    assert [verdict.name for verdict in untouched.verdicts] == sorted(found.names)


def test_a_head_that_only_says_that_it_is_tied_is_refused(pairs: Pairs, tmp_path: Path) -> None:
    """Engines would differ in which of the two they serve."""
    pair = pairs("llama-tied")
    config: dict[str, Any] = {"target_modules": TIED["both"], "ensure_weight_tying": True}
    families.trained(pair.model, tmp_path / "in", **config)
    tensors = load_file(tmp_path / "in" / "adapter_model.safetensors")
    written_config = json.loads((tmp_path / "in" / "adapter_config.json").read_text())
    key = "base_model.model.lm_head.lora_B.weight"
    other = {**tensors, key: tensors[key] * 1.5}
    alone = {name: tensor for name, tensor in tensors.items() if "lm_head" not in name}

    for name, made, field in (("other", other, key), ("alone", alone, "ensure_weight_tying")):
        with pytest.raises(Refused) as refused:
            admit(tiny.write_adapter_files(tmp_path / name, made, written_config))
        assert refused.value.field == field
        assert refused.value.rule is Rule.UNSUPPORTED_LAYOUT
