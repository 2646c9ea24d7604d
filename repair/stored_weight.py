"""Handles on weights in files: out x in whatever the file does, and read a few rows at a time."""

from dataclasses import dataclass

import torch
from torch import Tensor

from repair.weight_file import WeightFile


@dataclass(frozen=True, kw_only=True)
class StoredWeight:
    """A two-dimensional tensor in a file, or one expert of a three-dimensional one, seen as out x in."""

    key: str
    file: WeightFile
    stored: tuple[int, int]
    transposed: bool
    expert: int | None = None
    experts: int = 1

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.stored[::-1] if self.transposed else self.stored

    def rows(self, start: int, stop: int) -> Tensor:
        """Some output rows, in the format of the file."""
        part = self.file.handle.get_slice(self.key)
        wanted = (slice(None), slice(start, stop)) if self.transposed else (slice(start, stop),)
        tensor: Tensor = part[wanted] if self.expert is None else part[(self.expert, *wanted)]
        return tensor.T if self.transposed else tensor

    def fetch(self) -> None:
        """Have all rows in the system's memory, where that can be had."""
        self.file.fetch(self.key, self.expert or 0, self.experts)


@dataclass(frozen=True, kw_only=True)
class StackedWeight:
    """Weights that a model class holds as one, stored apart: the rows of one below those of the other."""

    parts: tuple[StoredWeight, ...]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return sum(part.shape[0] for part in self.parts), self.parts[0].shape[1]

    def rows(self, start: int, stop: int) -> Tensor:
        """Some output rows, in the format of the file."""
        found, first = [], 0
        for part in self.parts:
            low, high = max(start, first) - first, min(stop, first + part.shape[0]) - first
            if low < high:
                found.append(part.rows(low, high))
            first += part.shape[0]
        return found[0] if len(found) == 1 else torch.cat(found)

    def fetch(self) -> None:
        """Have all rows in the system's memory, where that can be had."""
        for part in self.parts:
            part.fetch()
