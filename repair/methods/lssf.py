"""LSSF: add back the principal part of what alignment changed, as many directions as each module needs (methods M7).

``theta' = theta_tuned + strength * P_r v`` with ``P_r = u_r u_r^T``. A reconstruction: the formulas were read in
a restatement only. Its u comes from activations on a small anchor set; here u are v's own left singular vectors, the
form without data, so that ``P_r v`` is v cut to rank r. r is the smallest one whose share of the spectrum's entropy
reaches ``entropy``.
"""

import math
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from repair.safety_vector import SafetyVector
from repair.vector_method import VectorMethod


class Lssf(VectorMethod):
    """Add back the principal directions of what alignment changed, as many as their entropy asks for."""

    name: ClassVar[str] = "lssf"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "https://arxiv.org/abs/2602.00038"

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
