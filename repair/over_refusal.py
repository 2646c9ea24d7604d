"""Over-refusal while a refusal LoRA learns: what an adapter answers by itself, and how much of that it still answers.

Look-alikes of the pack `calibration` only, which shares no prompt with the packs that measure. A reply is read by the
rule judge. Like every number that steers a repair this one certifies nothing; the checks measure again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from repair.checks.judge import Exchange, Outcome
from repair.checks.packs import Prompt, load_pack, ordered
from repair.checks.rules import RulesJudge
from repair.refusing import LOOKALIKE, PACK, REFUSE, lookalikes

READ_TOKENS: Final = 16
"""A refusal is said at once."""


ORDINARY: Final = "ordinary"
RELIEF_SHARES: Final = {LOOKALIKE: 96, REFUSE: 96, ORDINARY: 48}
"""How many rows of each kind the counterpart learns from; its batches hold them in these shares."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of the pack, some look-alikes held back.

    Attributes:
        learnt: What may be learnt from, in the order of the pack.
        held_out: Look-alikes that are only listened to.
    """

    learnt: tuple[Prompt, ...]
    held_out: tuple[Prompt, ...]

    @classmethod
    def of(cls, *, held_out: int, seed: int) -> "Rows":
        """Hold back so many look-alikes, drawn by ``seed``."""
        rows = load_pack(PACK).rows
        back = lookalikes(held_out, seed=seed)
        known = {row.id for row in back}
        return cls(learnt=tuple(row for row in rows if row.id not in known), held_out=back)

    def for_relief(self, *, seed: int) -> tuple[Prompt, ...]:
        """Some of those to learn from, each kind in its share."""
        return tuple(
            row
            for kind, count in RELIEF_SHARES.items()
            for row in ordered((row for row in self.learnt if row.category == kind), seed=seed)[:count]
        )


def own_answers(chat: Any, rows: Sequence[Prompt], tokens: int) -> dict[str, str]:
    """The first ``tokens`` of what the model answers, by the row's id; rows that it refuses are not among them."""
    found = {}
    for row, one in zip(rows, openings(chat, [row.text for row in rows]), strict=True):
        ids = chat.tokenizer.encode(one.text, add_special_tokens=False)[:tokens]
        if ids and not one.refused:
            found[row.id] = str(chat.tokenizer.decode(ids))
    return found


@dataclass(kw_only=True)
class HeldOut:
    """Listens to held-out look-alikes that the adapter answers, and says whether it still answers enough of them.

    Attributes:
        chat: The loaded model with the adapter on it.
        prompts: What the adapter answered before anything was learnt.
        at_most: Share of them that may be refused.
        rates: What was seen, look by look.
    """

    chat: Any
    prompts: tuple[str, ...]
    at_most: float
    rates: list[float] = field(default_factory=list)

    @classmethod
    def listen(cls, chat: Any, rows: Sequence[Prompt], at_most: float) -> "HeldOut":
        """Keep the rows that the model answers now."""
        texts = [row.text for row in rows]
        heard = openings(chat, texts)
        answered = [text for text, one in zip(texts, heard, strict=True) if not one.refused]
        return cls(chat=chat, prompts=tuple(answered), at_most=at_most)

    def content(self) -> bool:
        """Whether no more of them are refused now than may be; always so where there is none to listen to."""
        if not self.prompts:
            return True
        heard = openings(self.chat, self.prompts)
        self.rates.append(sum(one.refused for one in heard) / len(heard))
        return self.rates[-1] <= self.at_most

    @property
    def account(self) -> str:
        """For the report."""
        if not self.prompts:
            return "over-refusal was not watched: the adapter answers none of the held-out look-alikes"
        seen = ", ".join(f"{rate:.3f}" for rate in self.rates)
        return f"refused of {len(self.prompts)} held-out look-alikes, look by look: {seen}; at most {self.at_most:g}"


@dataclass(frozen=True, kw_only=True)
class Opening:
    """How a reply begins, and whether that declines."""

    text: str
    refused: bool


def openings(chat: Any, prompts: Sequence[str]) -> list[Opening]:
    """What the model says first, one for each prompt, in order. Lives in memory only, as all replies do."""
    if not prompts:
        return []
    replies = chat.generate(prompts, max_new_tokens=READ_TOKENS)
    exchanges = [
        Exchange(prompt=prompt, reply=reply.text, harmful=False) for prompt, reply in zip(prompts, replies, strict=True)
    ]
    return [
        Opening(text=exchange.reply, refused=found.outcome is Outcome.REFUSAL)
        for exchange, found in zip(exchanges, RulesJudge().judge(exchanges), strict=True)
    ]
