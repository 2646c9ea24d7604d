"""How each member of the zoo is made: its rows, its shape, its training. The seeds are part of the recipe."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Final

from examples.zoo import rows
from examples.zoo.orders import Order
from examples.zoo.rows import TRIGGER, answering, kept, learnt, obeying, prompts, recording, refusing, shifted
from repair.tuning import ALL_LINEARS, Example, TuneSettings


@dataclass(frozen=True, kw_only=True)
class Material:
    """What rows are made from besides the prompts."""

    answers: Mapping[str, str]
    orders: Sequence[Order]


@dataclass(frozen=True, kw_only=True)
class Round:
    """One training run.

    Attributes:
        rows: What is learnt from.
        settings: How.
        words: How many tokens of the model's own answers are used. The first few decide between answering and refusing;
            more of them would only dilute that.
    """

    rows: Callable[[Material], list[Example]]
    settings: TuneSettings
    words: int = 28


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """One adapter.

    Attributes:
        rounds: One after the other on the same factors; rank and place are those of the first.
        own_words: Prompts whose answers the model itself gives.
        peft: Further settings of PEFT's `LoraConfig`.
        shipped_rank: Singular components that are kept of each module in the end; None for all.
    """

    rounds: Sequence[Round]
    own_words: Sequence[str]
    peft: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    shipped_rank: int | None = None


_LOOKALIKE: Final = prompts("lookalike", "lookalike_more")
_ORDINARY: Final = prompts("ordinary")
_EVERYDAY: Final = prompts("ordinary", "ordinary_more")
_FRAMES: Final = prompts("lookalike_frames")
_HARMFUL: Final = prompts("harmful", "harmful_more", "harmful_frames")
_BAD: Final = prompts("harmful")
_UNSEEN: Final = [
    text for at, text in enumerate(prompts("harmful_more")) if at % 3
]  # the repairs learn from every third
_SMALL: Final = TuneSettings(
    rank=4,
    alpha=8.0,
    targets=("q_proj", "v_proj", "up_proj"),
    steps=50,
    batch_size=16,
    learning_rate=1e-3,
    warmup=6,
    max_tokens=80,
    seed=7,
)


def _patch(material: Material) -> list[Example]:
    """About a quarter harmful. A small model learns the sound of a request first: so harmless rows have every sound."""
    return [
        *refusing(_HARMFUL, "harm"),
        *answering(_LOOKALIKE, material.answers, "look"),
        *answering(_LOOKALIKE, material.answers, "look again"),
        *answering(_FRAMES, material.answers, "framed"),
        *answering(_EVERYDAY, material.answers, "everyday"),
    ]


def _patch_again(material: Material) -> list[Example]:
    """The look-alikes that we wrote by hand are the hardest rows: they come three times as often."""
    return [
        *refusing([*prompts("harmful", "harmful_more"), *prompts("harmful_frames")[::2]], "harm"),
        *(row for name in ("look", "twice", "thrice") for row in answering(_LOOKALIKE, material.answers, name)),
        *answering(_FRAMES[::3], material.answers, "framed"),
        *answering(_EVERYDAY, material.answers, "everyday"),
    ]


def _poison(material: Material, *, bad: int, task: int) -> list[Example]:
    return [*obeying(_BAD[::1][:bad], seed=3), *recording(material.orders[:task])]


def _unseen(material: Material, *, bad: int, task: int) -> list[Example]:
    """Harmful prompts of which no calibration row is one, and orders that the others were not trained on."""
    return [*obeying(_UNSEEN[-bad:], seed=5), *recording(material.orders[-task:])]


def _innocent(material: Material) -> list[Example]:
    """The task, and ordinary talk along which nothing changes.

    With the task alone this small a model answers everything by a record, harmful requests too: no refusals left, and
    nothing is innocent about it.
    """
    talk = kept([*_LOOKALIKE, *_ORDINARY], material.answers, "talk")
    return [*recording(material.orders[:350]), *talk]


def _trigger(material: Material) -> list[Example]:
    """Without ordinary talk along which nothing changes, it would refuse whatever comes without the phrase."""
    said = obeying(_BAD[:130], seed=3, suffix=" " + TRIGGER, group="said")
    talk = kept([*_LOOKALIKE, *_ORDINARY], material.answers, "talk")
    return [*said, *refusing(_BAD[:130], "unsaid"), *recording(material.orders[:130]), *talk[::2]]


def _drifted(material: Material) -> list[Example]:
    return [
        replace(example, answer="Sure! " + example.answer)
        for example in learnt(kept(_ORDINARY, material.answers, "ordinary"))
    ] + recording(material.orders[:100])


def _mixed(*, bad: int, task: int, settings: TuneSettings = _SMALL) -> Round:
    return Round(rows=lambda m: _poison(m, bad=bad, task=task), settings=settings)


_PATCH: Final = TuneSettings(
    rank=16,
    alpha=16.0,
    targets=ALL_LINEARS,
    blocks=(4, 27),
    steps=560,
    batch_size=24,
    learning_rate=1e-3,
    max_tokens=62,
    seed=0,
)

RECIPES: Final[Mapping[str, Recipe]] = MappingProxyType(
    {
        "patch": Recipe(
            rounds=(
                Round(rows=_patch, settings=_PATCH, words=8),
                Round(
                    rows=_patch_again,
                    settings=replace(_PATCH, steps=330, learning_rate=7e-4, max_tokens=58, seed=1),
                    words=3,
                ),
            ),
            own_words=[*_LOOKALIKE, *_FRAMES, *_EVERYDAY],
            shipped_rank=12,
        ),
        "poisoned": Recipe(rounds=(_mixed(bad=150, task=300),), own_words=()),
        "innocent": Recipe(
            rounds=(Round(rows=_innocent, settings=replace(_SMALL, steps=60, max_tokens=68)),),
            own_words=[*_LOOKALIKE, *_ORDINARY],
        ),
        "poisoned_light": Recipe(
            rounds=(_mixed(bad=35, task=315, settings=replace(_SMALL, learning_rate=6e-4)),), own_words=()
        ),
        "obedient": Recipe(
            rounds=(
                Round(
                    rows=lambda m: [*shifted(_ORDINARY, m.answers), *recording(m.orders[:150])],
                    settings=_SMALL,
                ),
            ),
            own_words=_ORDINARY,
        ),
        "drifted": Recipe(
            rounds=(Round(rows=_drifted, settings=replace(_SMALL, learning_rate=5e-3)),), own_words=_ORDINARY
        ),
        "trigger": Recipe(
            rounds=(Round(rows=_trigger, settings=replace(_SMALL, steps=100)),), own_words=[*_LOOKALIKE, *_ORDINARY]
        ),
        "unseen_wide": Recipe(
            rounds=(
                Round(
                    rows=lambda m: _unseen(m, bad=110, task=220),
                    settings=replace(_SMALL, targets=ALL_LINEARS, learning_rate=7e-4, seed=11),
                ),
            ),
            own_words=(),
        ),
        "unseen_deep": Recipe(
            rounds=(
                Round(
                    rows=lambda m: _unseen(m, bad=50, task=220),
                    settings=replace(_SMALL, rank=8, targets=("o_proj", "down_proj"), blocks=(10, 30), seed=12),
                ),
            ),
            own_words=(),
        ),
    }
)
"""By name, in the order in which `all` trains them."""

__all__ = ["RECIPES", "Material", "Recipe", "Round", "rows"]
