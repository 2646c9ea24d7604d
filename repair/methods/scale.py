"""Shrink the update: the line between the aligned model and the adapted one (methods M4; WiSE-FT in LoRA form).

One strength for all modules, or one for each: shrinking only the modules that a score speaks against is the cheapest
selective repair.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, Field

from gate.of_modules import MARK, NAMES, fits
from repair.lora import LayerReference, LoraLayer
from repair.method import Assessment, Choice, Cost, Decision, Laws, Need, RepairMethod

Strength = Annotated[float, Field(ge=0, le=1)]
Pattern = Annotated[str, Field(min_length=1, max_length=200)]
Rule = tuple[Pattern, Strength]
MOST_RULES = 1000
Rules = Annotated[list[Rule], Field(max_length=MOST_RULES)]


def _in_order(value: Any) -> Any:
    """A mapping as pairs: records are stored as canonical JSON, which sorts keys but keeps the order of a list."""
    return tuple(value.items()) if isinstance(value, Mapping) else value


class Scale(RepairMethod):
    """Multiply the update of every module, or of some, by one number: the control that others must beat.

    Exact, free, same rank: ``(1 - strength) * aligned + strength * adapted``. With DoRA, see `repair.dora`.
    """

    name: ClassVar[str] = "scale"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "https://arxiv.org/abs/2412.19512"
    needs: ClassVar[frozenset[Need]] = frozenset()
    cost: ClassVar[Cost] = Cost.SECONDS
    laws: ClassVar[Laws] = Laws(noop=MappingProxyType({"strength": 1.0}), revert=MappingProxyType({"strength": 0.0}))

    strength: float = Field(default=0.5, ge=0, le=1, description="What the update is multiplied by; 1 keeps it")
    modules: str = Field(
        default="*",
        max_length=200,
        description="Shell pattern over module paths; others are left alone",
        json_schema_extra={MARK: NAMES},
    )
    strengths: Annotated[
        tuple[Rule, ...],
        Field(max_length=MOST_RULES),
        BeforeValidator(_in_order, json_schema_input_type=dict[str, Strength] | Rules),
    ] = Field(
        default=(),
        description="Strengths of single modules, by path or shell pattern, as a mapping or as pairs; the first that "
        "matches wins over strength and modules. Pairs keep their order in every record",
        json_schema_extra={MARK: NAMES},
    )

    def assess(self, layer: LoraLayer, reference: LayerReference) -> Assessment:  # noqa: ARG002 - reads the adapter only
        """The shrunken layer; there is nothing to score."""
        strength = self._own(layer.name)
        strength = self.strength if strength is None else strength
        action = Decision.DROPPED if strength == 0 else Decision.SCALED
        return Assessment(layer=layer, edited=layer.scaled(strength), action=action)

    def choose(self, assessments: Sequence[Assessment]) -> Choice:
        """Every module that has a strength of its own or that the pattern names, save those at full strength."""
        if self.strength == 1 and not self.strengths:
            return Choice(names=frozenset(), reason="strength 1 keeps every module")
        moved = [one.layer.name for one in assessments if one.edited is not one.layer]
        chosen = frozenset(name for name in moved if self._own(name) is not None or fits(name, self.modules))
        reason = f"the path does not match {self.modules}"
        return Choice(names=chosen, reason=f"its strength is 1, or {reason}" if self.strengths else reason)

    def _own(self, name: str) -> float | None:
        """The first strength that is meant for this module; None when none is."""
        return next((strength for pattern, strength in self.strengths if fits(name, pattern)), None)
