"""What a measurement asks of a chat model: replies, losses and log-odds, of one adapter or of several at once.

Values and the interface; `chat.py` is the transformers model behind it, `toy.py` a scripted one, and
`endpoints/openai_backend.py` a model behind HTTP. `tests/checks/contract/` holds all of them to the same laws.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, runtime_checkable

from torch import Tensor

from repair.checks.frame import PLAIN, Frame
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


class Capability(StrEnum):
    """What not every backend can do; replies of the aligned model itself are what each of them gives."""

    ADAPTERS = "adapters"
    """Have adapters on the model."""
    MIXED = "mixed"
    """Work on rows of several adapters at once; who cannot takes them in turns."""
    LOSS = "loss"
    """Score a given answer."""
    MARGIN = "margin"
    """Tell the log-odds of a refusal's first token."""
    DRIFT = "drift"
    """Compare two arms over the whole vocabulary."""
    SYSTEM = "system"
    """Put a system prompt before a request, by the reference's template."""
    OPENING = "opening"
    """Have a reply begin with given words."""
    SAMPLING = "sampling"
    """Draw tokens by a seed."""
    MODULES = "modules"
    """Have its modules listened to and trained: the loaded model itself, not only what it says."""


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a backend cannot do, each with the reason; whatever is not named, it can.

    What is missing leaves a check without its measurement: the check says so, and does not pass.
    """

    missing: Mapping[Capability, str] = field(default_factory=dict)

    def has(self, one: Capability) -> bool:
        """Whether it can be asked for that."""
        return one not in self.missing

    def as_dict(self) -> dict[str, str]:
        """For the report: the reason by the name of what is missing."""
        return {one.value: why for one, why in sorted(self.missing.items())}


def known_arms(arms: Sequence[int], count: int) -> Sequence[int]:
    """The arms as they are; raises ValueError for one that is not at hand, which would be measured as another."""
    for arm in arms:
        if not 0 <= arm < count:
            raise ValueError(f"arm {arm} of {count} is not at hand")
    return arms


@runtime_checkable
class Backend(Protocol):
    """A chat model with interchangeable adapters, as the checks and the planner see it."""

    @property
    def tokens(self) -> int:
        """Positions put through the model so far: the cost of measuring, counted and not timed."""

    def fingerprint(self) -> dict[str, str]:
        """What decides the numbers besides the weights: versions, dtype, device, template."""

    def capabilities(self) -> Capabilities:
        """What it cannot do, and why; asked before it is relied on."""

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
        frame: Frame = PLAIN,
    ) -> list[Reply]:
        """One reply per prompt, in order: greedy, or as ``frame`` says; the words it begins a reply with are in it.

        A backend that cannot stop a reply does not ask ``settled``. Drawn replies depend on the seed and the prompt,
        not on what else is asked.
        """

    def loss(self, samples: Sequence[Sample], *, arms: Sequence[int] | None = None) -> list[float]:
        """Mean negative log-likelihood per answer token, one per sample."""

    def margin(self, prompts: Sequence[str], *, arms: Sequence[int] | None = None) -> list[float]:
        """Log-odds that the reply opens like a refusal; one forward pass per prompt."""

    def anchor(self, prompts: Sequence[str]) -> Anchor:
        """What the arm that is on would say, to measure how far others are from it."""

    def drift(self, anchor: Anchor, *, arms: Sequence[int] | None = None) -> list[float]:
        """Mean KL per token from the anchored arm along its own replies; all replies once for each arm named."""
