"""Whole tensors on a loaded model: what is measured is what PEFT makes of the files, and nothing stays behind."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from repair.adapter_file import read_adapter
from repair.checkpoint import Checkpoint
from repair.checks.arms import adapter_hooks, mixable, mixed_hooks
from repair.checks.errors import ArmUnsupported
from repair.checks.settling import settle
from repair.errors import UnsupportedAdapter
from repair.lora import LoraAdapter
from repair.treatment import Replacements
from tests import tiny
from tests.repair import families

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*"),
]
TOKENS = [3, 5, 60]
LAYOUTS: dict[str, dict[str, Any]] = {
    "module": {"modules_to_save": ["lm_head"]},
    "words": {"modules_to_save": ["embed_tokens", "norm"]},
    "biases": {"bias": "all"},
    "own biases": {"bias": "lora_only"},
    "tokens": {"trainable_token_indices": TOKENS},
}


def tied(model: Any) -> Any:
    """The same model with one matrix for words and head."""
    made = copy.deepcopy(model)
    made.config.tie_word_embeddings = True
    made.lm_head.weight = made.model.embed_tokens.weight
    return made


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    plain = families.model("qwen2")
    return {"apart": plain, "tied": tied(plain)}


def said(model: Any, adapter: LoraAdapter | None) -> torch.Tensor:
    with torch.no_grad(), adapter_hooks(model, adapter):
        return families.logits(model)


@pytest.mark.parametrize("how", ["drop", "revert", "interpolate=0.3"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["apart", "tied"])
def test_what_is_measured_is_what_peft_loads(
    models: dict[str, Any], tmp_path: Path, kind: str, layout: str, how: str
) -> None:
    """The settled files on a model by PEFT and by our hooks: the same logits; afterwards the model is itself."""
    model = models[kind]
    model.save_pretrained(tmp_path / "aligned")
    families.trained(model, tmp_path / "in", target_modules=["q_proj", "v_proj"], **LAYOUTS[layout])
    before, alone = dict(model.named_parameters()), said(model, None)

    upload, aligned = read_adapter(tmp_path / "in"), Checkpoint.open(tmp_path / "aligned")
    found = settle(upload, Replacements.parse(how), aligned, tmp_path / "out")

    assert found is not None
    assert [one["key"] for one in found.tensors] == [extra.key for extra in upload.extras]
    wanted = families.logits(families.loaded(model, tmp_path / "out"))
    torch.testing.assert_close(said(model, found.adapter), wanted, rtol=1e-5, atol=1e-5)
    assert {name: id(one) for name, one in model.named_parameters()} == {name: id(one) for name, one in before.items()}
    assert torch.equal(said(model, None), alone)
    left = {extra.key for extra in found.adapter.extras}
    assert left == (set() if how == "drop" else {extra.key for extra in upload.extras})


def test_what_nobody_settled_is_never_put_on_in_silence(models: dict[str, Any], tmp_path: Path) -> None:
    """Alone or in a batch with others; a settled one takes its turn, for a parameter is for every row."""
    model = models["apart"]
    model.save_pretrained(tmp_path / "aligned")
    families.trained(model, tmp_path / "in", target_modules=["q_proj"], modules_to_save=["lm_head"])
    upload, aligned = read_adapter(tmp_path / "in"), Checkpoint.open(tmp_path / "aligned")
    assert settle(upload, Replacements(), aligned, tmp_path / "none") is None
    with pytest.raises(ArmUnsupported, match="whole tensor"), adapter_hooks(model, upload):
        pass
    found = settle(upload, Replacements.parse("interpolate=1"), aligned, tmp_path / "out")
    assert found is not None
    assert not mixable(model, [None, found.adapter])
    with pytest.raises(ArmUnsupported, match="every row"), mixed_hooks(model, [None, found.adapter]):
        pass


def test_a_tensor_that_cannot_be_put_back_is_a_fact_about_the_upload(models: dict[str, Any], tmp_path: Path) -> None:
    """Named by the tensor; dropping it is always possible."""
    models["apart"].save_pretrained(tmp_path / "aligned")
    families.trained(models["apart"], tmp_path / "in", target_modules=["q_proj"], modules_to_save=["lm_head"])
    tensors = load_file(tmp_path / "in" / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.weight"] = torch.ones(66, 32)  # two tokens more
    config = json.loads((tmp_path / "in" / "adapter_config.json").read_text())
    tiny.write_adapter_files(tmp_path / "grown", tensors, config)
    grown, aligned = read_adapter(tmp_path / "grown"), Checkpoint.open(tmp_path / "aligned")

    with pytest.raises(UnsupportedAdapter, match="only be dropped") as caught:
        settle(grown, Replacements.parse("revert"), aligned, tmp_path / "no")
    assert caught.value.field == "base_model.model.lm_head.weight"
    dropped = settle(grown, Replacements.parse("drop"), aligned, tmp_path / "out")
    assert dropped is not None
    assert dropped.adapter.extras == ()
