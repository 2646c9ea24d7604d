"""RESTA: add the safety vector back (methods M7).

``theta' = theta_tuned + strength * v`` with ``v = aligned - unaligned``, as the released description has it. The rest
is derived: v is cut to its largest singular directions so that the sum stays a LoRA, and it is added to the modules of
the adapter only. Dropping entries of the update first (DARE) would destroy its low rank and is left out.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from repair.safety_vector import SafetyVector
from repair.vector_method import VectorMethod

MODEL_RANK = 16


class Resta(VectorMethod):
    """Add back what alignment changed, cut to a low rank, or subtract a harmful twin."""

    name: ClassVar[str] = "resta"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "https://arxiv.org/abs/2402.11746"

    strength: float = Field(default=0.5, ge=0, le=2, description="What the safety vector is multiplied by")
    rank: int | None = Field(
        default=None,
        ge=1,
        le=64,
        description="Singular directions added; without it, 16 of a model pair, all of a twin",
    )

    @property
    def triplets(self) -> int:
        """As many as may be added."""
        return self.rank or MODEL_RANK

    def cut(self, vector: SafetyVector) -> Tensor:
        """All of them alike."""
        found = len(vector.triplets.values)
        kept = found if self.rank is None else min(self.rank, found)
        return torch.full((kept,), self.strength, dtype=torch.float64)
