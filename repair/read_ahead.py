"""Weights that will be needed next are fetched from the disk while those at hand are worked on.

A mapped file is read when it is touched, and whoever touches it waits for the disk. Here the system is told beforehand.
It keeps what it fetches where it keeps every file that was read, and takes that memory back when it needs it, so
no byte is fetched twice and none belongs to this process.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from types import TracebackType
from typing import Final

from repair.errors import RepairError
from repair.lora import LayerReference

AHEAD_BYTES: Final = 256 << 20
"""How far ahead: enough that the disk never waits, little beside what a machine that holds a model has."""


class ReadAhead:
    """The weights of some modules in the order in which they are worked on.

    Nothing happens before the first of them is read: work that finds everything remembered fetches nothing. A thread of
    its own gives the hints, because a system whose disk is busy lets whoever gives one wait.
    """

    def __init__(self, names: Sequence[str], reference_for: Callable[[str], LayerReference]) -> None:
        """``reference_for`` finds the weights of a module; it is called from another thread."""
        self._names, self._reference_for = names, reference_for
        self._places = {name: at for at, name in enumerate(names)}
        self._sizes: list[int] = []  # of the modules that were hinted at; only the one thread touches it
        self._thread = ThreadPoolExecutor(1)

    def __enter__(self) -> "ReadAhead":  # noqa: PYI034 - the import hook of the tests has no Self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._thread.shutdown(cancel_futures=error is not None)

    def watched(self, reference: LayerReference) -> LayerReference:
        """The same reference; when its weights are read, those of the next modules are fetched."""
        at = self._places[reference.name]
        return replace(reference, begun=partial(self._thread.submit, self._expect_after, at))

    def _expect_after(self, at: int) -> None:
        """Hint at the modules up to ``at`` and at those after it, each once, until enough is on its way."""
        while len(self._sizes) < len(self._names) and sum(self._sizes[at + 1 :]) < AHEAD_BYTES:
            self._sizes.append(self._expect(len(self._sizes)))

    def _expect(self, at: int) -> int:
        with suppress(RepairError):  # whoever works on that module will say what is wrong with it
            return self._reference_for(self._names[at]).expect()
        return 0
