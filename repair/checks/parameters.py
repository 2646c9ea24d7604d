"""Adapt bare parameters of a loaded model for a while: the experts of a fused block, and what else has no linear.

A hook cannot reach into such a module, so the parameter is exchanged for an adapted copy and put back as the same
object. The sum is rounded to the model's format, as PEFT rounds it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gate.parameters import fused_home, homes, spellings
from repair.checks.errors import ArmUnsupported
from repair.lora import LoraLayer


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where in a parameter one layer is added.

    Attributes:
        module: The module that holds the parameter.
        leaf: Its name there.
        expert: Which matrix of it; None for all of it.
        part: Which of ``parts`` equal groups of output rows.
        parts: How many groups the outputs have.
        turned: The parameter is stored as in x out.
    """

    module: nn.Module
    leaf: str
    expert: int | None
    part: int = 0
    parts: int = 1
    turned: bool = False

    def view(self, whole: Tensor) -> Tensor:
        """The matrix to add to, out x in, on the memory of ``whole``."""
        matrix = whole if self.expert is None else whole[self.expert]
        matrix = matrix.T if self.turned else matrix
        rows = matrix.shape[0] // self.parts
        return matrix[self.part * rows : (self.part + 1) * rows]


def place_of(modules: Mapping[str, nn.Module], layer: LoraLayer) -> Place | None:
    """Where the model keeps what this layer adapts, if that is a bare parameter; None when it is a module's weight."""
    if layer.slot is not None:
        path, expert, part, parts = layer.slot.parameter, layer.slot.expert, 0, 1
    elif any(name in modules for name in spellings(layer.name)):
        return _router(next(modules[name] for name in spellings(layer.name) if name in modules))
    else:
        found = fused_home(layer.name)
        if found is None:
            return None
        path, expert, part, parts = found
    for home in homes(path):
        name, _, leaf = home.rpartition(".")
        module = modules.get(name)
        if module is not None and isinstance(getattr(module, leaf, None), nn.Parameter):
            stated = bool(getattr(module, "is_transposed", False))
            turned = expert is not None and (stated or (layer.slot is not None and layer.slot.exchanged))
            return Place(module=module, leaf=leaf, expert=expert, part=part, parts=parts, turned=turned)
    return None


@contextmanager
def adapted_parameters(places: Sequence[tuple[Place, LoraLayer]]) -> Iterator[None]:
    """The parameters with these layers added inside the block; the very same parameters as before after it."""
    before: dict[tuple[int, str], tuple[nn.Module, nn.Parameter]] = {}
    try:
        for place, layer in places:
            key = (id(place.module), place.leaf)
            if key not in before:
                own = getattr(place.module, place.leaf)
                before[key] = (place.module, own)
                setattr(place.module, place.leaf, nn.Parameter(own.detach().clone(), requires_grad=False))
            _add(place, layer)
        yield
    finally:
        for (_, leaf), (module, own) in before.items():
            setattr(module, leaf, own)


@torch.no_grad()
def _add(place: Place, layer: LoraLayer) -> None:
    whole: Tensor = getattr(place.module, place.leaf)
    view = place.view(whole.data)
    if layer.bias is not None or layer.magnitude is not None:
        raise ArmUnsupported("DoRA or a bias on a bare parameter", field=layer.name)
    if view.shape != layer.shape:
        detail = f"adapter is {layer.shape[0]} x {layer.shape[1]}, the parameter is {view.shape[0]} x {view.shape[1]}"
        raise ArmUnsupported(detail, field=layer.name)
    b = (layer.b.float() * layer.scale).to(whole.device, whole.dtype)
    view.addmm_(b, layer.a.to(whole.device, whole.dtype))


def _router(module: nn.Module) -> Place | None:
    """Newer model classes make the router of a block a module of its own kind, with the weight of a linear."""
    weight = getattr(module, "weight", None)
    if "Router" in type(module).__name__ and isinstance(weight, nn.Parameter) and weight.ndim == 2:  # noqa: PLR2004 - a matrix
        return Place(module=module, leaf="weight", expert=None)
    return None
