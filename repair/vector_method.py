"""What `resta`, `lox` and `lssf` share: a safety vector out of the model pair or a harmful twin, concatenated.

They differ in how many singular triplets they look for and in how they weigh them; that is all a subclass says.
"""

from abc import abstractmethod
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from repair import safety_vector
from repair.adapter_file import read_adapter
from repair.context import RepairContext
from repair.layer_basis import BasisNeed
from repair.lora import LayerReference, LoraAdapter, LoraLayer
from repair.method import Assessment, Choice, Cost, Laws, Need, Otherwise, RepairMethod, untouched
from repair.safety_vector import SafetyVector


class Source(StrEnum):
    """Where the safety vector comes from."""

    PAIR = "pair"
    """``aligned - base``, from both models or their basis pack."""
    TWIN = "twin"
    """The negated update of the reference's harmful twin, exactly; no model is read."""


class VectorMethod(RepairMethod):
    """Add the leading directions of what alignment changed. A subclass declares ``strength`` with its own range."""

    needs: ClassVar[frozenset[Need]] = frozenset({Need.ALIGNED, Need.BASE})
    cost: ClassVar[Cost] = Cost.CHECKPOINTS
    laws: ClassVar[Laws] = Laws(noop=MappingProxyType({"strength": 0.0}), never_grows=None)

    otherwise: ClassVar[tuple[Otherwise, ...]] = (Otherwise(parameter="source", needs=frozenset({Need.TWIN})),)

    strength: float
    source: Source = Field(
        default=Source.PAIR, description="The model pair, or the reference's harmful twin, which is subtracted"
    )
    limit: float | None = Field(
        default=None, gt=0, le=100, description="At most this many norms of the module's own update; none by default"
    )
    twin: Path | None = Field(
        default=None,
        description="Folder of another harmful twin than the reference's, which it stands in for",
        json_schema_extra={"local": True},  # a path means something on this machine only: never offered over HTTP
    )

    @property
    @abstractmethod
    def triplets(self) -> int:
        """How many singular triplets of the model pair's safety vector are looked for."""

    @abstractmethod
    def cut(self, vector: SafetyVector) -> Tensor:
        """What to multiply the leading singular values with, in float64; its length is the rank to add."""

    @property
    def demands(self) -> frozenset[Need]:
        """A twin stands in for both models, and one that is named here for the reference's."""
        return super().demands if self.twin is None else frozenset()

    @property
    def negates(self) -> bool:
        """Whether a twin is subtracted."""
        return self.twin is not None or self.source is Source.TWIN

    @property
    def basis_need(self) -> BasisNeed | None:
        """The leading triplets, on both sides."""
        return None if self.negates else BasisNeed(rank=self.triplets, inputs=True)

    def prepare(self, adapter: LoraAdapter, context: RepairContext) -> LoraAdapter | None:
        """The negated twin, cut."""
        twin = context.twin if self.twin is None else read_adapter(self.twin)
        if not self.negates or self.strength == 0 or twin is None:
            return None
        return safety_vector.negated_twin(twin, adapter, cut=self.cut, limit=self.limit)

    def assess(self, layer: LoraLayer, reference: LayerReference) -> Assessment:
        """The layer with the leading directions of its safety vector beside it."""
        if self.negates or self.strength == 0:
            return untouched(layer)
        return safety_vector.assess(layer, reference, rank=self.triplets, cut=self.cut, limit=self.limit)

    def choose(self, assessments: Sequence[Assessment]) -> Choice:
        """Every module whose safety vector is known."""
        return safety_vector.choose(assessments, strength=self.strength, twin=self.negates)
