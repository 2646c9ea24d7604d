"""Input null-space guard (methods M13): an update stops answering to what harmful prompts look like.

``A (I - strength Q Q^T)``, with Q the directions that the module's inputs take on harmful prompts. The idea is that of
GuardSpace, a training method; the edit of a finished adapter and the contrast with benign prompts are our derivation.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar

from pydantic import Field

from repair import alignment
from repair.calibration import known_about
from repair.lora import LayerReference, LoraLayer
from repair.method import Assessment, Choice, Cost, Decision, Laws, Need, RepairMethod, unjudged
from repair.moments import LayerCalibration, Moments, Side, Topic, safety_basis
from repair.response import unscaled_energy


class InputGuard(RepairMethod):
    """Blind each update to the input directions that harmful prompts take."""

    name: ClassVar[str] = "input_guard"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "https://arxiv.org/abs/2510.14301"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ALIGNED, Need.CALIBRATION})
    cost: ClassVar[Cost] = Cost.SECONDS
    laws: ClassVar[Laws] = Laws(
        noop=MappingProxyType({"strength": 0.0}),
        idempotent=MappingProxyType({"strength": 1.0, "directions": 3}),
        never_grows=MappingProxyType({"directions": 3}),
    )

    directions: int = Field(default=32, ge=1, le=512, description="Input directions that are taken out")
    strength: float = Field(default=1.0, ge=0, le=1, description="How far each direction is taken out; 0 keeps all")
    contrast: bool = Field(
        default=True, description="Directions strong on harmful and weak on benign prompts, not simply the strongest"
    )
    ridge: float = Field(
        default=0.01, gt=0, le=10, description="Floor of the contrast, as a share of the mean benign variance"
    )
    at_least: float = Field(
        default=0.0, ge=0, le=1, description="Edit modules with a score of at least this; 0.5 answers to both alike"
    )

    def assess(self, layer: LoraLayer, reference: LayerReference) -> Assessment:
        """How far the update answers to harmful rather than benign prompts: 0 benign only, 0.5 alike, 1 harmful only.

        With r the size of ``D x`` next to that of ``W x``, the score is ``r_harmful / (r_harmful + r_benign)``.
        """
        known = known_about(layer, reference)
        if isinstance(known, str):
            return unjudged(layer, known)
        harmful, benign = (known.moments(Side.INPUTS, topic) for topic in Topic)
        answers = [
            _answer(layer, known, topic, one) for topic, one in ((Topic.HARMFUL, harmful), (Topic.BENIGN, benign))
        ]
        if sum(answers) == 0:
            return unjudged(layer, "the update answers to none of the calibration's prompts")
        basis = safety_basis(harmful, benign, count=self.directions, ridge=self.ridge, contrast=self.contrast)
        inside = alignment.project(layer.a.T, basis).T
        return Assessment(
            layer=layer,
            edited=replace(layer, a=(layer.a - self.strength * inside).contiguous()),
            action=Decision.PROJECTED,
            score=answers[0] / sum(answers),
            null=0.5,
        )

    def choose(self, assessments: Sequence[Assessment]) -> Choice:
        """Modules that answer to harmful prompts enough; all by default."""
        if self.strength == 0:
            return Choice(names=frozenset(), reason="strength 0 keeps every module")
        names = frozenset(one.layer.name for one in assessments if one.score is not None and one.score >= self.at_least)
        return Choice(names=names, reason=f"the score is below {self.at_least:g}")


def _answer(layer: LoraLayer, known: LayerCalibration, topic: Topic, inputs: Moments) -> float:
    """Root mean square of what the update adds, its bias included, next to what the aligned module says."""
    energy = unscaled_energy(layer, inputs)
    said = known.output_energy(topic)
    return abs(layer.scale) * math.sqrt(max(0.0, energy) / said) if said > 0 else 0.0
