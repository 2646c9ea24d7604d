"""Antidote: zero the entries of the factors that answer most to harmful prompts (methods M9).

An entry's importance is its size times the size of what it multiplies (Wanda); in each row of A and of B the most
important share goes. That depends on how an update is factored, so both factors are first brought into one canonical
form, ``B = U sqrt(S)``, ``A = sqrt(S) V^T``. The published sizes are taken with the adapter in place, ours on the
aligned model alone, where they are measured once.
"""

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from repair import linalg
from repair.calibration import known_about
from repair.grams import gram
from repair.lora import LayerReference, LoraLayer
from repair.method import Assessment, Choice, Cost, Decision, Laws, Need, RepairMethod, unjudged
from repair.moments import Moments, Side, Topic


class Antidote(RepairMethod):
    """Zero the entries of both factors that answer most to harmful prompts."""

    name: ClassVar[str] = "antidote"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "https://arxiv.org/abs/2408.09600"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ALIGNED, Need.CALIBRATION})
    cost: ClassVar[Cost] = Cost.SECONDS
    laws: ClassVar[Laws] = Laws(
        noop=MappingProxyType({"share": 0.0}),
        revert=MappingProxyType({"share": 1.0}),
        never_grows=None,  # zeroing entries can undo a cancellation
    )

    share: float = Field(
        default=0.1, ge=0, le=1, description="Share of the entries of each row of A and of B that goes, rounded down"
    )

    def assess(self, layer: LoraLayer, reference: LayerReference) -> Assessment:
        """The share of the update's answer to harmful prompts that the kept entries still give."""
        known = known_about(layer, reference)
        if isinstance(known, str):
            return unjudged(layer, known)
        inputs = known.moments(Side.INPUTS, Topic.HARMFUL)
        edited = self._pruned(layer, inputs)
        before = _answer(layer, inputs)
        return Assessment(
            layer=layer,
            edited=edited,
            action=Decision.PROJECTED,
            score=(_answer(edited, inputs) / before) ** 0.5 if before > 0 else None,
        )

    def choose(self, assessments: Sequence[Assessment]) -> Choice:
        """Every module that loses an entry."""
        names = frozenset(one.layer.name for one in assessments if one.edited is not one.layer)
        return Choice(names=names, reason="the share is less than one entry of a row")

    def _pruned(self, layer: LoraLayer, inputs: Moments) -> LoraLayer:
        """The canonical factors without their most important entries; a bias is one more column of B that reads 1."""
        factors = linalg.balanced(layer.b, layer.a)
        read = inputs.form(factors.a).diagonal().clamp(min=0).sqrt()
        columns, sizes = factors.b, read
        if layer.bias is not None:
            columns = torch.cat([columns, layer.bias.double()[:, None]], dim=1)
            sizes = torch.cat([sizes, sizes.new_ones(1)])
        a = _without_largest(factors.a, inputs.squares.double().sqrt(), self.share)
        b = _without_largest(columns, sizes, self.share)
        if a is factors.a and b is columns:
            return layer
        rank = factors.b.shape[1]
        return replace(
            layer,
            a=a.to(layer.a.dtype),
            b=b[:, :rank].to(layer.b.dtype).contiguous(),
            bias=None if layer.bias is None else b[:, rank].to(layer.bias.dtype).contiguous(),
        )


def _without_largest(factor: Tensor, sizes: Tensor, share: float) -> Tensor:
    """Each row without its share of entries with the largest ``|entry| * size``; the same tensor when none goes."""
    count = int(share * factor.shape[1] + 1e-9)  # what binary fractions take away is forgiven
    if count == 0:
        return factor
    gone = (factor.abs() * sizes).topk(count, dim=1).indices
    return factor.scatter(1, gone, 0.0)


def _answer(layer: LoraLayer, inputs: Moments) -> float:
    """Mean square of what the update adds on harmful prompts, its bias left out."""
    return max(0.0, float((gram(layer.b, layer.b) * inputs.form(layer.a)).sum()))
