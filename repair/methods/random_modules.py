"""The other control: revert modules drawn by lot. A ranking that does not beat it ranks nothing."""

from collections.abc import Sequence
from types import MappingProxyType
from typing import ClassVar

from pydantic import Field

from gate.of_modules import COUNT, MARK
from repair.lora import LayerReference, LoraLayer
from repair.method import MOST_MODULES, Assessment, Choice, Cost, Decision, Laws, Need, RepairMethod
from repair.selection import at_random

DEFAULT_COUNT = 10
"""As many as SPLoRA prunes."""


class RandomModules(RepairMethod):
    """Revert modules drawn by lot to the aligned model: a control, not a repair."""

    name: ClassVar[str] = "random_modules"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "https://arxiv.org/abs/2506.18931"
    needs: ClassVar[frozenset[Need]] = frozenset()
    cost: ClassVar[Cost] = Cost.SECONDS
    laws: ClassVar[Laws] = Laws(
        noop=MappingProxyType({"count": 0}),
        idempotent=MappingProxyType({"count": 2}),
    )

    count: int | None = Field(
        default=None,
        ge=0,
        le=MOST_MODULES,
        description="How many modules to revert; 10 when not given, or all where there are fewer",
        json_schema_extra={MARK: COUNT},
    )
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="Seed of the lot")

    def assess(self, layer: LoraLayer, reference: LayerReference) -> Assessment:  # noqa: ARG002 - reads the adapter only
        """The module without its update."""
        return Assessment(layer=layer, edited=layer.zeroed(), action=Decision.DROPPED)

    def choose(self, assessments: Sequence[Assessment]) -> Choice:
        """``count`` modules by lot, each lot drawn from the names of the modules alone."""
        return at_random(assessments, DEFAULT_COUNT if self.count is None else self.count, self.seed)
