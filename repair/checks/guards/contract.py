"""What a guard model is asked and how its words are read, apart from who runs it. No torch, no HTTP."""

import hashlib
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

from repair.checks.errors import JudgeUnusable
from repair.checks.judge import Exchange
from repair.checks.judge_settings import JudgeSettings

Message = tuple[str, str]
"""A role and what it says."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """One question to the model: messages for its own chat template, or a whole text.

    Attributes:
        messages: For the chat template.
        template: What else the chat template takes by name.
        opens_answer: Whether the template is told to open the model's turn; the templates of most guards always do.
        parts: Whether each content is a list of parts, as multimodal templates want it.
        text: The whole prompt, where there are no messages.
        begins: Whether the tokenizer puts its first token before the text.
    """

    messages: tuple[Message, ...] = ()
    template: Mapping[str, Any] = field(default_factory=dict)
    opens_answer: bool = False
    parts: bool = False
    text: str = ""
    begins: bool = True


@dataclass(frozen=True, kw_only=True)
class Said:
    """What the model answered; lives in memory only.

    Attributes:
        text: Its words.
        pieces: The same word by word, each with the probability that the model gave it; empty where unknown.
        weights: Probability of each of the guard's choices as the first token, among the choices.
    """

    text: str = ""
    pieces: tuple[tuple[str, float], ...] = ()
    weights: tuple[float, ...] = ()

    def probability(self, start: int, end: int) -> float | None:
        """Of the words between two characters, given what stands before; None where it is unknown."""
        if not self.pieces:
            return None
        at, found = 0, 1.0
        for piece, probability in self.pieces:
            if at < end and at + len(piece) > start:
                found *= probability
            at += len(piece)
        return found if 0 <= found <= 1 else None


@dataclass(frozen=True, kw_only=True)
class Reading:
    """What a guard's answer means; ``refused`` is None where it does not say."""

    harmful: bool
    refused: bool | None
    rule: str
    confidence: float | None = None


class Guard(ABC):
    """One guard model's contract. A class is one entry of `GUARDS`; it is made from the settings."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    max_new_tokens: ClassVar[int] = 16
    clip_tokens: ClassVar[int] = 2048  # of the reply; the template is never cut
    choices: ClassVar[tuple[str, ...]] = ()  # weighed as the first token instead of generating
    harmful_only: ClassVar[bool] = False  # means something for prompts that ask for harm alone
    multimodal: ClassVar[bool] = False
    options: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, settings: JudgeSettings) -> None:
        """Raises JudgeUnusable for an option that the guard does not know, or a template that is not there."""
        unknown = sorted({key for key, _ in settings.options} - self.options)
        if unknown:
            raise JudgeUnusable(f"{self.name} has no option {', '.join(unknown)}", field="options")
        self.settings = settings

    @property
    def identity(self) -> dict[str, str]:
        """What decides the answers besides weights and chat template: pinned texts and options."""
        return {f"option {key}": str(value) for key, value in self.settings.options}

    @abstractmethod
    def asks(self, exchange: Exchange) -> tuple[Ask, ...]:
        """The questions about one exchange, whose texts hold no control strings."""

    @abstractmethod
    def read(self, said: Sequence[Said]) -> Reading | None:
        """What the answers mean; None for anything that is not exactly of the form that the guard was trained on."""


@runtime_checkable
class Asker(Protocol):
    """Whoever runs the model."""

    @property
    def identity(self) -> Mapping[str, str]:
        """Digests or names of weights and template."""

    @property
    def special(self) -> Sequence[str]:
        """Strings that its tokenizer takes for tokens of control."""

    def clip(self, text: str, tokens: int) -> str:
        """The first so many tokens of a text."""

    def say(self, asks: Sequence[Ask], guard: Guard) -> list[Said | str]:
        """One answer for each question, in order, or in a word why there is none."""


def digest_of(text: str) -> str:
    """SHA-256 of a template."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def decided(said: Said, match: re.Match[str], group: int | str) -> float | None:
    """The probability of the word that a parser's group found."""
    return said.probability(match.start(group), match.end(group))


def chat(exchange: Exchange) -> tuple[Message, ...]:
    """The exchange as a conversation of two turns."""
    return (("user", exchange.prompt), ("assistant", exchange.reply))
