"""One safetensors file of a model: its tensors by name, and where they lie, so that they can be fetched early."""

import os
from collections.abc import Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open

from gate.errors import Refused
from gate.header import TensorEntry, read_header
from repair.errors import WrongReference

_CHUNK: Final = 8 << 20
_PROBE: Final = 1 << 20
_nowhere = bytearray(_CHUNK)  # what is fetched is to be in the system's memory, not in ours: everyone writes over it


class WeightFile:
    """An opened file. Nothing is read before it is asked for."""

    def __init__(self, path: Path) -> None:
        """Open it; raises WrongReference."""
        self.path = path
        try:
            self.handle: Any = safe_open(path, framework="pt", device="cpu")
        except (SafetensorError, OSError) as error:
            raise WrongReference(f"cannot be read: {error}", file=str(path)) from error

    def fetch(self, key: str, part: int = 0, parts: int = 1) -> None:
        """See that the system holds a tensor, or one of so many equal parts of it, in its memory.

        Nothing happens where the system cannot be asked, and nothing goes wrong where the bytes cannot be read: whoever
        needs them will read them, or say so.
        """
        entry = self._entries.get(key)
        if entry is None:
            return
        size = (entry.end - entry.start) // parts
        start = entry.start + part * size
        with suppress(OSError), self.path.open("rb", buffering=0) as file:
            for at in range(start, start + size, _CHUNK):
                _fetch(file.fileno(), at, min(_CHUNK, start + size - at))

    @cached_property
    def _entries(self) -> Mapping[str, TensorEntry]:
        with suppress(Refused, OSError):  # a header that safetensors reads and the gate would not: nothing is fetched
            return read_header(self.path.resolve()).tensors
        return {}


def _fetch(descriptor: int, start: int, size: int) -> None:
    held = _held(descriptor, start, size)
    if held is None:  # a file system that does not tell: a hint costs nothing where the bytes are there already
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, start, size, os.POSIX_FADV_WILLNEED)
    elif not held:
        os.preadv(descriptor, [memoryview(_nowhere)[:size]], start)


def _held(descriptor: int, start: int, size: int) -> bool | None:
    """Whether these bytes are in memory, going by a few of them; None when the system does not say."""
    try:
        places = range(start, start + size, _PROBE)
        return all(os.preadv(descriptor, [bytearray(1)], at, os.RWF_NOWAIT) for at in places)
    except BlockingIOError:
        return False
    except (OSError, AttributeError):
        return None
