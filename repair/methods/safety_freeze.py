"""Retroactive freezing: units that safety lives in get back what the aligned model has there.

SSAH freezes a few percent of the MLP channels and attention heads while a model is tuned. Here the tuning is over, so
the update is taken off the same units: rows of B where a module writes them, columns of A where it reads them. The
scores are our own formula (`repair.units`), since the paper's could not be read in full.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from repair import linalg, selection
from repair.calibration import known_about
from repair.lora import LayerReference, LoraLayer
from repair.method import Assessment, Choice, Cost, Decision, Laws, Need, RepairMethod, unjudged
from repair.moments import Units


class SafetyFreeze(RepairMethod):
    """Take each update off the MLP channels and attention heads that harmful prompts use most."""

    name: ClassVar[str] = "safety_freeze"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "https://arxiv.org/abs/2410.10862"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ALIGNED, Need.CALIBRATION})
    cost: ClassVar[Cost] = Cost.SECONDS
    laws: ClassVar[Laws] = Laws(
        noop=MappingProxyType({"share": 0.0}),
        revert=MappingProxyType({"share": 1.0}),
        idempotent=MappingProxyType({"share": 0.3}),
    )

    share: float = Field(
        default=0.075, ge=0, le=1, description="Share of each module's units that is frozen, rounded up; 0 keeps all"
    )

    def assess(self, layer: LoraLayer, reference: LayerReference) -> Assessment:
        """The share of the update's energy that lies in the frozen units, next to their share of all units."""
        known = known_about(layer, reference)
        if isinstance(known, str):
            return unjudged(layer, known)
        units = known.units()
        if units is None:
            return unjudged(
                layer, "no units that this module reads or writes are known: its name or shape is not known"
            )
        counts = [math.ceil(self.share * part - 1e-9) for part in units.parts]  # what binary fractions add is forgiven
        frozen = _columns_or_rows(units, counts)
        energies = _energies(layer, units)
        return Assessment(
            layer=layer,
            edited=layer.zeroed() if bool(frozen.all()) else _without(layer, units, frozen),
            action=Decision.PROJECTED,
            score=float(energies[frozen].sum() / energies.sum()),
            null=sum(counts) / len(units.scores),
        )

    def choose(self, assessments: Sequence[Assessment]) -> Choice:
        """Every module with units, unless nothing is frozen."""
        if self.share == 0:
            return Choice(names=frozenset(), reason="share 0 freezes no unit")
        return selection.everything(assessments)


def _columns_or_rows(units: Units, counts: Sequence[int]) -> Tensor:
    """Marks the rows or columns of the units with the highest scores, so many in each part; ties go by position."""
    marks = torch.zeros(len(units.scores), dtype=torch.bool)
    start = 0
    for part, count in zip(units.parts, counts, strict=True):
        order = torch.argsort(units.scores[start : start + part], descending=True, stable=True)
        marks[start + order[:count]] = True
        start += part
    return marks.repeat_interleave(units.width)


def _energies(layer: LoraLayer, units: Units) -> Tensor:
    """Squared norm of each column that reads, or of each row that writes, its bias included."""
    if units.reads:
        return linalg.row_energies(layer.a.T, layer.b.T, layer.scale)
    factors = linalg.homogeneous(layer)
    return linalg.row_energies(factors.b, factors.a, layer.scale)


def _without(layer: LoraLayer, units: Units, frozen: Tensor) -> LoraLayer:
    if units.reads:
        return replace(layer, a=layer.a.masked_fill(frozen, 0.0))
    bias = None if layer.bias is None else layer.bias.masked_fill(frozen, 0.0)
    return replace(layer, b=layer.b.masked_fill(frozen[:, None], 0.0), bias=bias)
