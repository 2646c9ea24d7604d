"""One safetensors file of a model: its tensors by name, and where they lie, so that the system can fetch them early."""

import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from gate.errors import Refused
from gate.header import TensorEntry, read_header
from repair.errors import WrongReference


class WeightFile:
    """An opened file. Nothing is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        """Open it; raises WrongReference."""
        self.path = path
        try:
            self.handle: Any = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise WrongReference(f"cannot be read: {error}", file=str(path)) from error

    def expect(self, key: str, part: int = 0, parts: int = 1) -> int:
        """Ask the system to fetch a tensor, or one of so many equal parts of it; returns how many bytes that is.

        Only a hint: nobody waits for the bytes. 0 where the system takes no hints, or this file allows none.
        """
        if not hasattr(os, "posix_fadvise") or key not in self._entries:
            return 0
        entry = self._entries[key]
        size = (entry.end - entry.start) // parts
        with suppress(OSError), self.path.open("rb") as file:
            os.posix_fadvise(file.fileno(), entry.start + part * size, size, os.POSIX_FADV_WILLNEED)
            return size
        return 0

    @cached_property
    def _entries(self) -> Mapping[str, TensorEntry]:
        with suppress(Refused, OSError):  # a header that safetensors reads and the gate would not: no hints
            return read_header(self.path.resolve()).tensors
        return {}
