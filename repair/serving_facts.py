"""What vLLM, SGLang, TGI and llama.cpp do with the LoRA adapters that they are given, as rows of a table.

Facts about engines age: each list says which version it was read from. What depends on the model's class or on how a
server was started is a condition, not a yes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from repair.lora import ExtraKind
from repair.ranks import STEPS
from repair.serving_traits import Traits


class Taken(StrEnum):
    """What becomes of the adapter in an engine."""

    YES = "yes"
    """Served as it is."""
    IF = "if"
    """Served as it is on a condition that the adapter does not tell."""
    NO = "no"
    """Refused."""
    ALTERED = "altered"
    """Loaded, and served as something else, with a warning at most."""


@dataclass(frozen=True, kw_only=True)
class Fact:
    """Something that an engine does with adapters that have a trait."""

    applies: Callable[[Traits], object]
    taken: Taken
    why: str


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A serving engine, as its source was at some time.

    Attributes:
        name: What it is called.
        source: Which version these facts are from.
        facts: What it does.
        steps: Whether room is reserved for a largest rank, in `ranks.STEPS`.
    """

    name: str
    source: str
    facts: tuple[Fact, ...]
    steps: bool = False


def _extra(*kinds: ExtraKind) -> Callable[[Traits], object]:
    return lambda traits: traits.kinds & set(kinds)


_DORA: Final[Callable[[Traits], object]] = lambda traits: traits.adapter.uses_dora  # noqa: E731 - a row of the table

ENGINES: Final = (
    Engine(
        name="vllm",
        source="vLLM 0.33, 2026",
        steps=True,
        facts=(
            Fact(applies=_DORA, taken=Taken.NO, why="DoRA is refused"),
            Fact(applies=_extra(ExtraKind.MODULE), taken=Taken.NO, why="modules_to_save is refused"),
            Fact(applies=_extra(ExtraKind.BIAS), taken=Taken.NO, why="a bias other than none is refused"),
            Fact(applies=_extra(ExtraKind.TOKENS), taken=Taken.NO, why="trained tokens are refused"),
            Fact(applies=lambda t: t.lora_bias, taken=Taken.NO, why="lora_B.bias is no name that it knows"),
            Fact(applies=lambda t: t.rank > STEPS[-1], taken=Taken.NO, why=f"no rank above {STEPS[-1]}"),
            Fact(
                applies=lambda t: not t.one_scale,
                taken=Taken.ALTERED,
                why="one scale is made of r and lora_alpha; alpha_pattern and rank_pattern are not read",
            ),
            Fact(
                applies=lambda t: t.embeddings or t.head,
                taken=Taken.IF,
                why="the model's class must allow it for embeddings, and the vocabulary must be the base's",
            ),
            Fact(
                applies=lambda t: t.fused or t.apart,
                taken=Taken.IF,
                why="the model's class must allow it for experts",
            ),
        ),
    ),
    Engine(
        name="sglang",
        source="SGLang 0.5, 2026",
        facts=(
            Fact(applies=_DORA, taken=Taken.NO, why="DoRA is refused"),
            Fact(
                applies=lambda t: not t.plain_scale,
                taken=Taken.ALTERED,
                why="the scale is lora_alpha / r for every module; rsLoRA and patterns are not applied",
            ),
            Fact(
                applies=lambda t: t.kinds or t.lora_bias,
                taken=Taken.ALTERED,
                why="tensors that are no factors are left out with a warning, or refused with --lora-strict-loading",
            ),
            Fact(
                applies=lambda t: t.pattern,
                taken=Taken.IF,
                why="target_modules is a pattern: the modules must be named with --lora-target-modules",
            ),
            Fact(
                applies=lambda t: t.embeddings or t.head,
                taken=Taken.IF,
                why="embeddings and heads are known by a few names, and no token may be added",
            ),
            Fact(applies=lambda t: t.fused or t.apart, taken=Taken.IF, why="experts: by version and model"),
        ),
    ),
    Engine(
        name="tgi",
        source="TGI 3, 2025",
        facts=(
            Fact(applies=_DORA, taken=Taken.ALTERED, why="the magnitudes of DoRA are left out"),
            Fact(
                applies=lambda t: t.kinds or t.lora_bias,
                taken=Taken.ALTERED,
                why="tensors that are no factors are left out with a warning",
            ),
            Fact(
                applies=lambda t: not t.one_scale,
                taken=Taken.ALTERED,
                why="one scale is made of r and lora_alpha; alpha_pattern and rank_pattern are not read",
            ),
            Fact(
                applies=lambda t: t.fused or t.apart or t.unknown_to_tgi,
                taken=Taken.ALTERED,
                why="only q, k, v, o, gate, up and down projections and lm_head are looked for; others are left out",
            ),
            Fact(
                applies=lambda t: t.with_gaps,
                taken=Taken.ALTERED,
                why="a kind of module that is not adapted in every block is left out in all of them",
            ),
        ),
    ),
    Engine(
        name="llama.cpp",
        source="llama.cpp convert_lora_to_gguf.py, 2026",
        facts=(
            Fact(applies=_DORA, taken=Taken.NO, why="the converter stops at a magnitude"),
            Fact(
                applies=lambda t: t.kinds or t.lora_bias,
                taken=Taken.NO,
                why="the converter stops at a tensor that is no factor",
            ),
            Fact(applies=lambda t: t.fused, taken=Taken.NO, why="the converter knows no packed experts"),
            Fact(
                applies=lambda t: not t.scale_by_tensor,
                taken=Taken.ALTERED,
                why="the scale is lora_alpha / rank for every module; rsLoRA and alpha_pattern are not read",
            ),
            Fact(applies=lambda t: t.apart, taken=Taken.IF, why="every expert of a block must be adapted"),
            Fact(applies=lambda t: t.head, taken=Taken.IF, why="a head that is tied to the embedding is refused"),
            Fact(
                applies=lambda t: t.turned,
                taken=Taken.IF,
                why="not tried with models that store their weights as in x out",
            ),
        ),
    ),
)
