"""Put an adapter on a loaded model for a while: forward hooks on the modules it names, the base left untouched.

`y += (x A^T) (sB)^T` on the named linears; DoRA by its row norms, embeddings by row look-up. What cannot be applied
faithfully is an error that names the module: a skipped layer would be measured as a safe one.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from repair.checks.errors import ArmUnsupported
from repair.checks.parameters import adapted_parameters, place_of
from repair.lora import LoraAdapter, LoraLayer

Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]


@contextmanager
def adapter_hooks(model: nn.Module, adapter: LoraAdapter | None) -> Iterator[None]:
    """The model with the adapter on it inside the block, and exactly as before after it."""
    modules = dict(model.named_modules())
    if adapter is not None and adapter.extras:
        raise ArmUnsupported("replaces a whole tensor of the model", field=adapter.extras[0].key)
    layers = () if adapter is None else adapter.layers
    found = [(place_of(modules, layer), layer) for layer in layers]
    handles = []
    try:
        for place, layer in found:
            module = modules.get(layer.name)
            if place is not None:
                continue
            if module is None or layer.slot is not None:
                raise ArmUnsupported("the model has no such module", field=layer.name)
            handles.append(module.register_forward_hook(_hook_for(module, layer)))
        with adapted_parameters([(place, layer) for place, layer in found if place is not None]):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _hook_for(module: nn.Module, layer: LoraLayer) -> Hook:
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise ArmUnsupported(f"{type(module).__name__} holds no weight that a LoRA could change", field=layer.name)
    a = layer.a.to(weight.device, weight.dtype)
    b = (layer.b.float() * layer.scale).to(weight.device, weight.dtype)
    if isinstance(module, nn.Embedding):
        return _embedding_hook(module, layer, a, b)
    if isinstance(module, nn.Linear):
        shape = (module.out_features, module.in_features)
    elif type(module).__name__ == "Conv1D":  # GPT-2 stores its weights the other way round
        shape = (weight.shape[1], weight.shape[0])
    else:
        raise ArmUnsupported(f"no way to apply a LoRA to {type(module).__name__}", field=layer.name)
    if shape != (b.shape[0], a.shape[1]):
        raise ArmUnsupported(
            f"adapter is {b.shape[0]} x {a.shape[1]}, module is {shape[0]} x {shape[1]}", field=layer.name
        )
    shift = None if layer.bias is None else (layer.bias.float() * layer.scale).to(weight.device, weight.dtype)
    if layer.magnitude is not None:
        return _dora_hook(module, layer, a=a, b=b, shift=shift)
    return _linear_hook(a, b, shift)


def _linear_hook(a: Tensor, b: Tensor, shift: Tensor | None) -> Hook:
    def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + functional.linear(functional.linear(args[0], a), b, shift)

    return hook


def _dora_hook(module: nn.Module, layer: LoraLayer, *, a: Tensor, b: Tensor, shift: Tensor | None) -> Hook:
    """Row i of the merged weight is scaled to ``m_i / |W_i + s B_i A|``; the module's own bias is not."""
    if shift is not None:
        raise ArmUnsupported("DoRA with a LoRA bias", field=layer.name)
    weight = module.weight if isinstance(module, nn.Linear) else module.weight.T
    if layer.magnitude is None or not isinstance(weight, Tensor):
        raise ArmUnsupported("DoRA without a magnitude", field=layer.name)
    norms = merged_row_norms(weight, layer)
    ratio = (layer.magnitude.float().flatten().to(weight.device) / norms).to(weight.dtype)
    own_bias = module.bias if isinstance(module.bias, Tensor) else None

    def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        plain = output if own_bias is None else output - own_bias
        merged: Tensor = ratio * (plain + functional.linear(functional.linear(args[0], a), b))
        return merged if own_bias is None else merged + own_bias

    return hook


def merged_row_norms(weight: Tensor, layer: LoraLayer) -> Tensor:
    """``|W_i + s B_i A|`` for every row, from rank-sized products only."""
    w, a = weight.float(), layer.a.float().to(weight.device)
    b = layer.b.float().to(weight.device) * layer.scale
    cross = ((w @ a.T) * b).sum(dim=1)
    square = w.square().sum(dim=1) + 2 * cross + ((b @ (a @ a.T)) * b).sum(dim=1)
    norms: Tensor = square.clamp(min=0).sqrt()
    return norms


def _embedding_hook(module: nn.Embedding, layer: LoraLayer, a: Tensor, b: Tensor) -> Hook:
    if layer.magnitude is not None or layer.bias is not None:
        raise ArmUnsupported("DoRA or a bias on an embedding", field=layer.name)
    weight = module.weight
    if weight.shape != (a.shape[1], b.shape[0]):
        detail = f"adapter is for {a.shape[1]} x {b.shape[0]}, the embedding is {tuple(weight.shape)}"
        raise ArmUnsupported(detail, field=layer.name)
    table = a.T.contiguous()  # vocab x rank

    def hook(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output + functional.linear(functional.embedding(args[0], table), b)

    return hook


def torch_dtype_for(device: torch.device) -> torch.dtype:
    """What both sides are computed in: bf16 where there is hardware for it, else fp32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32
