"""SPLoRA: take out the modules that alignment would change the most (methods M2).

``c = v v^T / |v|`` as in Safe LoRA; a module is judged by how far ``c D`` is from ``D``, and a bad one is reverted, not
projected. The released code computes something else than it means to (its spread is zero, and it prunes all but k-1
modules). Both are here: ``corrected`` ranks by a robust z-score of the distance across modules, ``published`` does what
the code does.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import StrEnum
from types import MappingProxyType
from typing import ClassVar

import torch
from pydantic import Field

from gate.of_modules import COUNT, MARK
from repair import alignment, linalg, selection
from repair.grams import row_gram
from repair.layer_basis import BasisNeed
from repair.lora import LayerReference, LoraLayer
from repair.method import MOST_MODULES, Assessment, Choice, Cost, Decision, Laws, Need, RepairMethod
from repair.parameter_rules import Rule, at_most_one

PUBLISHED_COUNT = 10
SAMPLES = 1_000_000
SAMPLE_SEED = 20250618
EPSILON = 1e-6


class Metric(StrEnum):
    """How far is far."""

    ABSOLUTE = "absolute"
    """``|c D - D|``: large updates are far."""
    RELATIVE = "relative"
    """``|c D - D| / |D|``: size does not matter."""


class Ranking(StrEnum):
    """Which modules go."""

    CORRECTED = "corrected"
    PUBLISHED = "published"


class Splora(RepairMethod):
    """Revert the modules whose update is furthest from its own projection."""

    name: ClassVar[str] = "splora"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.18931"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ALIGNED, Need.BASE})
    cost: ClassVar[Cost] = Cost.CHECKPOINTS
    laws: ClassVar[Laws] = Laws(
        noop=MappingProxyType({"count": 0}),
        revert=MappingProxyType({"share": 1.0}),
    )
    rules: ClassVar[tuple[Rule, ...]] = at_most_one("count", "share")

    count: int | None = Field(
        default=None,
        ge=0,
        le=MOST_MODULES,
        description="How many modules go; 10 as published when neither is given",
        json_schema_extra={MARK: COUNT},
    )
    share: float | None = Field(default=None, ge=0, le=1, description="Which share of the modules goes")
    metric: Metric = Field(default=Metric.ABSOLUTE, description="Distance of the corrected ranking")
    ranking: Ranking = Field(
        default=Ranking.CORRECTED,
        description="corrected: the furthest go. published: what the released code does, which is N-k+1 modules",
    )

    @property
    def basis_need(self) -> BasisNeed | None:
        """The whole operator; nothing for the published ranking: an error in norm says little about quartiles."""
        return BasisNeed(rank=None) if self.ranking is Ranking.CORRECTED else None

    def assess(self, layer: LoraLayer, reference: LayerReference) -> Assessment:
        """The distance to its projection, or the published stand-in for it.

        ``null`` is the relative distance of an update without any preference, whatever the metric.
        """
        if reference.unusable is not None:
            return self._unjudged(layer, reference.unusable)
        if linalg.delta_energy(layer) == 0:
            return self._unjudged(layer, "zero adapter: nothing is added here")
        factors = linalg.homogeneous(layer)
        found = alignment.published_projection(factors.b, reference)
        if found is None:
            return self._unjudged(layer, "no alignment displacement: alignment did not change this weight")
        published = self.ranking is Ranking.PUBLISHED
        return Assessment(
            layer=layer,
            edited=layer.zeroed(),
            action=Decision.DROPPED,
            score=_published(factors, found.columns)
            if published
            else self._distance(found.columns, factors, layer.scale),
            null=found.blank.distance / math.sqrt(found.blank.energy),
        )

    def choose(self, assessments: Sequence[Assessment]) -> Choice:
        """The k furthest; or, as published, all whose score is not above the k-th largest."""
        count = self.count if self.count is not None else PUBLISHED_COUNT
        if self.share is not None:
            count = selection.share_of(assessments, self.share)
        if count == 0 or not assessments:
            return Choice(names=frozenset(), reason="no module was to go")
        if self.ranking is Ranking.CORRECTED:
            return replace(selection.highest(assessments, count), scores=_standardised(assessments))
        scores = sorted((one.score for one in assessments if one.score is not None), reverse=True)
        return selection.at_most(assessments, scores[min(count, len(scores)) - 1])

    def _distance(self, projected: torch.Tensor, factors: linalg.Factors, scale: float) -> float:
        found = linalg.compare(projected, factors.b, row_gram(factors.a))
        if self.metric is Metric.RELATIVE:
            return found.distance / math.sqrt(found.energy)
        return abs(scale) * found.distance

    @staticmethod
    def _unjudged(layer: LoraLayer, why: str) -> Assessment:
        return Assessment(layer=layer, edited=layer, action=Decision.KEPT, unjudged=why)


def _standardised(assessments: Sequence[Assessment]) -> Mapping[str, float]:
    """Distances as robust z-scores across the modules: the order is the same, outliers become visible."""
    scores = torch.tensor([one.score for one in assessments], dtype=torch.float64)
    first, median, third = torch.quantile(scores, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64))
    standard = (scores - median) / (third - first + EPSILON * scores.abs().max())
    return {one.layer.name: float(z) for one, z in zip(assessments, standard, strict=True)}


def _published(factors: linalg.Factors, projected: torch.Tensor) -> float:
    """``1 - (Q1(c D) - Q1(D))``, scale left out: what remains of the released metric once its samples are equal."""
    after = linalg.sampled_entries(projected, factors.a, SAMPLES, SAMPLE_SEED)
    before = linalg.sampled_entries(factors.b, factors.a, SAMPLES, SAMPLE_SEED)
    return 1.0 - float(torch.quantile(after, 0.25) - torch.quantile(before, 0.25))
