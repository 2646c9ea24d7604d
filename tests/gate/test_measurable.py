"""What the door lets through is exactly what can be put on a model: both are asked about adapters that PEFT saved."""

from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

from examples.zoo.hostile import PREFIX
from gate.admission import admit
from gate.errors import Refused, Rule
from gate.measurable import require_measurable, require_plain
from gate.model import model_shapes
from repair.adapter_file import read_adapter
from repair.checks.arms import adapter_hooks
from repair.errors import RepairError
from tests.gate.test_real_peft import LAYOUTS, model
from tests.gate.test_weights_rules import embedding, judged, tensor, with_tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAGNITUDE = "lora_magnitude_vector"
# File, field and what to do instead, for each layout that is refused.
REFUSED = {
    "embeddings": (WEIGHTS, f"{PREFIX}lm_head.base_layer.weight", "save_embedding_layers=False"),
    "modules_to_save": (WEIGHTS, f"{PREFIX}lm_head.weight", "modules_to_save"),
    "biases": (WEIGHTS, f"{PREFIX}model.layers.0.self_attn.k_proj.bias", 'bias="none"'),
    "own biases": (WEIGHTS, f"{PREFIX}model.layers.0.self_attn.q_proj.base_layer.bias", 'bias="none"'),
    "tokens": (WEIGHTS, f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta", "trainable_token_indices"),
}
MORE: dict[str, dict[str, Any]] = {
    "embeddings alone": {"target_modules": ["embed_tokens", "lm_head"]},
    "tied": {"target_modules": ["q_proj"], "ensure_weight_tying": True},
}
EVERY = {name: keys for name, (keys, _) in LAYOUTS.items()} | MORE


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EVERY)
def test_the_door_lets_in_exactly_what_can_be_measured(name: str, tmp_path: Path) -> None:
    """A refusal names file, field, rule and what to do; whatever is let in can be put on the model it is for."""
    model().save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model(), LoraConfig(r=4, lora_alpha=8, **EVERY[name]))
    adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers="auto" if name in LAYOUTS else False)
    admission = admit(tmp_path / "adapter", shapes=model_shapes(tmp_path / "base"))

    if name not in REFUSED:
        require_measurable(admission)
        put_on(tmp_path / "adapter")
        return
    with pytest.raises(Refused) as refused:
        require_measurable(admission)
    require_measurable(admission, settles=True)  # there, a policy has said what becomes of them
    file, field, instead = REFUSED[name]
    assert (refused.value.file, refused.value.field) == (file, field)
    assert refused.value.rule is Rule.UNSUPPORTED_LAYOUT
    assert instead in refused.value.detail
    with pytest.raises(RepairError):
        put_on(tmp_path / "adapter")


def test_dora_is_let_in_only_where_it_has_one_meaning(tmp_path: Path) -> None:
    """PEFT writes neither of these; a file may still say so."""
    both = with_tensors(use_dora=True, lora_bias=True)
    for key, value in list(both.tensors.items()):
        if key.endswith(".lora_B.weight"):
            module = key.removesuffix(".lora_B.weight")
            both.tensors |= {f"{module}.{part}": tensor(value.shape[0]) for part in ("lora_B.bias", MAGNITUDE)}
    words = embedding()
    words.config["use_dora"] = True
    words.tensors[f"{PREFIX}model.embed_tokens.{MAGNITUDE}"] = tensor(16)
    for name, adapter, field in (("both", both, "lora_bias"), ("words", words, "model.embed_tokens")):
        with pytest.raises(Refused) as refused:
            require_measurable(judged(tmp_path / name, adapter))
        assert (refused.value.field, refused.value.rule) == (field, Rule.UNSUPPORTED_LAYOUT)
        assert "DoRA" in refused.value.detail


def put_on(folder: Path) -> None:
    """As a measurement does."""
    with adapter_hooks(model(), read_adapter(folder)):
        pass


def test_only_a_plain_sum_can_be_subtracted(tmp_path: Path) -> None:
    """A twin with a magnitude, an output bias or a whole tensor is refused by what it has too much."""
    plain = with_tensors()
    require_plain(judged(tmp_path / "plain", plain))
    shifted = with_tensors(lora_bias=True)
    for key, value in list(shifted.tensors.items()):
        if key.endswith(".lora_B.weight"):
            shifted.tensors[f"{key.removesuffix('.weight')}.bias"] = tensor(value.shape[0])
    turned = with_tensors(use_dora=True)
    for key, value in list(turned.tensors.items()):
        if key.endswith(".lora_B.weight"):
            turned.tensors[f"{key.removesuffix('.lora_B.weight')}.{MAGNITUDE}"] = tensor(value.shape[0])
    for field, adapter in (("lora_bias", shifted), ("use_dora", turned)):
        with pytest.raises(Refused, match="subtracted") as refused:
            require_plain(judged(tmp_path / field, adapter))
        assert (refused.value.field, refused.value.rule) == (field, Rule.UNSUPPORTED_LAYOUT)
