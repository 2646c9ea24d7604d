"""Tiny random models of every family that people adapt, made from their transformers configs, and adapters by PEFT.

`dense_logits` is what a model says when every update is added to its weights as a matrix in float64: no PEFT, none of
our algebra.
"""

import copy
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

from repair.lora import LoraAdapter, LoraLayer
from tests.repair import dense

IDS = torch.tensor([[1, 5, 9, 60, 3, 44], [4, 4, 8, 15, 16, 23]])
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {**SIZES, "intermediate_size": 24}
ATTENTION = ["q_proj", "v_proj"]
GATED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def _made(name: str, **config: Any) -> Callable[[], Any]:
    kind = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    text = "TextConfig" if name == "Llama4" else "Config"
    return lambda: getattr(transformers, f"{name}{kind}")(getattr(transformers, f"{name}{text}")(**config))


MODELS: Mapping[str, Callable[[], Any]] = {
    "llama": _made("Llama", **SIZES),
    "llama-tied": _made("Llama", **{**SIZES, "tie_word_embeddings": True}),
    "qwen2": _made("Qwen2", **SIZES),  # biases on q, k and v
    "qwen3": _made("Qwen3", **SIZES, head_dim=8, attention_bias=True),
    "gemma": _made("Gemma", **{**SIZES, "tie_word_embeddings": True}, head_dim=8),
    "mistral": _made("Mistral", **SIZES),
    "phi": _made("Phi", **SIZES),  # biases everywhere, fc1 and fc2
    "phi3": _made("Phi3", **SIZES),  # q, k and v in one linear, gate and up in another
    "gpt2": _made("GPT2", vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64),
    "mixtral": _made("Mixtral", **EXPERTS, num_local_experts=4),
    "qwen3_moe": _made(
        "Qwen3Moe", **EXPERTS, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8
    ),
    "llama4": _made(
        "Llama4",
        **EXPERTS,
        num_local_experts=4,
        head_dim=8,
        intermediate_size_mlp=24,
        interleave_moe_layer_step=1,
        use_qk_norm=False,
    ),
    "gpt_oss": _made("GptOss", **EXPERTS, num_local_experts=4, num_experts_per_tok=2, head_dim=8),
}
TARGETS: Mapping[str, list[str]] = {
    **dict.fromkeys(MODELS, GATED),
    "phi": ["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    **dict.fromkeys(("mixtral", "qwen3_moe", "gpt_oss", "llama4"), ATTENTION),
}
FUSED = ("mixtral", "qwen3_moe", "gpt_oss", "llama4")
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def model(family: str, seed: int = 0) -> Any:
    """A model of the family; its biases are not zero."""
    torch.manual_seed(seed)
    made = MODELS[family]()
    for name, parameter in made.named_parameters():
        if name.endswith("bias") or parameter.ndim == 3:
            parameter.data.normal_(std=0.1)
    return made.eval()


def folder(family: str, directory: Path, *, seed: int = 0, shards: int = 1) -> Path:
    """The model as a folder, in one file or in several."""
    made = model(family, seed)
    size = "50GB" if shards == 1 else f"{sum(p.numel() * 4 for p in made.parameters()) // shards // 1000}KB"
    made.save_pretrained(directory, max_shard_size=size)
    assert (directory / "model.safetensors").is_file() == (shards == 1)
    return directory


def trained(made: Any, directory: Path, *, dtype: torch.dtype = torch.float32, **config: Any) -> Tensor:
    """An adapter that PEFT made and saved, every factor random; what the model says with it."""
    given = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.0, **config}
    adapted = get_peft_model(copy.deepcopy(made), LoraConfig(**given))
    torch.manual_seed(7)
    for name, parameter in adapted.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(torch.rand_like(parameter) + 0.5)
        elif "lora_" in name:
            parameter.data.normal_(std=0.1)
            parameter.data.copy_(parameter.data.to(dtype))  # what the file will hold, exactly; tied ones stay tied
        elif parameter.requires_grad:  # modules_to_save, biases, tokens
            parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    adapted.peft_config["default"].base_model_name_or_path = "tiny/model"  # the gate takes no path of this machine
    said = logits(adapted)
    if dtype is not torch.float32:
        adapted = adapted.to(dtype)
    adapted.save_pretrained(directory, save_embedding_layers=False)
    return said


@torch.no_grad()
def logits(made: Any) -> Tensor:
    """Of two prompts."""
    found: Tensor = made.eval()(input_ids=IDS).logits
    return found


def loaded(made: Any, directory: Path) -> PeftModel:
    """Load as a user would; any missing or unexpected key of the adapter is an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        adapted = PeftModel.from_pretrained(copy.deepcopy(made), directory)
    config = adapted.peft_config["default"]
    if config.bias == "none" and not config.ensure_weight_tying:
        result = adapted.load_adapter(directory, "again")
    else:  # PEFT has no second adapter beside one with biases, or with a tied head
        result = set_peft_model_state_dict(adapted, load_file(directory / "adapter_model.safetensors"))
    assert not [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    assert not result.unexpected_keys
    adapted.set_adapter("default")
    return adapted


def dense_logits(made: Any, adapter: LoraAdapter) -> Tensor:
    """What the model says with every update merged into its weights."""
    changed = copy.deepcopy(made)
    for layer in adapter.layers:
        merge(changed, layer)
    return logits(changed)


@torch.no_grad()
def merge(made: Any, layer: LoraLayer) -> None:
    """Add one layer to the weights of a model, in float64."""
    home = layer.name if layer.slot is None else layer.slot.parameter.rpartition(".")[0]
    module = made.get_submodule(home)
    leaf = "weight" if layer.slot is None else layer.slot.parameter.rpartition(".")[2]
    stored = getattr(module, leaf).data
    whole = stored if layer.slot is None or layer.slot.expert is None else stored[layer.slot.expert]
    flip = turned(module, layer)
    merged = (whole.double().T if flip else whole.double()) + dense.delta(layer)
    if layer.magnitude is not None:
        merged = merged * (layer.magnitude.double() / merged.norm(dim=1))[:, None]
    result = (merged.T if flip else merged).float()
    if whole is stored:
        setattr(module, leaf, torch.nn.Parameter(result))  # a tied weight stays with the other module
    else:
        whole.copy_(result)
    if layer.bias is not None:
        own = 0 if module.bias is None else module.bias
        module.bias = torch.nn.Parameter(own + layer.scale * layer.bias)


def matrix(made: Any, layer: LoraLayer) -> Tensor:
    """The weight that a layer adapts, as the model holds it, in float64 and out x in."""
    home = layer.name if layer.slot is None else layer.slot.parameter.rpartition(".")[0]
    module = made.get_submodule(home)
    whole: Tensor = getattr(
        module, "weight" if layer.slot is None else layer.slot.parameter.rpartition(".")[2]
    ).detach()
    whole = whole if layer.slot is None or layer.slot.expert is None else whole[layer.slot.expert]
    return whole.double().T if turned(module, layer) else whole.double()


def turned(module: Any, layer: LoraLayer) -> bool:
    """Whether the module stores the weight of this layer as in x out."""
    if layer.slot is not None:
        return bool(getattr(module, "is_transposed", False)) or layer.slot.exchanged
    return isinstance(module, torch.nn.Embedding) or type(module).__name__ == "Conv1D"
