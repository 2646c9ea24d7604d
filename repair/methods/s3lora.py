"""S3LoRA, reconstructed: drop the modules whose update has the sharpest spectrum (methods M3).

Only the abstract of the paper could be read. It says that the update is normalised row by row while its magnitude is
kept, that an index measures how concentrated its singular values are, and that the layers with the sharpest spectra are
pruned; no model and no data are needed. Every formula below is our reconstruction of that, and so is every default.

Concentration is also what a good low-rank task update looks like: run `random_modules` next to it.
"""

import re
from collections.abc import Sequence
from enum import StrEnum
from statistics import median
from types import MappingProxyType
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from gate.of_modules import COUNT, MARK
from repair import linalg, selection
from repair.lora import LayerReference, LoraLayer
from repair.method import MOST_MODULES, Assessment, Choice, Cost, Decision, Laws, Need, RepairMethod
from repair.parameter_rules import Rule, at_most_one

DEFAULT_COUNT = 10
"""As many as SPLoRA prunes; how many S3LoRA prunes could not be read."""
ROW_FLOOR = 1e-6
"""Rows below this share of the average row are rounding: they are not blown up to unit length."""


class Index(StrEnum):
    """What concentrated means, for singular values in descending order."""

    LARGEST_SHARE = "largest_share"
    """The largest over the sum: form (a)."""
    ENERGY_SHARE = "energy_share"
    """The same with squares: form (b)."""
    LARGEST_OVER_MEAN = "largest_over_mean"
    """The largest over the mean: form (c)."""
    WEIGHTED_ENERGY_SHARE = "weighted_energy_share"
    """``|D|`` times the share of energy: form (d). Large updates are sharp."""


class S3Lora(RepairMethod):
    """Drop the modules with the sharpest spectrum: a reconstruction of S3LoRA from its abstract."""

    name: ClassVar[str] = "s3lora"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "https://arxiv.org/abs/2508.15068"
    needs: ClassVar[frozenset[Need]] = frozenset()
    cost: ClassVar[Cost] = Cost.SECONDS
    laws: ClassVar[Laws] = Laws(
        noop=MappingProxyType({"count": 0}),
        revert=MappingProxyType({"share": 1.0}),
    )
    rules: ClassVar[tuple[Rule, ...]] = at_most_one("count", "share")

    count: int | None = Field(
        default=None,
        ge=0,
        le=MOST_MODULES,
        description="How many modules go; 10 when neither is given",
        json_schema_extra={MARK: COUNT},
    )
    share: float | None = Field(default=None, ge=0, le=1, description="Which share of the modules goes")
    index: Index = Field(default=Index.ENERGY_SHARE, description="How concentration is measured: forms (a) to (d)")

    def assess(self, layer: LoraLayer, reference: LayerReference) -> Assessment:  # noqa: ARG002 - reads the adapter only
        """The sharpness of its spectrum; no score where there is a single singular value, which is always sharp."""
        if linalg.delta_energy(layer) == 0:
            return Assessment(
                layer=layer, edited=layer, action=Decision.KEPT, unjudged="zero adapter: nothing is added here"
            )
        values = spherical_values(linalg.homogeneous(layer))
        score = None if len(values) == 1 else self._sharpness(values, linalg.delta_energy(layer) ** 0.5)
        return Assessment(layer=layer, edited=layer.zeroed(), action=Decision.DROPPED, score=score)

    def choose(self, assessments: Sequence[Assessment]) -> Choice:
        """The sharpest, each module compared with those of its own type.

        A type in which a module has a single singular value is ranked by norm, and its scores are norms.
        """
        count = self.count if self.count is not None else DEFAULT_COUNT
        if self.share is not None:
            count = selection.share_of(assessments, self.share)
        types: dict[str, list[Assessment]] = {}
        for one in assessments:
            types.setdefault(type_of(one.layer.name), []).append(one)
        norms: dict[str, float] = {}
        places: dict[str, tuple[float, float, str]] = {}
        for members in types.values():
            scores = {one.layer.name: one.score for one in members if one.score is not None}
            if len(scores) < len(members):
                scores = {one.layer.name: linalg.delta_energy(one.layer) ** 0.5 for one in members}
                norms |= scores
            places |= _places(scores)
        ranked = sorted(places, key=lambda name: places[name])
        by_norm = "; types with a module of rank 1 are ranked by norm" if norms else ""
        reason = f"not among the {min(count, len(ranked))} sharpest of their types{by_norm}"
        return Choice(names=frozenset(ranked[:count]), reason=reason, scores=norms)

    def _sharpness(self, values: Tensor, norm: float) -> float:
        energy_share = float(values[0].square() / values.square().sum())
        match self.index:
            case Index.LARGEST_SHARE:
                return float(values[0] / values.sum())
            case Index.ENERGY_SHARE:
                return energy_share
            case Index.LARGEST_OVER_MEAN:
                return float(values[0] / values.mean())
            case Index.WEIGHTED_ENERGY_SHARE:
                return norm * energy_share


def spherical_values(factors: linalg.Factors) -> Tensor:
    """Singular values of ``b @ a`` with every row at unit length: descending, float64, ``min(out, rank, in)`` of them.

    The reconstruction goes on to restore the global magnitude, one factor on all values. It is left out: no share
    sees it, and the weighted form multiplies by the norm itself.
    """
    inputs = torch.linalg.qr(factors.a.double().T, mode="r").R
    rows = factors.b.double() @ inputs.T  # b a up to a rotation of the inputs: row norms without cancellation
    norms = rows.norm(dim=1)
    floor = ROW_FLOOR * norms.square().mean().sqrt()
    core = torch.linalg.qr(rows / norms.clamp(min=float(floor))[:, None], mode="r").R
    values: Tensor = torch.linalg.svdvals(core)
    return values


def type_of(name: str) -> str:
    """The path without the numbers of blocks and experts: modules of one type do the same work in each block."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", "", name)


def _places(scores: dict[str, float]) -> dict[str, tuple[float, float, str]]:
    """Where each module stands in its type, 0 the sharpest and 1 the flattest: what types can be compared by.

    Equal standing in two types is decided by how far a score is above the middle of its type, then by name.
    """
    middle = median(scores.values())
    ranked = sorted(scores, key=lambda name: (-scores[name], name))
    return {name: ((at + 0.5) / len(ranked), -scores[name] / middle, name) for at, name in enumerate(ranked)}
