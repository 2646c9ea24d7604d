"""SafeMERGE: mix a safety-trained adapter into the modules that left the alignment behind (methods M6).

A module whose Safe LoRA cosine is below ``threshold`` becomes ``(1 - share) D + share D_safe``; the others stay. The
merge is a concatenation and exact. The released code merges factor by factor, which adds cross terms ``b_i a_j`` that
belong to neither adapter; and it takes a module that alignment left alone for one below the threshold. Neither is
repeated here: without a displacement there is no evidence, and the module is kept.
"""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from pydantic import Field

from repair import alignment, linalg
from repair.adapter_file import read_adapter
from repair.context import RepairContext
from repair.errors import MissingReference
from repair.grams import row_gram
from repair.layer_basis import BasisNeed
from repair.lora import LayerReference, LoraAdapter, LoraLayer
from repair.method import Assessment, Choice, Cost, Decision, Laws, Need, RepairMethod


class Reach(StrEnum):
    """Where the safe adapter is added."""

    SELECTED = "selected"
    """In the modules below the threshold, as published."""
    EVERYWHERE = "everywhere"
    """In every module that it adapts, so that it stays the adapter that was trained; derived."""


class Safemerge(RepairMethod):
    """Mix a safety-trained adapter into the modules whose update agrees least with what alignment changed."""

    name: ClassVar[str] = "safemerge"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "https://arxiv.org/abs/2503.17239"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ALIGNED, Need.BASE, Need.PATCH})
    cost: ClassVar[Cost] = Cost.CHECKPOINTS
    laws: ClassVar[Laws] = Laws(noop=MappingProxyType({"share": 0.0}), never_grows=None)

    threshold: float = Field(default=0.35, ge=0, le=1, description="Merge modules with a cosine below this")
    share: float = Field(
        default=0.2, ge=0, le=1, description="Weight of the safe adapter; the uploaded one gets the rest"
    )
    reach: Reach = Field(
        default=Reach.SELECTED,
        description="selected: the safe adapter enters merged modules only. everywhere: every module that it adapts",
    )
    safe: Path | None = Field(
        default=None,
        description="Folder of the safety-trained adapter; without it, the reference's own patch",
        json_schema_extra={"local": True},  # a path means something on this machine only: never offered over HTTP
    )

    @property
    def basis_need(self) -> BasisNeed:
        """The whole operator, for the cosine; what is mixed in does not depend on it."""
        return BasisNeed(rank=None)

    def prepare(self, adapter: LoraAdapter, context: RepairContext) -> LoraAdapter | None:  # noqa: ARG002 - same for all
        """The safe adapter at its share."""
        if self.share == 0:
            return None
        safe = context.patch if self.safe is None else read_adapter(self.safe)
        if safe is None:
            raise MissingReference("name the folder of the safe adapter: --set safe=DIR", field="safe")
        return safe.scaled(self.share)

    def assess(self, layer: LoraLayer, reference: LayerReference) -> Assessment:
        """Safe LoRA's cosine of the uploaded update, next to that of an update without any preference."""
        if reference.unusable is not None:
            return self._unjudged(layer, reference.unusable)
        if linalg.delta_energy(layer) == 0:
            return self._unjudged(layer, "zero adapter: nothing is added here")
        factors = linalg.homogeneous(layer)
        found = alignment.published_projection(factors.b, reference)
        if found is None:
            return self._unjudged(layer, "no alignment displacement: alignment did not change this weight")
        return Assessment(
            layer=layer,
            edited=layer.scaled(1 - self.share),
            action=Decision.SCALED,
            score=linalg.compare(found.columns, factors.b, row_gram(factors.a)).cosine,
            null=found.blank.cosine,
        )

    def choose(self, assessments: Sequence[Assessment]) -> Choice:
        """Modules strictly below the threshold; the safe adapter goes there, or everywhere."""
        if self.share == 0:
            return Choice(names=frozenset(), reason="share 0 merges nothing")
        low = frozenset(one.layer.name for one in assessments if one.score is not None and one.score < self.threshold)
        reason = f"the score is not below {self.threshold:g}"
        return Choice(names=low, reason=reason, patched=low if self.reach is Reach.SELECTED else None)

    @staticmethod
    def _unjudged(layer: LoraLayer, why: str) -> Assessment:
        return Assessment(layer=layer, edited=layer, action=Decision.KEPT, unjudged=why)
