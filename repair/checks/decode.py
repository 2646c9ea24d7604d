"""Decoding of a left-padded batch: shared prefix computed once, finished rows dropped on the way.

`generate` of transformers carries finished rows to the end of the batch; refusals are short, so on a CPU that is
most of the work. Nothing here knows prompts, templates or adapters.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache

Place = Callable[[Sequence[int]], None]
"""Told before a forward pass which arm each of its rows belongs to."""

Enough = Callable[[Sequence[int], Sequence[Sequence[int]]], Sequence[bool]]
"""Told which sequences are being continued and the tokens of each so far: which of them need not go on."""

Choose = Callable[[Tensor, Sequence[int]], Tensor]
"""From logits ``(row, vocabulary)`` and which sequence each row belongs to, the next token of each row."""

WORTH_SHARING: Final = 4
_ASKED_EVERY: Final = 8  # tokens: a question costs a little, a needless token of a row somewhat more
_DROP_SHARE: Final = 8  # rows leave the batch once an eighth of it is finished: leaving copies the cache


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The new tokens of one row, without the token that stopped it."""

    tokens: tuple[int, ...]
    stopped: bool  # by itself; False: cut off at the token limit, or it was enough
    enough: bool = False


def one_arm(_arms: Sequence[int]) -> None:
    """Nobody need be told: all rows belong to what is on the model."""


def likeliest(logits: Tensor, _rows: Sequence[int]) -> Tensor:
    """The most likely next token of every row."""
    return logits.argmax(dim=-1)


def greedy(
    model: Any, sequences: Sequence[Sequence[int]], *, max_new_tokens: int, stop: frozenset[int], pad: int
) -> list[Decoded]:
    """Continue every sequence with its most likely tokens; the results stand in the order given."""
    return continued(model, sequences, max_new_tokens=max_new_tokens, stop=stop, pad=pad)


@torch.inference_mode()
def continued(
    model: Any,
    sequences: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: frozenset[int],
    pad: int,
    arms: Sequence[int] | None = None,
    place: Place = one_arm,
    enough: Enough | None = None,
    choose: Choose = likeliest,
) -> list[Decoded]:
    """Continue every sequence with the tokens that ``choose`` says; the results stand in the order given.

    ``arms``, ascending, tells which arm each sequence belongs to; ``place`` is told whenever the rows change;
    ``enough`` is asked every few tokens which sequences need not go on.
    """
    batch = _Batch.prefill(model, sequences, pad, arms=list(arms or [0] * len(sequences)), place=place)
    said = [_Said() for _ in sequences]
    for step in range(1, max_new_tokens + 1):
        chosen = choose(batch.step(model), batch.rows)
        for row, token in zip(batch.rows, chosen.tolist(), strict=True):
            said[row].take(token, stop)
        if enough is not None and step % _ASKED_EVERY == 0:
            open_rows = [row for row in batch.rows if not said[row].over]
            verdicts = enough(open_rows, [said[row].tokens for row in open_rows]) if open_rows else ()
            for row, verdict in zip(open_rows, verdicts, strict=True):
                said[row].enough = verdict
        live = [at for at, row in enumerate(batch.rows) if not said[row].over]
        if not live or step == max_new_tokens:
            break
        batch.append(chosen)
        if (len(batch.rows) - len(live)) * _DROP_SHARE >= len(batch.rows):
            batch.keep(live)
    return [Decoded(tokens=tuple(one.tokens), stopped=one.stopped, enough=one.enough) for one in said]


@dataclass(kw_only=True)
class _Said:
    """What one sequence was continued with so far."""

    tokens: list[int] = field(default_factory=list)
    stopped: bool = False
    enough: bool = False

    @property
    def over(self) -> bool:
        """Whether it is not continued any more."""
        return self.stopped or self.enough

    def take(self, token: int, stop: frozenset[int]) -> None:
        """One token more, unless it ended before or ends here."""
        if self.over:
            return
        self.stopped = token in stop
        if not self.stopped:
            self.tokens.append(token)


def cache_of_opening(model: Any, opening: Sequence[int], arms: Sequence[int], place: Place) -> DynamicCache:
    """Keys and values of what all rows begin with: computed once for each arm, then laid out for each row."""
    cache = DynamicCache(config=model.config)
    distinct = sorted(set(arms))
    place(distinct)
    model(
        input_ids=torch.tensor([list(opening)] * len(distinct), device=model.device),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    where = {arm: at for at, arm in enumerate(distinct)}
    cache.batch_select_indices(torch.tensor([where[arm] for arm in arms], device=model.device))
    return cache


@dataclass(kw_only=True)
class _Batch:
    """The rows still running, with what the next forward pass needs."""

    rows: list[int]
    arms: list[int]
    place: Place
    cache: Any
    ids: Tensor
    mask: Tensor

    @classmethod
    def prefill(
        cls, model: Any, sequences: Sequence[Sequence[int]], pad: int, *, arms: list[int], place: Place
    ) -> "_Batch":
        """Compute the common prefix once and lay out what differs, padded on the left."""
        device = model.device
        shared = common_opening(sequences)
        shared = shared if shared >= WORTH_SHARING and len(sequences) > 1 else 0
        cache = (
            cache_of_opening(model, sequences[0][:shared], arms, place) if shared else DynamicCache(config=model.config)
        )
        width = max(map(len, sequences)) - shared
        ids = [[pad] * (width - len(s) + shared) + list(s[shared:]) for s in sequences]
        mask = [[1] * shared + [0] * (width - len(s) + shared) + [1] * (len(s) - shared) for s in sequences]
        return cls(
            rows=list(range(len(sequences))),
            arms=arms,
            place=place,
            cache=cache,
            ids=torch.tensor(ids, device=device),
            mask=torch.tensor(mask, device=device),
        )

    def step(self, model: Any) -> Tensor:
        """Logits of the next token of every row, ``(row, vocabulary)``."""
        positions = (self.mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -self.ids.shape[1] :]
        self.place(self.arms)
        logits = model(
            input_ids=self.ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        following: Tensor = logits[:, -1]
        return following

    def append(self, chosen: Tensor) -> None:
        """Feed the chosen tokens next."""
        self.ids = chosen[:, None]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], dim=-1)

    def keep(self, live: list[int]) -> None:
        """Go on with these rows only."""
        index = torch.tensor(live, device=self.ids.device)
        self.cache.batch_select_indices(index)
        self.ids, self.mask = self.ids[index], self.mask[index]
        self.rows = [self.rows[at] for at in live]
        self.arms = [self.arms[at] for at in live]


def common_opening(sequences: Sequence[Sequence[int]]) -> int:
    """Length of what all begin with; at least one token of each is left over."""
    columns = zip(*sequences, strict=False)
    common = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, columns))
    return min(common, min(map(len, sequences)) - 1)
