"""Which rows share a batch: those of like length, no more of them than fit."""

from collections.abc import Iterator, Sequence
from typing import Final

BATCH_TOKENS: Final = 16384
"""Positions of a batch, padding among them: the keys and values of so many are in memory at once."""


def batches(lengths: Sequence[int], *, rows: int, tokens: int) -> Iterator[list[int]]:
    """Places, the shortest first, at most ``rows`` in a batch and at most ``tokens`` when padded to its longest.

    A row that is longer than ``tokens`` is alone. Raises ValueError where no row fits.
    """
    if rows < 1 or tokens < 1:
        raise ValueError(f"{rows} rows of {tokens} tokens make no batch")
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda at: lengths[at]):
        if batch and (len(batch) == rows or (len(batch) + 1) * lengths[place] > tokens):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch
