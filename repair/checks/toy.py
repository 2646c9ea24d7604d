"""A scripted chat model behind the same interface, for statistics and planner tests: no weights, exact ground truth."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from repair.checks.backend import Anchor, Capabilities, Capability, Reply, Sample, Settled, known_arms
from repair.checks.frame import PLAIN, Frame
from repair.lora import LoraAdapter

_ASKED_EVERY = 8  # words, as a real model is asked every few tokens


@dataclass(frozen=True, kw_only=True)
class _Start(Anchor):
    """The arm itself; a script needs no log-probabilities."""

    adapter: LoraAdapter | None


@dataclass(kw_only=True)
class ToyChat:
    """Says what the script says.

    Attributes:
        script: The reply to a prompt, given the adapter that is on.
        losses: Mean loss on one sample, given the adapter.
        drifts: KL per token between two arms.
        margins: Log-odds of a refusal, given the prompt and the adapter.
        framed: What it says when a request is not put plainly; None for the script's words. The opening is not in it.
        missing: What it is to be unable of; a script has no modules.
        asked: How many prompts were put so far; tests of early stopping read it.
        tokens: Words read and said so far; words are this model's tokens.
    """

    script: Callable[[str, LoraAdapter | None], str]
    losses: Callable[[Sample, LoraAdapter | None], float] = lambda _sample, _adapter: 1.0
    drifts: Callable[[LoraAdapter | None, LoraAdapter | None], float] = lambda _start, _end: 0.0
    margins: Callable[[str, LoraAdapter | None], float] = lambda _prompt, _adapter: 0.0
    framed: Callable[[str, LoraAdapter | None, Frame], str] | None = None
    missing: Mapping[Capability, str] = field(
        default_factory=lambda: {Capability.MODULES: "a scripted model has no modules"}
    )
    asked: int = 0
    tokens: int = 0
    _on: list[Sequence[LoraAdapter | None]] = field(default_factory=lambda: [(None,)])

    def fingerprint(self) -> dict[str, str]:
        """No weights, no versions."""
        return {"backend": "toy"}

    def capabilities(self) -> Capabilities:
        """What the test says."""
        return Capabilities(missing=self.missing)

    @contextmanager
    def arm(self, adapter: LoraAdapter | None) -> Iterator[None]:
        """Have the adapter on inside the block."""
        with self.arms([adapter]):
            yield

    @contextmanager
    def arms(self, adapters: Sequence[LoraAdapter | None]) -> Iterator[None]:
        """Have several at hand inside the block."""
        self._on.append(tuple(adapters))
        try:
            yield
        finally:
            self._on.pop()

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        batch_size: int = 32,
        arms: Sequence[int] | None = None,
        settled: Settled | None = None,
        frame: Frame = PLAIN,
    ) -> list[Reply]:
        """The script's words, cut to the limit, and where no more of them are needed."""
        if batch_size < 1:
            raise ValueError(batch_size)
        self.asked += len(prompts)
        words = [
            self._words(prompt, one, frame).split(" ")
            for prompt, one in zip(prompts, self._own(prompts, arms), strict=True)
        ]
        self._read(prompts if frame.system is None else [f"{frame.system} {prompt}" for prompt in prompts])
        limit = max_new_tokens + len(frame.opening.split())
        replies = [_said(at, one, limit, settled or _never_enough) for at, one in enumerate(words)]
        self.tokens += sum(reply.tokens for reply in replies)
        return replies

    def loss(self, samples: Sequence[Sample], *, arms: Sequence[int] | None = None) -> list[float]:
        """What the test says each sample costs."""
        self._read([f"{sample.prompt} {sample.answer}" for sample in samples])
        return [self.losses(sample, one) for sample, one in zip(samples, self._own(samples, arms), strict=True)]

    def margin(self, prompts: Sequence[str], *, arms: Sequence[int] | None = None) -> list[float]:
        """What the test says."""
        self._read(prompts)
        return [self.margins(prompt, one) for prompt, one in zip(prompts, self._own(prompts, arms), strict=True)]

    def anchor(self, prompts: Sequence[str]) -> Anchor:
        """The arm that is on."""
        self._read(prompts)
        return _Start(pairs=tuple(([], []) for _ in prompts), log_probs=(), adapter=self._on[-1][0])

    def drift(self, anchor: Anchor, *, arms: Sequence[int] | None = None) -> list[float]:
        """What the test says."""
        if not isinstance(anchor, _Start):
            raise TypeError(anchor)
        ends = [self._on[-1][arm] for arm in self._said(arms, 1) for _ in anchor.pairs]
        self.tokens += len(ends)
        return [self.drifts(anchor.adapter, end) for end in ends]

    def _words(self, prompt: str, on: LoraAdapter | None, frame: Frame) -> str:
        plain = self.framed is None or frame == PLAIN
        said = self.script(prompt, on) if plain or self.framed is None else self.framed(prompt, on, frame)
        return f"{frame.opening} {said}".lstrip()

    def _own(self, what: Sequence[object], arms: Sequence[int] | None) -> list[LoraAdapter | None]:
        return [self._on[-1][arm] for arm in self._said(arms, len(what))]

    def _said(self, arms: Sequence[int] | None, count: int) -> Sequence[int]:
        """The arms that were named, or the one that is on."""
        at_hand = len(self._on[-1])
        if arms is None and at_hand > 1:
            raise ValueError("several adapters are at hand: say which one is asked")
        return known_arms([0] * count if arms is None else arms, at_hand)

    def _read(self, texts: Sequence[str]) -> None:
        self.tokens += sum(text.count(" ") + 1 for text in texts)


def _said(at: int, words: Sequence[str], limit: int, settled: Settled) -> Reply:
    """The first words up to the limit, fewer where fewer settle it."""
    for count in range(_ASKED_EVERY, min(len(words), limit), _ASKED_EVERY):
        text = " ".join(words[:count])
        if settled([at], [text])[0]:
            return Reply(text=text, finish="settled", tokens=count)
    finish = "stop" if len(words) <= limit else "length"
    return Reply(text=" ".join(words[:limit]), finish=finish, tokens=min(len(words), limit))


def _never_enough(places: Sequence[int], _texts: Sequence[str]) -> Sequence[bool]:
    return [False] * len(places)
