"""Factors of fused experts: how PEFT packs them into one pair of tensors, and how each becomes a layer of its own.

A parameter of E experts has ``A`` of shape (E * rank) x in, the rows of one expert together, and ``B`` of shape
out x (rank * E), where the columns of one expert are E apart. The two are packed differently: slices of B that lie
together belong to all experts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from gate.of_modules import expert_name
from repair.linalg import Factors
from repair.lora import LoraLayer, ParameterSlot

_UP, _DOWN = "gate_up_proj", "down_proj"


@dataclass(frozen=True, kw_only=True)
class Packed:
    """The two tensors of a fused parameter, as the file has them."""

    a: Float[Tensor, "packed in"]
    b: Float[Tensor, "out packed"]


def unpacked(packed: Packed, experts: int) -> list[Factors]:
    """The factors of each expert, in their order."""
    rank = packed.a.shape[0] // experts
    a = packed.a.reshape(experts, rank, packed.a.shape[1])
    b = packed.b.reshape(packed.b.shape[0], rank, experts)
    return [Factors(b=b[:, :, e].contiguous(), a=a[e].contiguous()) for e in range(experts)]


def packed(factors: Sequence[Factors]) -> Packed:
    """The reverse; all of one rank."""
    a = torch.cat([one.a for one in factors], dim=0)
    b = torch.stack([one.b for one in factors], dim=2)
    return Packed(a=a.contiguous(), b=b.reshape(b.shape[0], -1).contiguous())


def exchanged(layer: LoraLayer) -> LoraLayer:
    """The same update seen from the other side: what was A writes, what was B reads. Its own reverse."""
    if layer.slot is None:
        return layer
    slot = replace(layer.slot, exchanged=not layer.slot.exchanged)
    return replace(
        layer, a=layer.b.T.contiguous(), b=layer.a.T.contiguous(), slot=slot, transposed=not layer.transposed
    )


def righted(layers: Sequence[LoraLayer]) -> list[LoraLayer]:
    """Every expert with its B on the output side.

    Some model classes store experts as (in, out) without saying so (Llama 4); PEFT then makes A on their outputs and B
    on their inputs. The two parameters of a block tell: what goes up is twice as wide as what comes down.
    """
    shapes = {layer.slot.parameter: layer.shape for layer in layers if layer.slot is not None}
    turned = {home for home in {parameter.rpartition(".")[0] for parameter in shapes} if _is_exchanged(shapes, home)}
    return [
        exchanged(layer) if layer.slot is not None and layer.slot.parameter.rpartition(".")[0] in turned else layer
        for layer in layers
    ]


def stored_transposed(up: tuple[int, int], down: tuple[int, int]) -> bool | None:
    """Whether the experts of a block are stored as (in, out), from what is stored; None when that is not clear."""
    if up[0] == 2 * down[1] and up[1] == down[0]:
        return False
    if up[1] == 2 * down[0] and up[0] == down[1]:
        return True
    return None


def slot_name(slot: ParameterSlot) -> str:
    """What a layer of this slot is called: as if its expert were a module."""
    path = slot.parameter.removesuffix(".weight")
    return path if slot.expert is None else expert_name(path, slot.expert)


def _is_exchanged(shapes: dict[str, tuple[int, int]], home: str) -> bool:
    up, down = shapes.get(f"{home}.{_UP}"), shapes.get(f"{home}.{_DOWN}")
    return up is not None and down is not None and stored_transposed(up, down) is True
