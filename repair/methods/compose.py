"""Several methods, one after the other, as one: each works on what the one before it left.

Edits that need no training take away a part of the damage, a patch or a tuned refusal LoRA the rest; what neither
does alone, both together may. The idea is old (2501.06208 adds a safety LoRA to a task LoRA; SafePatching pairs two
patches), the order and the strengths are ours to choose and have to be measured.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from repair.errors import BadParameters
from repair.layer_basis import BasisNeed
from repair.lora import LayerReference, LoraLayer
from repair.method import Assessment, Choice, Cost, Laws, Need, RepairMethod, untouched
from repair.selection import nothing


class Step(BaseModel):
    """One method with its parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: str = Field(description="Name of the method; not `compose` again")
    parameters: Mapping[str, Any] = Field(default_factory=dict, description="Its parameters; defaults for the rest")


class Compose(RepairMethod):
    """Apply several methods, one after the other."""

    name: ClassVar[str] = "compose"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "https://arxiv.org/abs/2501.06208"
    needs: ClassVar[frozenset[Need]] = frozenset()
    cost: ClassVar[Cost] = Cost.SECONDS
    laws: ClassVar[Laws] = Laws(
        noop=MappingProxyType({"steps": ()}),
        revert=MappingProxyType(
            {"steps": ({"method": "safe_lora"}, {"method": "scale", "parameters": {"strength": 0.0}})}
        ),
        trial=MappingProxyType({"steps": ({"method": "safe_lora"}, {"method": "patch"})}),
        never_grows=MappingProxyType({"steps": ({"method": "splora"}, {"method": "scale"})}),
    )

    steps: tuple[Step, ...] = Field(
        default=(), max_length=8, description="In this order; none leaves the adapter as it is"
    )

    @field_validator("steps")
    @classmethod
    def _known(cls, steps: tuple[Step, ...]) -> tuple[Step, ...]:
        """Each is a method, with parameters that it takes; defaults are written out."""
        return tuple(Step(method=one.name, parameters=one.model_dump(mode="json")) for one in map(_parsed, steps))

    @property
    def stages(self) -> tuple[RepairMethod, ...]:
        """The methods themselves."""
        return tuple(map(_parsed, self.steps)) or (self,)

    @property
    def demands(self) -> frozenset[Need]:
        """What any of them needs."""
        return frozenset(need for one in map(_parsed, self.steps) for need in one.demands)

    @property
    def basis_need(self) -> BasisNeed | None:
        """Each stage asks for itself."""
        return None

    @property
    def packs(self) -> tuple[str, ...]:
        """What any of them learns from."""
        return tuple(sorted({pack for one in map(_parsed, self.steps) for pack in one.packs}))

    def assess(self, layer: LoraLayer, reference: LayerReference) -> Assessment:  # noqa: ARG002 - no stage, no opinion
        """The layer as it is: only asked where there is no stage."""
        return untouched(layer)

    def choose(self, assessments: Sequence[Assessment]) -> Choice:  # noqa: ARG002 - as above
        """None."""
        return nothing()


def _parsed(step: Step) -> RepairMethod:
    from repair.methods import METHODS  # noqa: PLC0415 - the registry reads this file

    if step.method not in METHODS or step.method == Compose.name:
        known = ", ".join(name for name in METHODS if name != Compose.name)
        raise ValueError(f"{step.method!r} is no method that can be a step; there are: {known}")
    try:
        return METHODS[step.method].parse(step.parameters)
    except BadParameters as error:
        raise ValueError(str(error)) from error
