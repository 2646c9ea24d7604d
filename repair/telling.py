"""Progress on standard error: one line that changes on a terminal, a few lines that stay everywhere else.

Into a file or a pipe goes a line whenever a stage begins and whenever it has come another tenth; never more, however
many modules an adapter has. The answer, and any error, come after it.
"""

import sys
from dataclasses import dataclass, field
from typing import Final

WIDEST: Final = 90


@dataclass(kw_only=True)
class Teller:
    """Tells one command's progress; call it with a line and the share that is done, 0 to 1."""

    _told: set[tuple[str, int]] = field(default_factory=set)

    def __call__(self, message: str, share: float) -> None:
        """Say it, where it is news."""
        if sys.stderr.isatty():
            end = "\n" if share >= 1 else ""
            self._say(f"\r\033[K{share:4.0%} {message[:WIDEST]}{end}")
            return
        news = (stage_of(message), int(10 * share))
        if news not in self._told:
            self._told.add(news)
            self._say(f"{share:4.0%} {message[:WIDEST]}\n")

    @staticmethod
    def _say(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def stage_of(message: str) -> str:
    """What a line is about, without what changes from one to the next.

    >>> stage_of("choosing: 3 in the race, none has passed, at most 12 s")
    'choosing'
    >>> stage_of("model.layers.0.mlp.up_proj")
    'modules'
    """
    about, colon, _ = message.rpartition(": ")
    first = message.partition(" ")[0]
    return about if colon else "modules" if "." in first else first
