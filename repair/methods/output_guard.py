"""Output-space guard (methods M12): an update stops writing where the aligned model writes on harmful prompts.

``B <- B - strength U U^T B``: SaLoRA's fixed module ``I - U U^T``, which it folds into B after training in the same
way, put on an adapter that was trained without it. Its U are the strongest output directions on harmful prompts; those
are mostly generic, so ours are by default those that contrast with benign prompts (our derivation).
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar

from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from repair import alignment, linalg
from repair.calibration import known_about
from repair.grams import gram
from repair.lora import LayerReference, LoraLayer
from repair.method import Assessment, Choice, Cost, Decision, Laws, Need, RepairMethod, unjudged
from repair.moments import Side, Topic, safety_basis


class OutputGuard(RepairMethod):
    """Keep each update out of the output directions that the aligned model takes on harmful prompts."""

    name: ClassVar[str] = "output_guard"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "https://arxiv.org/abs/2501.01765"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ALIGNED, Need.CALIBRATION})
    cost: ClassVar[Cost] = Cost.SECONDS
    laws: ClassVar[Laws] = Laws(
        noop=MappingProxyType({"strength": 0.0}),
        idempotent=MappingProxyType({"strength": 1.0, "directions": 3}),
        never_grows=MappingProxyType({"directions": 3}),
    )

    directions: int = Field(default=32, ge=1, le=512, description="Output directions that are taken out")
    strength: float = Field(default=1.0, ge=0, le=1, description="How far each direction is taken out; 0 keeps all")
    contrast: bool = Field(
        default=True, description="Directions strong on harmful and weak on benign prompts, not simply the strongest"
    )
    ridge: float = Field(
        default=0.01, gt=0, le=10, description="Floor of the contrast, as a share of the mean benign variance"
    )
    over_null: float = Field(
        default=0.0,
        ge=0,
        le=1000,
        description="Edit modules that write there at least this many times as much as a random update",
    )

    def assess(self, layer: LoraLayer, reference: LayerReference) -> Assessment:
        """The share of the update's norm inside the directions, next to that of a random update."""
        known = known_about(layer, reference)
        if isinstance(known, str):
            return unjudged(layer, known)
        harmful, benign = (known.moments(Side.OUTPUTS, topic) for topic in Topic)
        basis = safety_basis(harmful, benign, count=self.directions, ridge=self.ridge, contrast=self.contrast)
        factors = linalg.homogeneous(layer)
        inside = linalg.energy(gram(basis, factors.b), factors.a)
        return Assessment(
            layer=layer,
            edited=self._edited(layer, basis),
            action=Decision.PROJECTED,
            score=math.sqrt(inside / linalg.energy(factors.b, factors.a)),
            null=math.sqrt(basis.shape[1] / len(basis)),
        )

    def choose(self, assessments: Sequence[Assessment]) -> Choice:
        """Modules that write there more than by chance, as far as that is asked for; all by default."""
        if self.strength == 0:
            return Choice(names=frozenset(), reason="strength 0 keeps every module")
        names = frozenset(
            one.layer.name
            for one in assessments
            if one.score is not None and one.null is not None and one.score >= self.over_null * one.null
        )
        return Choice(names=names, reason=f"the score is below {self.over_null:g} times that of a random update")

    def _edited(self, layer: LoraLayer, basis: Float[Tensor, "out k"]) -> LoraLayer:
        def outside(x: Float[Tensor, "out columns"]) -> Float[Tensor, "out columns"]:
            return x - self.strength * alignment.project(x, basis)

        bias = None if layer.bias is None else outside(layer.bias[:, None])[:, 0].contiguous()
        return replace(layer, b=outside(layer.b), bias=bias)
