"""The rank that a repaired adapter may have: what a repair adds must not make it unservable.

Engines reserve room for a largest rank, in steps; vLLM's default is 16. An adapter that fits a step fits it after the
repair as well: where an edit or a concatenation grows past it, the smallest singular components go, and the report says
what they were.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Final

import torch

from repair.linalg import spectrum
from repair.lora import LoraAdapter, LoraLayer

STEPS: Final = (16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` of vLLM may be, from its default on."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """Two adapters whose concatenation stays within the limit.

    Attributes:
        edited: The repaired modules.
        added: What is concatenated to them.
        discarded: For each module that was cut, the share of its energy that went.
    """

    edited: LoraAdapter
    added: LoraAdapter
    discarded: Mapping[str, float]


def step_of(rank: int) -> int | None:
    """The smallest step that this rank fits; None when no engine with steps takes it."""
    return next((step for step in STEPS if rank <= step), None)


def limit_of(adapter: LoraAdapter) -> int | None:
    """The largest rank that a repair of this adapter may have."""
    return step_of(max((layer.rank for layer in adapter.layers), default=0))


def fitted(edited: LoraAdapter, added: LoraAdapter, limit: int | None) -> Fitted:
    """Cut what is past ``limit``, or would be once the two are concatenated.

    A small addition (a refusal patch of rank 1) may have the smallest singular values of the sum and yet be the point
    of the repair: it is kept whole, and the module that it joins gives way. An addition that takes more than half of
    the room has no such claim; then the sum is cut, which is the least change there is.
    """
    if limit is None:
        return Fitted(edited=edited, added=added, discarded={})
    mine, theirs = edited.by_name, added.by_name
    discarded: dict[str, float] = {}
    for name in {**mine, **theirs}:
        own, addition = mine.get(name), theirs.get(name)
        if sum(one.rank for one in (own, addition) if one is not None) <= limit:
            continue
        if addition is None:
            mine[name], discarded[name] = _cut(mine[name], limit)
        elif own is not None and addition.rank <= limit // 2:
            mine[name], discarded[name] = _cut(own, limit - addition.rank)
        elif own is None:
            theirs[name], discarded[name] = _cut(addition, limit)
        else:
            mine[name], theirs[name], discarded[name] = _cut_sum(own, addition, limit)
    return Fitted(
        edited=replace(edited, layers=tuple(mine.values())),
        added=replace(added, layers=tuple(theirs.values())),
        discarded=discarded,
    )


def _cut(layer: LoraLayer, rank: int) -> tuple[LoraLayer, float]:
    """The largest ``rank`` singular components of a layer, and the share of its energy that the others had."""
    found = spectrum(layer.b, layer.a)
    squares = found.values.square()
    total = float(squares.sum())
    root = found.values[:rank].sqrt()
    b, a = found.u[:, :rank] * root, root[:, None] * found.v[:, :rank].T
    cut = replace(layer, b=b.to(layer.b.dtype).contiguous(), a=a.to(layer.a.dtype).contiguous())
    return cut, float(squares[rank:].sum()) / total if total > 0 else 0.0


def _cut_sum(own: LoraLayer, addition: LoraLayer, limit: int) -> tuple[LoraLayer, LoraLayer, float]:
    """The largest components of the sum, in place of the module; of the addition an empty one of rank 1 stays."""
    b = torch.cat([own.scale * own.b, addition.scale * addition.b], dim=1)
    bias = None if own.bias is None else own.scale * own.bias
    whole = replace(own, b=b, a=torch.cat([own.a, addition.a], dim=0), bias=bias, scale=1.0)
    cut, share = _cut(whole, limit - 1)
    nothing = replace(addition, a=torch.zeros_like(addition.a[:1]), b=torch.zeros_like(addition.b[:, :1]))
    return cut, nothing, share
