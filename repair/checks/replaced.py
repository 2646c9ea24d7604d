"""Put the whole tensors that travel with an adapter on a loaded model for a while, as PEFT's loader would.

Only those that somebody has settled (`repair.replacements`): a replacement that nobody decided about is an error. The
parameter is exchanged for a copy and put back as the same object, so the model is exactly as before.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from repair.checks.errors import ArmUnsupported
from repair.lora import ExtraKind, ExtraTensor, LoraAdapter
from repair.replacements import is_base, place_of_extra, trained_rows
from repair.tying import TIES

Exchange = tuple[nn.Module, str, nn.Parameter, Tensor]
"""A module, the name of a parameter there, that parameter, and the value that comes in its place."""


@contextmanager
def replaced_tensors(model: nn.Module, adapter: LoraAdapter | None) -> Iterator[None]:
    """The model with the adapter's replacements inside the block; raises ArmUnsupported by the tensor's name."""
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for module, leaf, own, value in _all_exchanges(model, adapter):
            before.append((module, leaf, own))
            setattr(module, leaf, nn.Parameter(value, requires_grad=False))
        yield
    finally:
        for module, leaf, own in reversed(before):
            setattr(module, leaf, own)


def _all_exchanges(model: nn.Module, adapter: LoraAdapter | None) -> list[Exchange]:
    """Of every replacement; all are found before the first is made."""
    if adapter is None:
        return []
    return [one for extra in adapter.extras for one in _exchanges(model, extra, adapter)]


def _exchanges(model: nn.Module, extra: ExtraTensor, adapter: LoraAdapter) -> Iterator[Exchange]:
    """Each place that one replacement changes."""
    if extra.value is None:
        raise ArmUnsupported("replaces a whole tensor of the model", field=extra.key)
    if adapter.config.get(TIES):
        raise ArmUnsupported("replaces a tensor that is tied to another: it can only be dropped", field=extra.key)
    name, leaf = place_of_extra(extra)
    module = dict(model.named_modules()).get(name)
    own = None if module is None else module._parameters.get(leaf)  # noqa: SLF001 - no other way to tell from a buffer
    if module is None or own is None:
        raise ArmUnsupported("the model has no such tensor", field=extra.key)
    value = _whole(own, extra, name, adapter)
    if value.shape != own.shape:
        detail = f"adapter has {tuple(value.shape)}, the model {tuple(own.shape)}"
        raise ArmUnsupported(detail, field=extra.key)
    if extra.kind is ExtraKind.TOKENS or is_base(extra):
        # PEFT writes these into the parameter itself: a head that is tied to the embedding follows.
        shared = [(one, own_leaf) for one, own_leaf in _places(model) if one._parameters[own_leaf] is own]  # noqa: SLF001
    else:
        shared = [(module, leaf)]  # a saved module is a copy of its own
    for one, own_leaf in shared:
        yield one, own_leaf, own, value


def _places(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Every module with every name of a parameter that it holds itself."""
    return [(module, leaf) for module in model.modules() for leaf in module._parameters]  # noqa: SLF001


@torch.no_grad()
def _whole(own: nn.Parameter, extra: ExtraTensor, module: str, adapter: LoraAdapter) -> Tensor:
    """The new value of the whole parameter, in its own format."""
    given = torch.as_tensor(extra.value).to(own.device, own.dtype)
    if extra.kind is not ExtraKind.TOKENS:
        return given
    rows = trained_rows(module, adapter)
    if given.shape != (len(rows), *own.shape[1:]) or max(rows, default=0) >= len(own):
        raise ArmUnsupported("its rows are not rows of the embedding", field=extra.key)
    whole = own.detach().clone()
    whole[rows] = given
    return whole
