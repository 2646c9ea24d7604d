"""Safe LoRA: project the updates that alignment would turn the most (methods M1 and M1b).

``v = aligned - base``. The published operator is ``c = v v^T / |v|`` with the norm *not* squared: it is no projector,
has no fixed size, and mostly shrinks what it touches to almost nothing, which the verdict's ``shrink`` shows.
``truncated`` projects onto the top left singular vectors of v instead, ``soft`` goes part of that way. What an operator
does to the size of a module can be undone: c divided by its spectral norm, or every edited module brought back to a
share of the norm it had.

A cosine means something only next to the one that an update without any preference has in the same weight, its null;
`ratio` and `ratio_count` choose by the quotient of the two.

``closest`` is no projection but the nearest update to the one uploaded that pays for lying outside: the minimiser of
``|X - D|^2 + mu (|P X Q'|^2 + |P' X Q|^2) + ((1 + mu)^2 - 1) |P' X Q'|^2`` with P and Q onto the leading left and right
singular vectors of v and primes their complements. The last weight is the one that keeps the rank.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from types import MappingProxyType
from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from gate.of_modules import COUNT, MARK
from repair import alignment, linalg, operator_norm, selection
from repair.grams import row_gram
from repair.layer_basis import BasisNeed
from repair.lora import LayerReference, LoraLayer
from repair.method import MOST_MODULES, Assessment, Choice, Cost, Decision, Laws, Need, RepairMethod
from repair.parameter_rules import Rule, at_most_one, excludes, not_where, only_where, unless_default

PUBLISHED_THRESHOLD = 0.35


class Mode(StrEnum):
    """Which operator is applied to B."""

    PAPER = "paper"
    TRUNCATED = "truncated"
    SOFT = "soft"
    CLOSEST = "closest"


class SafeLora(RepairMethod):
    """Project the modules whose update agrees least with what alignment changed.

    Differs from the reference code in what does not belong to the method: modules are paired by name, cosines are not
    rounded (rounding makes ties that project more modules than asked for), and ties go by name.
    """

    name: ClassVar[str] = "safe_lora"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "https://arxiv.org/abs/2405.16833"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ALIGNED, Need.BASE})
    cost: ClassVar[Cost] = Cost.CHECKPOINTS
    laws: ClassVar[Laws] = Laws(
        noop=MappingProxyType({"count": 0}),
        idempotent=MappingProxyType({"mode": "truncated", "threshold": 1.0, "rank": 5}),
        never_grows=MappingProxyType({"mode": "truncated", "threshold": 1.0, "rank": 5}),
    )
    rules: ClassVar[tuple[Rule, ...]] = (
        *at_most_one("threshold", "count", "ratio", "ratio_count"),
        only_where("adaptive", idle=False, other="mode", value="soft", why="adaptive is a step of mode soft"),
        unless_default(
            "unit_norm",
            idle=False,
            other="mode",
            value="paper",
            why="unit_norm is for mode paper: a projector has norm 1",
        ),
        only_where("penalty", idle=None, other="mode", value="closest", why="penalty is for mode closest"),
        not_where(
            "energy",
            idle=None,
            other="mode",
            value="paper",
            why="energy says how many singular vectors a projector keeps: mode paper keeps all",
        ),
        excludes("unit_norm", value=True, other="norm_share", why="give unit_norm or norm_share, not both"),
    )

    mode: Mode = Field(
        default=Mode.PAPER,
        description="Operator: paper v v^T/|v|, truncated projector, soft, or the closest update under a penalty",
    )
    threshold: float | None = Field(
        default=None, ge=0, le=1, description="Edit modules with a cosine at most this; 0.35 when no rule is given"
    )
    count: int | None = Field(
        default=None,
        ge=0,
        le=MOST_MODULES,
        description="Edit this many modules, lowest cosine first",
        json_schema_extra={MARK: COUNT},
    )
    ratio: float | None = Field(
        default=None, ge=0, le=1000, description="Edit modules with a cosine at most this many times its null"
    )
    ratio_count: int | None = Field(
        default=None,
        ge=0,
        le=MOST_MODULES,
        description="Edit this many modules, lowest cosine relative to its null first",
        json_schema_extra={MARK: COUNT},
    )
    rank: int = Field(default=64, ge=1, le=4096, description="Singular vectors kept by truncated, soft and closest")
    energy: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Keep only as many of them as hold this share of the squared norm of what alignment changed",
    )
    penalty: float | None = Field(
        default=None,
        gt=0,
        le=1000,
        description="closest: the weight of what lies outside on one side; 1 when not given",
    )
    strength: float = Field(default=0.5, ge=0, le=1, description="How far soft goes from the update to its projection")
    adaptive: bool = Field(
        default=False,
        description="soft: go strength times max(0, 1 - cosine / null) of the way, so most where the cosine is low",
    )
    unit_norm: bool = Field(
        default=False, description="paper: divide the operator by its spectral norm, so that no direction grows"
    )
    norm_share: float | None = Field(
        default=None, gt=0, le=1, description="Bring each edited module to this share of the norm it had before"
    )

    @property
    def basis_need(self) -> BasisNeed:
        """The whole operator as published, or the directions that a projector keeps."""
        return BasisNeed(rank=None if self.mode is Mode.PAPER else self.rank, inputs=self.mode is Mode.CLOSEST)

    def assess(self, layer: LoraLayer, reference: LayerReference) -> Assessment:
        """Cosine between the update and its projection, next to that of an update without any preference."""
        if reference.unusable is not None:
            return self._unjudged(layer, reference.unusable)
        if linalg.delta_energy(layer) == 0:
            return self._unjudged(layer, "zero adapter: nothing is added here")
        if self.mode is Mode.CLOSEST:
            return self._closest(layer, reference)
        factors = linalg.homogeneous(layer)
        found = self._projected(factors.b, reference)
        if found is None:
            return self._unjudged(layer, "no alignment displacement: alignment did not change this weight")
        cosine = linalg.compare(found.columns, factors.b, row_gram(factors.a)).cosine
        step = self._step(cosine, found.blank.cosine)
        moved = self._sized(self._moved(factors.b, found.columns, step), factors, reference)
        return Assessment(
            layer=layer,
            edited=layer if step == 0 else _with_columns(layer, moved),
            action=Decision.PROJECTED,
            score=cosine,
            null=found.blank.cosine,
        )

    def _closest(self, layer: LoraLayer, reference: LayerReference) -> Assessment:
        """``(P + c P') D (Q + c Q')`` with ``c = 1 / (1 + penalty)``; a bias is seen by the outputs' side alone."""
        triplets = alignment.alignment_basis(reference, self.rank)
        if triplets is None:
            return self._unjudged(layer, "no alignment displacement: alignment did not change this weight")
        kept = alignment.holding(triplets.values, self.energy, reference)
        left = 1 / (1 + (1.0 if self.penalty is None else self.penalty))
        factors = linalg.homogeneous(layer)
        found = alignment.projection_onto(triplets.u[:, :kept], factors.b)
        cosine = linalg.compare(found.columns, factors.b, row_gram(factors.a)).cosine
        inside = alignment.project(layer.a.T, triplets.v[:, :kept]).T
        narrowed = replace(layer, a=(left * layer.a + (1 - left) * inside).contiguous())
        columns = self._sized(
            left * factors.b + (1 - left) * found.columns, factors, reference, after=linalg.homogeneous(narrowed).a
        )
        return Assessment(
            layer=layer,
            edited=_with_columns(narrowed, columns),
            action=Decision.PROJECTED,
            score=cosine,
            null=found.blank.cosine,
        )

    def choose(self, assessments: Sequence[Assessment]) -> Choice:
        """By one of the four rules; a soft step of zero edits nothing."""
        if self.mode is Mode.SOFT and self.strength == 0:
            return Choice(names=frozenset(), reason="strength 0 keeps every module")
        picked = self._picked(assessments)
        still = frozenset(one.layer.name for one in assessments if one.edited is one.layer)
        if not picked.names & still:
            return picked
        reason = f"{picked.reason}, or not below its null: an adaptive step of zero"
        return Choice(names=picked.names - still, reason=reason)

    def _picked(self, assessments: Sequence[Assessment]) -> Choice:
        if self.ratio is not None:
            picked = selection.at_most(_by_ratio(assessments), self.ratio)
            return replace(picked, reason=f"the score is above {self.ratio:g} times its null")
        if self.ratio_count is not None:
            picked = selection.lowest(_by_ratio(assessments), self.ratio_count)
            return replace(picked, reason=f"not among the {len(picked.names)} lowest scores relative to their null")
        if self.count is not None:
            return selection.lowest(assessments, self.count)
        return selection.at_most(assessments, PUBLISHED_THRESHOLD if self.threshold is None else self.threshold)

    def _step(self, cosine: float, null: float) -> float:
        """How far to go from the update to its projection."""
        if self.mode is not Mode.SOFT:
            return 1.0
        return self.strength * (max(0.0, 1.0 - cosine / null) if self.adaptive else 1.0)

    def _projected(self, b: Float[Tensor, "out columns"], reference: LayerReference) -> alignment.Projection | None:
        if self.mode is Mode.PAPER:
            return alignment.published_projection(b, reference)
        return alignment.truncated_projection(b, reference, self.rank, self.energy)

    def _moved(
        self, b: Float[Tensor, "out columns"], projected: Float[Tensor, "out columns"], step: float
    ) -> Float[Tensor, "out columns"]:
        if self.mode is not Mode.SOFT:
            return projected
        return b - step * (b - projected)

    def _sized(
        self,
        moved: Float[Tensor, "out columns"],
        factors: linalg.Factors,
        reference: LayerReference,
        *,
        after: Float[Tensor, "columns in"] | None = None,
    ) -> Float[Tensor, "out columns"]:
        """The edited columns at the size that was asked for; nothing left cannot be brought to any.

        ``after`` is the other factor where that was edited too.
        """
        if self.unit_norm:
            return moved / operator_norm.published_norm(reference)
        left = 0.0 if self.norm_share is None else linalg.energy(moved, factors.a if after is None else after)
        if self.norm_share is None or left == 0:
            return moved
        return moved * (self.norm_share * math.sqrt(linalg.energy(factors.b, factors.a) / left))

    @staticmethod
    def _unjudged(layer: LoraLayer, why: str) -> Assessment:
        return Assessment(layer=layer, edited=layer, action=Decision.KEPT, unjudged=why)


def _with_columns(layer: LoraLayer, columns: Float[Tensor, "out columns"]) -> LoraLayer:
    """The layer with edited output-side columns; the last one is its bias, where it has one."""
    if layer.bias is None:
        return replace(layer, b=columns.contiguous())
    return replace(layer, b=columns[:, : layer.rank].contiguous(), bias=columns[:, layer.rank].contiguous())


def _by_ratio(assessments: Sequence[Assessment]) -> list[Assessment]:
    """The same with the score over its null, to rank by."""
    return [replace(one, score=_ratio(one)) for one in assessments]


def _ratio(one: Assessment) -> float:
    if one.score is None or not one.null:
        raise ValueError(f"{one.layer.name} was judged without a score, or without a null to read it against")
    return one.score / one.null
