"""Put an adapter on a loaded model for a while: forward hooks on the modules it names, the base left untouched.

`y += (x A^T) (sB)^T` on the named linears; DoRA by its row norms, embeddings by row look-up. What cannot be applied
faithfully is an error that names the module: a skipped layer would be measured as a safe one.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from repair.checks.errors import ArmUnsupported
from repair.checks.parameters import Place, adapted_parameters, place_of
from repair.checks.replaced import replaced_tensors
from repair.lora import LoraAdapter, LoraLayer

Hook = Callable[[nn.Module, tuple[Any, ...], Tensor], Tensor]


@contextmanager
def adapter_hooks(model: nn.Module, adapter: LoraAdapter | None) -> Iterator[None]:
    """The model with the adapter on it inside the block, and exactly as before after it."""
    with ExitStack() as stack:
        stack.enter_context(replaced_tensors(model, adapter))  # first: what DoRA measures may be among them
        hooks, bare = _parts(model, adapter)
        for module, hook in hooks:
            stack.callback(module.register_forward_hook(hook).remove)
        stack.enter_context(adapted_parameters(bare))
        yield


def mixable(model: nn.Module, adapters: Sequence[LoraAdapter | None]) -> bool:
    """Whether all of them are hooks on modules: a parameter can hold what one adapter puts there at a time."""
    if any(adapter is not None and adapter.extras for adapter in adapters):
        return False
    modules = dict(model.named_modules())
    layers = (layer for adapter in adapters if adapter is not None for layer in adapter.layers)
    return all(place_of(modules, layer) is None for layer in layers)


class RowArms:
    """Which rows of the next forward pass belong to which arm; set before each pass, rows of one arm side by side."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.spans: dict[int, slice] = {}
        self.rows = 0

    def place(self, arms: Sequence[int]) -> None:
        """Arms of the rows, in ascending order; raises ValueError for one that is not at hand."""
        strangers = [arm for arm in arms if not 0 <= arm < self.count]
        if strangers:
            # Its rows would be the aligned model's, in silence.
            raise ValueError(f"arm {strangers[0]} of {self.count} is not at hand")
        self.spans, self.rows, start = {}, len(arms), 0
        for arm, group in groupby(arms):
            size = len(list(group))
            if arm in self.spans:
                raise ValueError(f"the rows of arm {arm} do not lie side by side")
            self.spans[arm] = slice(start, start + size)
            start += size


@contextmanager
def mixed_hooks(model: nn.Module, adapters: Sequence[LoraAdapter | None]) -> Iterator[RowArms]:
    """Several adapters on the model at once, each on its own rows of a batch.

    The weights are read once for all arms. A module that does not see one row for each prompt (an expert of a mixture)
    cannot be mixed: ArmUnsupported at the first pass. What replaces whole tensors cannot be either.
    """
    rows = RowArms(len(adapters))
    extras = (extra for adapter in adapters if adapter is not None for extra in adapter.extras)
    if (extra := next(extras, None)) is not None:
        raise ArmUnsupported("replaces a whole tensor of the model, for every row of a batch", field=extra.key)
    by_module: dict[nn.Module, dict[int, Hook]] = defaultdict(dict)
    for arm, adapter in enumerate(adapters):
        for module, hook in _parts(model, adapter)[0]:
            by_module[module][arm] = hook
    with ExitStack() as stack:
        for module, hooks in by_module.items():
            stack.callback(module.register_forward_hook(_by_rows(hooks, rows)).remove)
        yield rows


def _by_rows(hooks: Mapping[int, Hook], rows: RowArms) -> Hook:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if len(output) != rows.rows:
            raise ArmUnsupported("the model does not keep the rows of a batch apart", field=type(module).__name__)
        for arm, one in hooks.items():
            if (own := rows.spans.get(arm)) is not None:
                output[own] = one(module, (args[0][own],), output[own])
        return output

    return hook


def _parts(
    model: nn.Module, adapter: LoraAdapter | None
) -> tuple[list[tuple[nn.Module, Hook]], list[tuple[Place, LoraLayer]]]:
    """What each adapted module has to do, and what is added to bare parameters; ArmUnsupported by the module's name."""
    if adapter is None:
        return [], []
    modules = dict(model.named_modules())
    hooks: list[tuple[nn.Module, Hook]] = []
    bare: list[tuple[Place, LoraLayer]] = []
    for layer in adapter.layers:
        module, place = modules.get(layer.name), place_of(modules, layer)
        if place is not None:
            bare.append((place, layer))
        elif module is None or layer.slot is not None:
            raise ArmUnsupported("the model has no such module", field=layer.name)
        else:
            hooks.append((module, _hook_for(module, layer)))
    return hooks, bare


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
