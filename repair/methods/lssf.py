"""LSSF: add back the principal part of what alignment changed, as many directions as each module needs (methods M7).

``theta' = theta_tuned + strength * P_r v`` with ``P_r = u_r u_r^T``. A reconstruction: the formulas were read in
a restatement only. Its u comes from activations on a small anchor set; with ``directions=weights`` u are v's own left
singular vectors, the form without data, so that ``P_r v`` is v cut to rank r. With ``directions=outputs`` they are
those of the aligned model's outputs on harmful prompts, out of a calibration. r is the smallest one whose share of the
spectrum's entropy reaches ``entropy``.
"""

import math
from dataclasses import replace
from enum import StrEnum
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from repair.alignment import along, displacement_energy
from repair.layer_basis import BasisNeed
from repair.linalg import Spectrum, delta_energy
from repair.lora import LayerReference, LoraLayer
from repair.method import Assessment, Need, Otherwise, unjudged, untouched
from repair.moments import Moments, Side, Topic
from repair.parameter_rules import Rule
from repair.safety_vector import SafetyVector, limited
from repair.vector_method import VectorMethod


class Directions(StrEnum):
    """Whose directions hold the principal part."""

    WEIGHTS = "weights"
    """Those of v itself."""
    OUTPUTS = "outputs"
    """Those of what the aligned module writes on harmful prompts."""


class Lssf(VectorMethod):
    """Add back the principal directions of what alignment changed, as many as their entropy asks for."""

    name: ClassVar[str] = "lssf"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "https://arxiv.org/abs/2602.00038"

    otherwise: ClassVar[tuple[Otherwise, ...]] = (
        *VectorMethod.otherwise,
        Otherwise(parameter="directions", needs=frozenset({Need.ALIGNED, Need.BASE, Need.CALIBRATION})),
    )

    rules: ClassVar[tuple[Rule, ...]] = tuple(
        {
            "description": "directions=outputs projects what changed between two models: it takes no twin",
            "if": {"required": ["directions"], "properties": {"directions": {"const": "outputs"}}},
            "then": {"properties": {name: {"const": idle}}},
        }
        for name, idle in (("source", "pair"), ("twin", None))
    )

    strength: float = Field(default=1.0, ge=0, le=3, description="What the last direction is multiplied by")
    entropy: float = Field(
        default=0.8, gt=0, le=1, description="Share of the spectrum's entropy that the added directions must reach"
    )
    emphasis: float = Field(
        default=1.0,
        ge=1,
        le=3,
        description="How much more the first direction weighs than the last; 1 weighs all alike",
    )
    max_rank: int = Field(default=16, ge=1, le=64, description="At most this many directions for each module")

    directions: Directions = Field(
        default=Directions.WEIGHTS,
        description="Whose directions: of what alignment changed, or of the aligned model's outputs on harmful prompts",
    )

    @property
    def basis_need(self) -> BasisNeed | None:
        """Along outputs all of v is read: a pack has its leading triplets only."""
        return None if self.directions is Directions.OUTPUTS else super().basis_need

    def assess(self, layer: LoraLayer, reference: LayerReference) -> Assessment:
        """The layer with the principal part of its safety vector beside it."""
        if self.directions is Directions.WEIGHTS or self.strength == 0:
            return super().assess(layer, reference)
        if reference.unusable is not None:
            return unjudged(layer, reference.unusable)
        if reference.calibration is None:
            return unjudged(layer, "the calibration did not look at this module")
        if self.limit is not None and delta_energy(layer) == 0:
            return unjudged(layer, "zero adapter: nothing to limit the safety vector by")
        energy = displacement_energy(reference)
        if energy is None:
            return unjudged(layer, "no alignment displacement: alignment did not change this weight")
        weights, u = self._principal(reference.calibration.moments(Side.OUTPUTS, Topic.HARMFUL))
        reads = along(reference, u.to(reference.alignment_dtype())).double()
        scored = float(reads.square().sum()) / energy
        return replace(
            untouched(layer), score=scored, added=limited(_outer(layer, u * weights, reads), layer, self.limit)
        )

    def _principal(self, outputs: Moments) -> tuple[Tensor, Tensor]:
        """What to multiply each direction with, and the directions, as many as their entropy asks for."""
        spectrum = Spectrum(u=outputs.basis, values=outputs.values.clamp(min=0).sqrt(), v=outputs.basis)
        weights = self.cut(SafetyVector(triplets=spectrum, energy=outputs.total, directions=len(outputs.squares)))
        return weights, outputs.basis[:, : len(weights)].double()

    @property
    def triplets(self) -> int:
        """As many as may be added."""
        return self.max_rank

    def cut(self, vector: SafetyVector) -> Tensor:
        """As many as the entropy asks for, the first ones weighing more."""
        values = vector.triplets.values.double()[: safety_rank(vector, self.entropy, self.max_rank)]
        spread = values[0] - values[-1]
        ramp = (values - values[-1]) / spread if spread > 0 else torch.zeros_like(values)
        return self.strength * (1 + (self.emphasis - 1) * ramp)


def _outer(layer: LoraLayer, columns: Tensor, reads: Tensor) -> LoraLayer:
    """``columns reads^T`` for the module of ``layer``."""
    b, a = columns.to(layer.b.dtype).contiguous(), reads.T.to(layer.a.dtype).contiguous()
    return replace(layer, b=b, a=a, scale=1.0, bias=None, magnitude=None)


def safety_rank(vector: SafetyVector, share: float, at_most: int) -> int:
    """Smallest r with ``H_r >= share * H`` where ``H_r = -sum_{i <= r} p_i ln p_i`` and ``p_i = s_i^2 / |v|^2``.

    Singular values that were not computed are taken as equal, which makes H as large as it can be: the rank is never
    too small, but ``at_most`` may cut it.
    """
    shares = vector.triplets.values.double().square() / vector.energy
    terms = -shares * shares.clamp(min=1e-300).log()
    unknown, rest = vector.directions - len(shares), max(0.0, 1 - float(shares.sum()))
    tail = -rest * math.log(rest / unknown) if unknown > 0 and rest > 0 else 0.0
    reached = terms.cumsum(0) >= share * (float(terms.sum()) + tail) - 1e-12  # the whole is a sum in another order
    return min(int((~reached).sum()) + 1, len(shares), at_most)
