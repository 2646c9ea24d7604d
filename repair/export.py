"""From layers to the tensors and the config of a file that every serving engine reads alike.

The scale goes into B and all modules get one rank, because engines differ in how they read patterns and rsLoRA. The
modules are listed by full path: a pattern of the uploader's never reaches an engine.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from gate.parameters import nesting
from repair.errors import NotRepresentable
from repair.experts import exchanged, packed
from repair.layout import WEIGHTS, key_at, key_for
from repair.linalg import Factors, relative_distance
from repair.linalg import balanced as equal_factors
from repair.lora import ExtraKind, LayerKind, LoraAdapter, LoraLayer
from repair.tying import TIES, tie_of


@dataclass(frozen=True, kw_only=True)
class Export:
    """What is written, and how far it is from what was computed.

    Attributes:
        tensors: By the names of the file.
        config: Of ``adapter_config.json``.
        rank: Of every module.
        rounding: Relative error of each module's update after the cast to the format of the input.
    """

    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    rank: int
    rounding: Mapping[str, float]


def folded(adapter: LoraAdapter, *, balanced: bool = False) -> Export:
    """The adapter with scale 1 and one rank, in the number format it came in; raises NotRepresentable."""
    rank = max(layer.rank for layer in adapter.layers)
    with_bias = any(layer.bias is not None for layer in adapter.layers)
    tensors: dict[str, Tensor] = {}
    rounding: dict[str, float] = {}
    slots: dict[str, dict[int, LoraLayer]] = {}
    for layer in adapter.layers:
        written = _cast(_padded(_unscaled(layer, balanced=balanced), rank, with_bias=with_bias))
        rounding[layer.name] = relative_distance(replace(layer, bias=None), replace(written, bias=None))
        if layer.slot is not None:
            slots.setdefault(layer.slot.parameter, {})[layer.slot.expert or 0] = written
            continue
        parts = {"a": written.a, "b": written.b, "bias": written.bias, "magnitude": written.magnitude}
        for part, tensor in parts.items():
            if tensor is not None:
                tensors[key_for(layer.name, part, layer.kind)] = tensor.contiguous()
    tensors |= _parameters(slots)
    tensors |= _tied(adapter, tensors)
    tensors |= {extra.key: extra.value for extra in adapter.extras if extra.value is not None}
    return Export(tensors=tensors, config=_config(adapter, rank, with_bias=with_bias), rank=rank, rounding=rounding)


def _parameters(slots: Mapping[str, Mapping[int, LoraLayer]]) -> dict[str, Tensor]:
    """The packed factors of every bare parameter, under the names that PEFT's wrappers give them."""
    tensors: dict[str, Tensor] = {}
    for parameter, site in nesting(slots).items():
        layers = slots[parameter]
        missing = next((expert for expert in range(_experts(layers)) if expert not in layers), None)
        if missing is not None:
            raise NotRepresentable(f"expert {missing} is not adapted", field=parameter, file=WEIGHTS)
        found = packed([_as_filed(layers[expert]) for expert in sorted(layers)])
        tensors |= {key_at(site, "a"): found.a, key_at(site, "b"): found.b}
    return tensors


def _tied(adapter: LoraAdapter, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The head of a tied pair, of the very numbers that are written for the embedding: the scale is in its B now."""
    tie = tie_of(adapter)
    if tie is None:
        return {}
    words = {part: tensors[key_for(tie.words, part, LayerKind.EMBEDDING)] for part in ("a", "b")}
    turned = {"a": words["b"].T.contiguous(), "b": words["a"].T.contiguous()}
    return {key_for(tie.head, part, LayerKind.LINEAR): tensor for part, tensor in turned.items()}


def _experts(layers: Mapping[int, LoraLayer]) -> int:
    return max((layer.slot.experts for layer in layers.values() if layer.slot is not None), default=0)


def _as_filed(layer: LoraLayer) -> Factors:
    turned = exchanged(layer) if layer.slot is not None and layer.slot.exchanged else layer
    return Factors(b=turned.b, a=turned.a)


def _unscaled(layer: LoraLayer, *, balanced: bool) -> LoraLayer:
    bias = None if layer.bias is None else layer.scale * layer.bias
    if balanced:
        factors = equal_factors(layer.b, layer.a, layer.scale)
        return replace(layer, a=factors.a, b=factors.b, bias=bias, scale=1.0)
    return replace(layer, b=layer.b if layer.scale == 1 else layer.scale * layer.b, bias=bias, scale=1.0)


def _padded(layer: LoraLayer, rank: int, *, with_bias: bool) -> LoraLayer:
    out_features, in_features = layer.shape
    a, b, bias = layer.a, layer.b, layer.bias
    if layer.rank < rank:
        a = torch.cat([a, a.new_zeros(rank - layer.rank, in_features)], dim=0)
        b = torch.cat([b, b.new_zeros(out_features, rank - layer.rank)], dim=1)
    if bias is None and with_bias:
        bias = b.new_zeros(out_features)
    return replace(layer, a=a, b=b, bias=bias)


def _cast(layer: LoraLayer) -> LoraLayer:
    """Both factors in the format of the input; a magnitude in float32: bfloat16 would move whole rows by 0.4 %."""
    a, b = _fitted(layer.a, layer.dtype, layer.name), _fitted(layer.b, layer.dtype, layer.name)
    bias = None if layer.bias is None else _fitted(layer.bias, layer.dtype, layer.name)
    magnitude = None if layer.magnitude is None else _fitted(layer.magnitude, torch.float32, layer.name)
    return replace(layer, a=a, b=b, bias=bias, magnitude=magnitude)


def _fitted(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    result = tensor.to(dtype)
    if not bool(result.isfinite().all()):
        raise NotRepresentable(f"overflows in {dtype}; balanced factors may fit", field=name, file=WEIGHTS)
    return result


def _config(adapter: LoraAdapter, rank: int, *, with_bias: bool) -> dict[str, Any]:
    """The uploaded config, unknown keys and all, with everything that the fold has changed."""
    kept = {extra.kind for extra in adapter.extras if extra.value is not None}
    parameters = sorted({layer.slot.parameter for layer in adapter.layers if layer.slot is not None})
    if parameters:  # PEFT refuses to load them with dropout, which means nothing any more
        changed: dict[str, Any] = {"target_parameters": parameters, "lora_dropout": 0.0}
    else:
        changed = {"target_parameters": None} if "target_parameters" in adapter.config else {}
    if any(layer.transposed and layer.slot is None and layer.kind is LayerKind.LINEAR for layer in adapter.layers):
        changed["fan_in_fan_out"] = True  # a repair may have added the first of them; PEFT looks at each module itself
    if adapter.config.get(TIES):
        changed[TIES] = tie_of(adapter) is not None or ExtraKind.MODULE in kept
    return {
        **adapter.config,
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "use_dora": adapter.uses_dora,
        "lora_bias": with_bias,
        "bias": (adapter.config.get("bias") or "none") if ExtraKind.BIAS in kept else "none",
        "rank_pattern": {},
        "alpha_pattern": {},
        "target_modules": [layer.name for layer in adapter.layers if layer.slot is None],
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "modules_to_save": adapter.config.get("modules_to_save") if ExtraKind.MODULE in kept else None,
        "trainable_token_indices": adapter.config.get("trainable_token_indices") if ExtraKind.TOKENS in kept else None,
        "init_lora_weights": True,
        "inference_mode": True,
        **changed,
    }
