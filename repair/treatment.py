"""What is to become of tensors that replace something of the model as a whole; `replacements.py` does it.

Declarations only, without torch: a policy and the command line name a treatment before anything is loaded.
"""

from dataclasses import dataclass
from enum import StrEnum

from repair.errors import BadParameters


class Treatment(StrEnum):
    """What becomes of a replacement."""

    REFUSE = "refuse"
    """The adapter is not repaired."""
    DROP = "drop"
    """It is left out: the served model keeps its own tensor."""
    REVERT = "revert"
    """It stays in the file with the values of the aligned model, for loaders that expect it there."""
    INTERPOLATE = "interpolate"
    """``(1 - strength) * aligned + strength * uploaded``."""


@dataclass(frozen=True, kw_only=True)
class Replacements:
    """How replacements are treated; ``strength`` is the uploaded share of an interpolation."""

    treatment: Treatment = Treatment.REFUSE
    strength: float = 0.5

    @classmethod
    def parse(cls, text: str) -> "Replacements":
        """``refuse``, ``drop``, ``revert``, ``interpolate`` or ``interpolate=0.3``; raises BadParameters."""
        name, _, share = text.partition("=")
        try:
            found = cls(treatment=Treatment(name), strength=float(share) if share else 0.5)
        except ValueError as error:
            there = ", ".join(one.value for one in Treatment)
            raise BadParameters(f"one of {there}, the last with =SHARE: {text!r}", field="replacements") from error
        if not 0 <= found.strength <= 1 or (share and found.treatment is not Treatment.INTERPOLATE):
            raise BadParameters("only interpolate takes a share, from 0 to 1", field="replacements")
        return found

    @property
    def refuses(self) -> bool:
        """Whether an adapter that brings any is not taken."""
        return self.treatment is Treatment.REFUSE

    def __str__(self) -> str:
        """As it is written in a policy, the share of an interpolation always said."""
        return f"{self.treatment}={self.strength:g}" if self.treatment is Treatment.INTERPOLATE else str(self.treatment)
