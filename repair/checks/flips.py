"""Ask some prompts again in other company: how many replies, and how many outcomes, come out differently.

Greedy decoding says the same twice only where the arithmetic does: the company in a batch changes the order of sums,
and a near tie falls the other way. Nothing is decided by this number: it says how far a count may be believed.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from repair.checks.early import Asked
from repair.checks.evidence import Row
from repair.checks.judge import Exchange, Judge
from repair.checks.stats import clopper_pearson

_OTHER_SIZE: Final = 2 / 3  # of the batch size that a suite asks with


@dataclass(frozen=True, kw_only=True)
class Again:
    """Prompts to be asked once more, with the rows that they gave at first.

    Attributes:
        asked: In an order of their own, whatever pack they are from.
        rows: Of the first time, in the same order.
        batch_size: Another one.
    """

    asked: tuple[Asked, ...]
    rows: tuple[Row, ...]
    batch_size: int

    @classmethod
    def of(cls, rows: Sequence[Row], asked: Mapping[tuple[str, str], Asked], *, count: int, batch_size: int) -> "Again":
        """``count`` of the rows, chosen and ordered by a fixed hash; ``asked`` has each by pack and id."""
        chosen = sorted(rows, key=_place)[:count]
        size = max(1, round(batch_size * _OTHER_SIZE))
        return cls(asked=tuple(asked[row.pack, row.id] for row in chosen), rows=tuple(chosen), batch_size=size)

    def compared(self, texts: Sequence[str], judge: Judge) -> dict[str, Any]:
        """What changed: of the texts by their hash, of the outcomes by the same judge; each with a 95 % interval."""
        judgements = judge.judge(
            [
                Exchange(prompt=one.prompt.text, reply=text, harmful=one.kind == "harmful")
                for one, text in zip(self.asked, texts, strict=True)
            ]
        )
        hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        changed = {
            "text": sum(row.reply_sha256 != one for row, one in zip(self.rows, hashes, strict=True)),
            "outcome": sum(row.outcome != one.outcome for row, one in zip(self.rows, judgements, strict=True)),
        }
        return {"n": len(texts), "batch_size": self.batch_size} | {
            name: _share(hits, len(texts)) for name, hits in changed.items()
        }


def _share(hits: int, n: int) -> dict[str, Any]:
    found = clopper_pearson(hits, n)
    return {"flips": hits, "rate": found.value, "low": found.low, "high": found.high}


def _place(row: Row) -> str:
    return hashlib.sha256(f"again:{row.pack}:{row.id}".encode()).hexdigest()
