"""LoX after the fact: extrapolate the few largest directions of what alignment changed (methods M7).

Published to harden the aligned model *before* anyone tunes it: ``w = aligned + strength * svd_k(aligned - base)``.
Concatenating that term to an adapter which was tuned already is derived: the same sum, another moment, and no
published number speaks of it.
"""

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from repair.safety_vector import SafetyVector
from repair.vector_method import VectorMethod


class Lox(VectorMethod):
    """Extrapolate the few largest directions of what alignment changed."""

    name: ClassVar[str] = "lox"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.15606"

    strength: float = Field(default=1.25, ge=0, le=2, description="What the safety vector is multiplied by")
    rank: int = Field(default=6, ge=1, le=64, description="Singular directions added to each module")

    @property
    def triplets(self) -> int:
        """As many as may be added."""
        return self.rank

    def cut(self, vector: SafetyVector) -> Tensor:
        """All of them alike."""
        kept = min(self.rank, len(vector.triplets.values))
        return torch.full((kept,), self.strength, dtype=torch.float64)
