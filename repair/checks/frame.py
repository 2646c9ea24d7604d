"""How a request is put when it is not put plainly: under a system prompt, with the reply begun for it, or sampled.

Values only; needs no torch. `framings.py` names the frames that the robustness stage uses.
"""

import hashlib
from dataclasses import dataclass
from typing import Final

_SEED_BITS: Final = 0x7FFFFFFF  # what every server takes for a seed


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Tokens are drawn and not chosen.

    Attributes:
        temperature: Divides the logits; above 0.
        top_p: Only the likeliest tokens that hold this much together are drawn from (Holtzman et al. 2020); in (0, 1].
        seed: With the request it decides every draw.
    """

    temperature: float
    top_p: float
    seed: int

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"a temperature of {self.temperature}: greedy decoding is no sampling")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p of {self.top_p} is no share")

    def seed_of(self, prompt: str) -> int:
        """The request's own seed, so that its reply does not depend on what is asked beside it."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}\n{prompt}".encode()).digest()[:4]) & _SEED_BITS


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What is put around a request.

    Attributes:
        system: System prompt before it, in place of the template's own; None leaves the template alone.
        opening: Words that the reply is made to begin with; they are part of the reply.
        sampling: How tokens are drawn; None for the likeliest ones.
    """

    system: str | None = None
    opening: str = ""
    sampling: Sampling | None = None


PLAIN: Final = Frame()
"""Nothing around it: what every check asks."""
