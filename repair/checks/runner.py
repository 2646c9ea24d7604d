"""One candidate in the race: what it has been asked, what is left to ask it, and where it stands."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from repair.checks.bisection import Bisection, Reading
from repair.checks.measurement import Measurement
from repair.checks.packs import Prompt
from repair.checks.verdict import Tried
from repair.lora import LoraAdapter

T = TypeVar("T")

FIRST_LOOK: Final = 8
LATER_LOOK: Final = 16


@dataclass(kw_only=True, eq=False)
class Runner:
    """One candidate while it is asked.

    Attributes:
        tried: What is known of it.
        adapter: As read back from its files.
        row: Where it stands between mild and strong.
        measured: What it has answered so far.
        left: Looks that were not taken yet: pack and prompts.
        tokens: Forward tokens that it has cost.
    """

    tried: Tried
    adapter: LoraAdapter
    row: Bisection
    measured: Measurement
    left: list[tuple[str, tuple[Prompt, ...]]]
    tokens: float = 0.0

    @property
    def untouched(self) -> bool:
        """Whether it was asked nothing yet of a pack that has something to ask."""
        return any(prompts and not self.measured.rows[pack] for pack, prompts in self.measured.suite.prompts.items())

    @property
    def next_look(self) -> tuple[str, tuple[Prompt, ...]]:
        """Every pack once, then the pack in which it is likeliest to fail: what fails is to fail on few prompts."""
        untouched = next((look for look in self.left if not self.measured.rows[look[0]]), None)
        if untouched is not None:
            return untouched
        kind_of = self.measured.suite.packs.kind_of
        worst: dict[str | None, float] = {}
        for chance, check in self.measured.promises():
            worst.setdefault(check.kind, chance)
        return min(self.left, key=lambda look: worst.get(kind_of(look[0]), 1.0))

    def take_look(self) -> tuple[str, tuple[Prompt, ...]]:
        """The same, and it is not left any more."""
        look = self.next_look
        self.left.remove(look)
        return look


def looks(measured: Measurement) -> Iterator[tuple[str, tuple[Prompt, ...]]]:
    """The suite in growing looks, pack by pack in turns."""
    left = {pack: list(prompts) for pack, prompts in measured.suite.prompts.items()}
    size = FIRST_LOOK
    while any(left.values()):
        for pack, prompts in left.items():
            if prompts:
                yield pack, tuple(prompts[:size])
                left[pack] = prompts[size:]
        size = LATER_LOOK


def part_of(values: Sequence[float], part: int, parts: int) -> tuple[float, ...]:
    """What belongs to one of several arms that were asked the same, one arm after the other."""
    size = len(values) // parts
    return tuple(values[part * size : (part + 1) * size])


def rows_of(some: Sequence[Runner], asked: Sequence[T]) -> list[tuple[int, T]]:
    """Everything asked of the first, then of the next: the arm and what it is asked."""
    return [(arm, one) for arm in range(len(some)) for one in asked]


def reading_of(check: str) -> Reading:
    """What failing this check says of the strength of an edit."""
    return Reading.TOO_MILD if check in {"harmful", "zero_tolerance"} else Reading.TOO_STRONG


def light(lost: Tried) -> Tried:
    """What is left of a candidate that cannot win any more: the account of it, without its tensors and files."""
    if lost.directory is not None:
        shutil.rmtree(lost.directory, ignore_errors=True)
    return replace(lost, adapter=None, directory=None)


def rank(one: Runner) -> tuple[float, float]:
    """Those that keep most first; of those that keep as much, the one that is predicted to do least damage."""
    return (-one.tried.utility, one.tried.damage or 0.0)
