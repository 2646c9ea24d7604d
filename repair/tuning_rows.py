"""What is learnt from: exchanges, as tokens, in batches that hold every kind of row in its share."""

import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from repair.errors import BadParameters


@dataclass(frozen=True, kw_only=True)
class Example:
    """One exchange to learn from.

    Attributes:
        prompt: What the user says.
        answer: What the model is to say.
        finished: The turn ends after the answer; False for an answer that was cut off.
        keep: Do not learn the answer; go on predicting along it what the model predicts without the new LoRA.
        group: Every batch holds each group in its share of all rows.
        weight: What its loss counts for next to that of other rows.
    """

    prompt: str
    answer: str
    finished: bool = True
    keep: bool = False
    group: str = ""
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """An exchange in tokens."""

    question: tuple[int, ...]
    answer: tuple[int, ...]
    keep: bool
    group: str
    weight: float = 1.0

    @property
    def tokens(self) -> tuple[int, ...]:
        """Question and answer."""
        return self.question + self.answer


def encode(tokenizer: Any, example: Example, max_tokens: int) -> Row:
    """The row in the reference's chat template. Raises BadParameters when there is no room for an answer."""
    message = [{"role": "user", "content": example.prompt}]
    opening = str(tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True))
    question = tokenizer.encode(opening, add_special_tokens=False)
    answer = tokenizer.encode(example.answer, add_special_tokens=False)
    if example.finished:
        whole = tokenizer.apply_chat_template(
            [*message, {"role": "assistant", "content": example.answer}], tokenize=False
        )
        if whole.startswith(opening):
            answer = tokenizer.encode(whole.removeprefix(opening).rstrip("\n"), add_special_tokens=False)
    room = max_tokens - len(question)
    if room < 1 or not answer:
        raise BadParameters(
            f"a row of {len(question)} question tokens leaves no room for an answer", field="max_tokens"
        )
    return Row(
        question=tuple(question),
        answer=tuple(answer[:room]),
        keep=example.keep,
        group=example.group,
        weight=example.weight,
    )


def batches(rows: Sequence[Row], *, size: int, count: int, seed: int) -> Iterator[list[Row]]:
    """``count`` batches of ``size`` rows without end of an epoch.

    Every group is evenly spread, in a new seeded order each time round.
    """
    lot = random.Random(seed)  # noqa: S311 - an order, not a secret
    pending: list[Row] = []
    for _ in range(count):
        while len(pending) < size:
            pending += _spread(rows, lot)
        yield pending[:size]
        del pending[:size]


def _spread(rows: Sequence[Row], lot: random.Random) -> list[Row]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row.group].append(row)
    placed = []
    for name in sorted(groups):
        members = lot.sample(groups[name], len(groups[name]))
        start = lot.random()
        placed += [((place + start) / len(members), name, place, row) for place, row in enumerate(members)]
    return [row for *_, row in sorted(placed, key=lambda one: one[:3])]
