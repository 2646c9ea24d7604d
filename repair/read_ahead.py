"""Weights that will be needed next are fetched from the disk while those at hand are worked on.

A mapped file is read when it is touched, a few pages at a time, and whoever touches it waits. Here one thread reads the
files in large pieces before that. The system keeps what was read where it keeps every file, and takes that memory back
when it needs it: no byte is fetched twice, and none belongs to this process.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from threading import Lock
from types import TracebackType
from typing import Final

from repair.errors import RepairError
from repair.lora import LayerReference

AHEAD_NUMBERS: Final = 1 << 26
"""How far ahead: 256 MiB of both models in 16 bits. Enough that the disk never waits, little beside a model."""


class ReadAhead:
    """The weights of some modules in the order in which they are worked on.

    Nothing happens before the first of them is asked for: work that finds everything remembered fetches nothing.
    """

    def __init__(self, names: Sequence[str], reference_for: Callable[[str], LayerReference]) -> None:
        """``reference_for`` finds the weights of a module; several threads call it."""
        self._names, self._reference_for = names, reference_for
        self._places = {name: at for at, name in enumerate(names)}
        self._thread = ThreadPoolExecutor(1)
        self._lock = Lock()
        self._sizes: list[int] = []
        self._coming: list[Future[None]] = []

    def __enter__(self) -> "ReadAhead":  # noqa: PYI034 - the import hook of the tests has no Self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=error is not None)

    def watched(self, reference: LayerReference) -> LayerReference:
        """The same reference; whoever wants its weights waits until they are here, and the next ones are fetched."""
        return replace(reference, wait=partial(self._wait, self._places[reference.name]))

    def _wait(self, at: int) -> None:
        with self._lock:
            while len(self._coming) < len(self._names) and sum(self._sizes[at + 1 :]) < AHEAD_NUMBERS:
                self._order(self._names[len(self._coming)])
        self._coming[at].result()

    def _order(self, name: str) -> None:
        reference = LayerReference(name=name)
        with suppress(RepairError):  # whoever works on that module will say what is wrong with it
            reference = self._reference_for(name)
        self._sizes.append(0 if reference.aligned is None else reference.shape[0] * reference.shape[1])
        self._coming.append(self._thread.submit(reference.fetch))
