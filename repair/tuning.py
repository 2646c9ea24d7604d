"""Train a small LoRA on a chat model: the only place in `repair/` where gradients flow.

Supervised tuning on short exchanges, with the base frozen and whatever adapter is armed left in place underneath.
Made for a few CPU cores: rows are short, and what a step costs is kept small (`tuning_step.py`). It knows no refusals
and no adapters' files; `refusal_tune` and the zoo do.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from repair.context import Progress, silent
from repair.errors import BadParameters, MissingWeight
from repair.lora import LoraAdapter, LoraLayer
from repair.roles import block_of, is_linear, is_turned
from repair.tuning_rows import Example, batches, encode
from repair.tuning_step import Trainer

__all__ = ["ALL_LINEARS", "Cancelled", "Example", "TuneSettings", "Watch", "fit", "tune_lora"]

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True, kw_only=True)
class TuneSettings:
    """How to train. Equal settings, rows and thread count on one kind of device give equal weights.

    Attributes:
        rank: Inner dimension of every new factor pair.
        alpha: The scale is ``alpha / rank``.
        targets: How the paths of the linears to adapt end: last parts, or more of them, or whole paths.
        blocks: First and one past the last block to adapt; None for all.
        steps: Optimizer steps.
        batch_size: Rows in a step.
        learning_rate: Its peak; warm-up, then a cosine to zero.
        warmup: Steps until the peak.
        max_tokens: A row longer than this loses the end of its answer.
        chunks: Into how many forward passes of rows of like length a step is cut; less padding.
        clip: Largest gradient norm.
        seed: Of the first factor and of the order of rows.
    """

    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = ALL_LINEARS
    blocks: tuple[int, int] | None = None
    steps: int = 100
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup: int = 8
    max_tokens: int = 96
    chunks: int = 2
    clip: float = 1.0
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Watch:
    """Looks at the model now and then while it learns; the weights of the last look that was content are kept.

    Training goes on after a look that was not: what a model learns first is often too broad, and narrows later.

    Attributes:
        content: Whether the model may be kept as it is now.
        every: Steps between two looks; one look more follows the last step.
    """

    content: Callable[[], bool]
    every: int


class Cancelled(Exception):
    """The caller no longer wants the result."""


def tune_lora(
    model: Any,
    tokenizer: Any,
    examples: Sequence[Example],
    settings: TuneSettings,
    *,
    watch: Watch | None = None,
    progress: Progress = silent,
    cancelled: Callable[[], bool] = lambda: False,
) -> LoraAdapter:
    """Train a LoRA on top of whatever ``model`` does now; the model itself is left as it was.

    A note says so where ``watch`` kept the weights of an earlier step; those of step 0 add nothing.
    Raises BadParameters when nothing fits the settings, Cancelled when ``cancelled`` says so.
    """
    modules = _targets(model, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    factors = {name: _Factors.start(module, settings, generator) for name, module in modules.items()}
    handles = [modules[name].register_forward_hook(one.hook) for name, one in factors.items()]
    try:
        with _asleep(factors.values()) as off:
            kept = fit(
                model,
                tokenizer,
                [p for one in factors.values() for p in (one.a, one.b)],
                examples,
                settings,
                without=off,
                watch=watch,
                progress=progress,
                cancelled=cancelled,
            )
    finally:
        for handle in handles:
            handle.remove()
    return LoraAdapter(
        layers=tuple(
            LoraLayer(
                name=name,
                a=one.a.detach().cpu(),
                b=one.b.detach().cpu(),
                scale=settings.alpha / settings.rank,
                dtype=torch.bfloat16,
                transposed=is_turned(modules[name]),
            )
            for name, one in factors.items()
        ),
        notes=(f"the weights after {kept} of {settings.steps} steps were kept",) if kept < settings.steps else (),
    )


def fit(
    model: Any,
    tokenizer: Any,
    parameters: Sequence[nn.Parameter],
    examples: Sequence[Example],
    settings: TuneSettings,
    *,
    without: Callable[[], Any],
    watch: Watch | None = None,
    progress: Progress = silent,
    cancelled: Callable[[], bool] = lambda: False,
) -> int:
    """Train ``parameters``, wherever in ``model`` they sit; everything else stays frozen.

    ``without()`` is a context in which they have no effect; it tells what a row with ``keep`` holds on to. In the end
    the parameters are what they were when ``watch`` was last content, as they came when it never was; returned is after
    how many steps that was.
    """
    rows = [encode(tokenizer, example, settings.max_tokens) for example in examples]
    if not rows or settings.steps < 1:
        raise BadParameters("nothing to learn from", field="examples")
    trainer = Trainer(model=model, pad=tokenizer.pad_token_id or 0, without=without)
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, weight_decay=0.0)
    accepted = _Accepted.start(parameters)
    with _frozen(model, parameters):
        for step, batch in enumerate(batches(rows, size=settings.batch_size, count=settings.steps, seed=settings.seed)):
            if cancelled():
                raise Cancelled
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * _schedule(step, settings)
            loss = trainer.loss(batch, settings.chunks)
            torch.autograd.backward(loss, inputs=list(parameters))
            nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            progress(f"loss {float(loss.detach()):.3f}", (step + 1) / settings.steps)
            if watch is None or ((step + 1) % watch.every and step + 1 < settings.steps):
                continue
            if watch.content():
                accepted = _Accepted.start(parameters, steps=step + 1)
    return settings.steps if watch is None else accepted.restore()


@dataclass(frozen=True, kw_only=True)
class _Accepted:
    """What the parameters were when somebody was last content with them."""

    parameters: Sequence[nn.Parameter]
    values: list[Tensor]
    steps: int

    @classmethod
    def start(cls, parameters: Sequence[nn.Parameter], *, steps: int = 0) -> "_Accepted":
        """As they are now."""
        return cls(parameters=parameters, values=[one.detach().clone() for one in parameters], steps=steps)

    def restore(self) -> int:
        """Put them back. Returns after how many steps that was."""
        with torch.no_grad():
            for parameter, value in zip(self.parameters, self.values, strict=True):
                parameter.copy_(value)
        return self.steps


def _schedule(step: int, settings: TuneSettings) -> float:
    """Share of the peak learning rate: a line up, a cosine down."""
    up = min(1.0, (step + 1) / max(settings.warmup, 1))
    return up * 0.5 * (1.0 + math.cos(math.pi * step / settings.steps))


@dataclass(kw_only=True)
class _Factors:
    """The new pair of one linear, as a forward hook."""

    a: nn.Parameter
    b: nn.Parameter
    scale: float
    awake: bool = True

    @classmethod
    def start(cls, module: nn.Module, settings: TuneSettings, generator: torch.Generator) -> "_Factors":
        """A random first factor and a zero second one: no effect yet."""
        weight: Tensor = module.weight  # type: ignore[assignment]  # every linear holds a tensor
        out_features, in_features = weight.shape[::-1] if is_turned(module) else weight.shape
        first = torch.randn((settings.rank, in_features), generator=generator) / math.sqrt(in_features)
        second = torch.zeros(out_features, settings.rank)
        device = weight.device
        return cls(
            a=nn.Parameter(first.to(device)),
            b=nn.Parameter(second.to(device)),
            scale=settings.alpha / settings.rank,
        )

    def hook(self, _module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Add the update to what the module says."""
        if not self.awake:
            return output
        narrow = functional.linear(args[0], self.a.to(output.dtype))
        return output + functional.linear(narrow, (self.b * self.scale).to(output.dtype))


@contextmanager
def _asleep(factors: Any) -> Iterator[Callable[[], Any]]:
    """Gives a context in which the new factors have no effect."""

    @contextmanager
    def off() -> Iterator[None]:
        for one in factors:
            one.awake = False
        try:
            yield
        finally:
            for one in factors:
                one.awake = True

    yield off


@contextmanager
def _frozen(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Only ``parameters`` take gradients inside the block."""
    before = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for p, _ in before:
            p.requires_grad_(False)  # noqa: FBT003 - torch's own signature
        for p in parameters:
            p.requires_grad_(True)  # noqa: FBT003 - as above
        yield
    finally:
        for p, flag in before:
            p.requires_grad_(flag)


def _targets(model: nn.Module, settings: TuneSettings) -> dict[str, nn.Module]:
    """The linears that the settings name, in the model's order."""
    first, last = settings.blocks or (0, 10**9)
    ends = tuple(f".{target}" for target in settings.targets)
    found = {
        name: module
        for name, module in model.named_modules()
        if is_linear(module) and f".{name}".endswith(ends) and first <= block_of(name) < last
    }
    if not found:
        raise MissingWeight(f"no linear is called {' or '.join(settings.targets)}", field="targets")
    return found
