"""Whole tensors that travel with an adapter: refused, dropped, reverted or mixed, and PEFT loads what is left."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from repair.__main__ import main
from repair.adapter_file import read_adapter, write_adapter
from repair.checkpoint import Checkpoint
from repair.context import RepairContext
from repair.errors import BadParameters, MissingReference, ShapeMismatch, UnsupportedAdapter
from repair.lora import ExtraKind
from repair.methods import METHODS
from repair.run import Repaired, repair_adapter
from repair.treatment import Replacements
from tests import tiny
from tests.repair import families

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*"),
]
WEIGHTS = "adapter_model.safetensors"
TOKENS = [3, 5, 60]
LAYOUTS: dict[str, dict[str, Any]] = {
    "module": {"modules_to_save": ["lm_head"]},
    "norm": {"modules_to_save": ["model.norm", "input_layernorm"]},
    "biases": {"bias": "all"},
    "own biases": {"bias": "lora_only"},
    "tokens": {"trainable_token_indices": TOKENS},
    "named tokens": {"trainable_token_indices": {"embed_tokens": TOKENS}},
}
KINDS = {"module": ExtraKind.MODULE, "norm": ExtraKind.MODULE}
KINDS |= {"biases": ExtraKind.BIAS, "own biases": ExtraKind.BIAS}
KINDS |= {"tokens": ExtraKind.TOKENS, "named tokens": ExtraKind.TOKENS}


@pytest.fixture(scope="module")
def model() -> Any:
    return families.model("qwen2")


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return families.folder("qwen2", tmp_path_factory.mktemp("aligned"), shards=2)


def repaired(source: Path, aligned: Path | None, how: str, strength: float = 0.5) -> Repaired:
    context = RepairContext(
        aligned=None if aligned is None else Checkpoint.open(aligned), replacements=Replacements.parse(how)
    )
    return repair_adapter(read_adapter(source), METHODS["scale"].parse({"strength": strength}), context)


@torch.no_grad()
def with_replaced(model: Any, folder: Path, share: float) -> Any:
    """The model with the tensors of the file mixed into its own, by hand."""
    changed = copy.deepcopy(model)
    own = dict(changed.named_parameters())
    for key, value in load_file(folder / WEIGHTS).items():
        name = key.removeprefix("base_model.model.").replace(".base_layer.", ".")
        if ".lora_" in key:
            continue
        if name.endswith("trainable_tokens_delta"):
            place = own["model.embed_tokens.weight"].data
            place[TOKENS] = (1 - share) * place[TOKENS] + share * value
        else:
            own[name].data.copy_((1 - share) * own[name].data + share * value)
    return changed


SHARES = {"drop": 0.0, "revert": 0.0, "interpolate=0.3": 0.3, "interpolate": 0.5, "interpolate=1": 1.0}


@pytest.mark.parametrize("how", SHARES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_treatment_is_what_it_says(model: Any, aligned: Path, tmp_path: Path, layout: str, how: str) -> None:
    """PEFT loads what was written without a stray key, and says what the mixed weights say."""
    before = families.trained(model, tmp_path / "in", target_modules=["q_proj", "v_proj"], **LAYOUTS[layout])
    uploaded = read_adapter(tmp_path / "in")
    assert {extra.kind for extra in uploaded.extras} == {KINDS[layout]}
    close(families.dense_logits(with_replaced(model, tmp_path / "in", 1.0), uploaded), before)

    found = repaired(tmp_path / "in", aligned, how)
    write_adapter(found.adapter, tmp_path / "out")

    wanted = families.dense_logits(with_replaced(model, tmp_path / "in", SHARES[how]), found.adapter)
    close(families.logits(families.loaded(model, tmp_path / "out")), wanted)
    keys = {extra.key for extra in read_adapter(tmp_path / "out").extras}
    assert keys == (set() if how == "drop" else {extra.key for extra in uploaded.extras})
    assert found.changed
    assert sum(any(extra.key in note for note in found.notes) for extra in uploaded.extras) == len(uploaded.extras)


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_unless_told_what_to_do_they_are_refused(model: Any, aligned: Path, tmp_path: Path, layout: str) -> None:
    """By name, with what can be done; a reference does not change that."""
    families.trained(model, tmp_path / "in", target_modules=["q_proj"], **LAYOUTS[layout])

    for folder in (None, aligned):
        with pytest.raises(UnsupportedAdapter, match="drop, revert or interpolate") as caught:
            repaired(tmp_path / "in", folder, "refuse")
        assert caught.value.field in {extra.key for extra in read_adapter(tmp_path / "in").extras}


def test_what_replaces_nothing_is_left_out_without_asking(tmp_path: Path, aligned: Path, model: Any) -> None:
    """PEFT saves the base weights of adapted embeddings along: they are the model's own."""
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=3, target_modules=["embed_tokens", "lm_head"]))
    adapted.peft_config["default"].base_model_name_or_path = "tiny/model"
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(tmp_path / "in", save_embedding_layers=True)
    assert len(read_adapter(tmp_path / "in").extras) == 2

    found = repaired(tmp_path / "in", aligned, "refuse", strength=1.0)
    write_adapter(found.adapter, tmp_path / "out")

    assert not found.adapter.extras
    assert sum("the aligned model's own" in note for note in found.notes) == 2
    close(families.logits(families.loaded(model, tmp_path / "out")), families.logits(adapted))
    with pytest.raises(UnsupportedAdapter):  # nobody can tell without the model
        repaired(tmp_path / "in", None, "refuse")


def test_reverting_needs_a_model_that_has_the_tensor(model: Any, aligned: Path, tmp_path: Path) -> None:
    """An error that says so; dropping needs none."""
    families.trained(model, tmp_path / "in", target_modules=["q_proj"], modules_to_save=["lm_head"])
    tensors = load_file(tmp_path / "in" / WEIGHTS)
    tensors["base_model.model.lm_head.weight"] = torch.ones(66, 32)  # two tokens more
    config = json.loads((tmp_path / "in" / "adapter_config.json").read_text())
    tiny.write_adapter_files(tmp_path / "grown", tensors, config)

    with pytest.raises(MissingReference):
        repaired(tmp_path / "in", None, "revert")
    with pytest.raises(ShapeMismatch, match="only be dropped"):
        repaired(tmp_path / "grown", aligned, "interpolate=0.5")
    assert not repaired(tmp_path / "grown", None, "drop").adapter.extras


@pytest.mark.parametrize("text", ["keep", "drop=0.5", "interpolate=2", "interpolate=-1", "interpolate=x", ""])
def test_a_treatment_that_does_not_exist_is_an_error(text: str) -> None:
    """Named as the parameter that it is."""
    with pytest.raises(BadParameters) as caught:
        Replacements.parse(text)
    assert caught.value.field == "replacements"


def test_from_the_command_line(model: Any, aligned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Interpolated, with a note for each; and what serves the result."""
    families.trained(model, tmp_path / "in", target_modules=["q_proj"], bias="lora_only")
    words = ["repair", tmp_path / "in", "--aligned", aligned, "--method", "scale", "--replacements", "interpolate=0.25"]

    code = main([*map(str, words), "--out", str(tmp_path / "out"), "--json"])
    torch.use_deterministic_algorithms(mode=False)

    said = json.loads(capsys.readouterr().out)
    assert code == 0
    assert any("interpolated, 0.25 of the upload" in note for note in said["notes"])
    taken = {one["engine"]: one["taken"] for one in said["serving"]["output"]}
    assert taken == {"vllm": "no", "sglang": "altered", "tgi": "altered", "llama.cpp": "no"}
    assert said["serving"]["lost"] == []
