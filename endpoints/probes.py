"""Two adapters that turn any reply of a model into another one, to see whether a server applies what it is given."""

from pathlib import Path
from typing import Final

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from repair.checks.errors import CheckError
from repair.lora import LoraAdapter, LoraLayer

_RANK: Final = 4
_STRENGTH: Final = 1.0  # of what a normalised input of ordinary size is turned into, for each rank
_ATTENTION: Final = ("attn", "attention")
_CONFIG: Final = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": _RANK, "lora_alpha": _RANK}


def probe_adapters(reference: Path) -> tuple[LoraAdapter, LoraAdapter]:
    """Random and strong, on the linears of every attention block; from the config alone. Raises CheckError."""
    shapes = _shapes(reference)
    if not shapes:
        raise CheckError("no linear modules that a probe could adapt", file=reference.name)
    return _probe(shapes, seed=1), _probe(shapes, seed=2)


def _probe(shapes: dict[str, tuple[int, int]], *, seed: int) -> LoraAdapter:
    source = torch.Generator().manual_seed(seed)
    layers = []
    for name, (out_features, in_features) in shapes.items():
        a = torch.randn(_RANK, in_features, generator=source) / in_features**0.5
        b = torch.randn(out_features, _RANK, generator=source) * _STRENGTH
        layers.append(LoraLayer(name=name, a=a, b=b, scale=1.0, dtype=torch.bfloat16))
    return LoraAdapter(layers=tuple(layers), config=_CONFIG)


def _shapes(reference: Path) -> dict[str, tuple[int, int]]:
    """(out, in) of each linear of the attention, or of all but the head where nothing is called attention."""
    try:
        config = AutoConfig.from_pretrained(reference, local_files_only=True, trust_remote_code=False)
        with torch.device("meta"):  # shapes only
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CheckError("the reference's config cannot be read", file=reference.name) from error
    head = model.get_output_embeddings()
    found = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }
    attention = {name: shape for name, shape in found.items() if any(part in name for part in _ATTENTION)}
    return attention or found
