"""Near-duplicates: prompts that say the same in nearly the same words, found and left out.

Two prompts are as alike as the words that both have are many of the words that either has (Jaccard's index over the
set of words, after Unicode normalisation and lower case). At 0.6 or more they count as one: such a pair on two halves
would let a repair be chosen on what certifies it, and on one half would count one observation twice.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Final

from repair.checks.packs import Half, Pack, Prompt

NEAR: Final = (3, 5)
"""Of so many words, so many shared: in whole numbers, so that 0.6 is exactly that."""
ORDER: Final[tuple[Half, ...]] = ("certify", "select")
"""Which half keeps its copy: what certifies is scarce, and a repair can be chosen on a prompt less."""

_WORD: Final = re.compile(r"[^\W_]+(?:'[^\W_]+)?")


def words_of(text: str) -> frozenset[str]:
    """The words of a prompt, as they are compared."""
    return frozenset(
        _WORD.findall(unicodedata.normalize("NFKC", text).replace("\N{RIGHT SINGLE QUOTATION MARK}", "'").lower())
    )


def alike(shared: int, either: int) -> bool:
    """Whether two prompts with so many words in common, of so many that either has, count as one."""
    return NEAR[1] * shared >= NEAR[0] * either


class Seen:
    """Prompts so far, by word, so that only those that share one are compared."""

    def __init__(self) -> None:
        self._all: list[frozenset[str]] = []
        self._by_word: dict[str, list[int]] = defaultdict(list)

    def near(self, words: frozenset[str]) -> bool:
        """Whether one of them is nearly this one."""
        shared: dict[int, int] = defaultdict(int)
        for word in words:
            for place in self._by_word[word]:
                shared[place] += 1
        return any(alike(n, len(words) + len(self._all[place]) - n) for place, n in shared.items())

    def add(self, words: frozenset[str]) -> None:
        """Remember one."""
        for word in words:
            self._by_word[word].append(len(self._all))
        self._all.append(words)


Key = tuple[str, str]
"""A pack's name and a row's id."""


def apart(packs: Sequence[Pack]) -> tuple[frozenset[Key], dict[str, int]]:
    """The rows of one kind of prompts that stay, and how many of each pack do not.

    The certify half goes first and keeps its copy; within a half the first stays, in the order of the packs and of
    their rows. Depends on the packs alone, not on how many prompts a policy asks.
    """
    return _apart(tuple((pack.name, pack.of_half(half)) for half in ORDER for pack in packs))


def thinned(packs: Sequence[Pack]) -> list[Pack]:
    """The packs of one kind without the rows that `apart` leaves out; digests stay those of the whole packs."""
    kept, _ = apart(packs)
    return [replace(pack, rows=tuple(row for row in pack.rows if (pack.name, row.id) in kept)) for pack in packs]


@lru_cache(maxsize=32)
def _apart(parts: tuple[tuple[str, tuple[Prompt, ...]], ...]) -> tuple[frozenset[Key], dict[str, int]]:
    seen, kept = Seen(), set[Key]()
    dropped: dict[str, int] = defaultdict(int)
    for name, rows in parts:
        for row in rows:
            words = words_of(row.text)
            if seen.near(words):
                dropped[name] += 1
            else:
                seen.add(words)
                kept.add((name, row.id))
    return frozenset(kept), dict(dropped)
