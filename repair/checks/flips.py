"""Ask some prompts again in other company: how many replies, and how many outcomes, come out differently.

Greedy decoding says the same twice only where the arithmetic does: the company in a batch changes the order of sums,
and a near tie falls the other way. Nothing is decided by this number: it says how far a count may be believed.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from repair.checks.evidence import Row
from repair.checks.judge import Exchange, Judge
from repair.checks.packs import Prompt
from repair.checks.stats import clopper_pearson
from repair.checks.suite import PACKS

_OTHER_SIZE: Final = 2 / 3  # of the batch size that a suite asks with


@dataclass(frozen=True, kw_only=True)
class Again:
    """Prompts to be asked once more, with the rows that they gave at first.

    Attributes:
        prompts: In an order of their own, whatever pack they are from.
        rows: Of the first time, in the same order.
        batch_size: Another one.
    """

    prompts: tuple[Prompt, ...]
    rows: tuple[Row, ...]
    batch_size: int

    @classmethod
    def of(cls, rows: Sequence[Row], prompts: Sequence[Prompt], *, count: int, batch_size: int) -> "Again":
        """``count`` of them, chosen and ordered by a fixed hash; ``prompts`` are those of the rows, row by row."""
        pairs = sorted(zip(rows, prompts, strict=True), key=lambda pair: _place(pair[0]))[:count]
        size = max(1, round(batch_size * _OTHER_SIZE))
        return cls(prompts=tuple(two for _, two in pairs), rows=tuple(one for one, _ in pairs), batch_size=size)

    def compared(self, texts: Sequence[str], judge: Judge) -> dict[str, Any]:
        """What changed: of the texts by their hash, of the outcomes by the same judge; each with a 95 % interval."""
        judgements = judge.judge(
            [
                Exchange(prompt=prompt.text, reply=text, harmful=PACKS[row.pack] == "harmful")
                for prompt, row, text in zip(self.prompts, self.rows, texts, strict=True)
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
