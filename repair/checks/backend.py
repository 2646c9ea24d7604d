"""What a measurement asks of a chat model: replies, losses and log-odds, of one adapter or of several at once.

Values and the interface; `chat.py` is the transformers model behind it, `toy.py` a scripted one.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from repair.checks.scoring import Pair
from repair.lora import LoraAdapter

Settled = Callable[[Sequence[int], Sequence[str]], Sequence[bool]]
"""Told which prompts are being answered, by place, and the reply to each so far: which replies need not go on."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What the model said to one prompt; lives in memory only."""

    text: str
    finish: str  # "stop"; "length" when the token limit cut it off; "settled" when no more of it was needed
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One prompt with the answer that the uploader's task wants."""

    prompt: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Anchor:
    """Replies of one arm as token ids, with its log-probabilities along them; lives in memory only."""

    pairs: tuple[Pair, ...]
    log_probs: tuple[Tensor, ...]


@runtime_checkable
class Backend(Protocol):
    """A chat model with interchangeable adapters, as the checks and the planner see it."""

    @property
    def tokens(self) -> int:
        """Positions put through the model so far: the cost of measuring, counted and not timed."""

    def fingerprint(self) -> dict[str, str]:
        """What decides the numbers besides the weights: versions, dtype, device, template."""

    def arm(self, adapter: LoraAdapter | None) -> AbstractContextManager[None]:
        """Have the adapter on the model inside the block; None is the aligned model itself."""

    def arms(self, adapters: Sequence[LoraAdapter | None]) -> AbstractContextManager[None]:
        """Have several adapters at hand inside the block; what is asked there says which one by its place."""

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        batch_size: int,
        arms: Sequence[int] | None = None,
        settled: Settled | None = None,
    ) -> list[Reply]:
        """Greedy replies, one per prompt, in order. A backend that cannot stop a reply does not ask ``settled``."""

    def loss(self, samples: Sequence[Sample], *, arms: Sequence[int] | None = None) -> list[float]:
        """Mean negative log-likelihood per answer token, one per sample."""

    def margin(self, prompts: Sequence[str], *, arms: Sequence[int] | None = None) -> list[float]:
        """Log-odds that the reply opens like a refusal; one forward pass per prompt."""

    def anchor(self, prompts: Sequence[str]) -> "Anchor":
        """What the arm that is on would say, to measure how far others are from it."""

    def drift(self, anchor: "Anchor", *, arms: Sequence[int] | None = None) -> list[float]:
        """Mean KL per token from the anchored arm along its own replies; all replies once for each arm named."""
