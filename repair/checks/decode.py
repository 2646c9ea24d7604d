"""Greedy decoding of a left-padded batch: shared prefix computed once, finished rows dropped on the way.

`generate` of transformers carries finished rows to the end of the batch; refusals are short, so on a CPU that is
most of the work. Nothing here knows prompts, templates or adapters.
"""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from transformers import DynamicCache

Place = Callable[[Sequence[int]], None]
"""Told before a forward pass which arm each of its rows belongs to."""

WORTH_SHARING: Final = 4
_DROP_SHARE: Final = 8  # rows leave the batch once an eighth of it is finished: leaving copies the cache


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """The new tokens of one row, without the token that stopped it."""

    tokens: tuple[int, ...]
    stopped: bool  # False: cut off at the token limit


def one_arm(_arms: Sequence[int]) -> None:
    """Nobody need be told: all rows belong to what is on the model."""


@torch.inference_mode()
def greedy(
    model: Any,
    sequences: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: frozenset[int],
    pad: int,
    arms: Sequence[int] | None = None,
    place: Place = one_arm,
) -> list[Decoded]:
    """Continue every sequence with its most likely tokens; the results stand in the order given.

    ``arms``, ascending, tells which arm each sequence belongs to; ``place`` is told whenever the rows change.
    """
    batch = _Batch.prefill(model, sequences, pad, arms=list(arms or [0] * len(sequences)), place=place)
    tokens: list[list[int]] = [[] for _ in sequences]
    stopped = [False] * len(sequences)
    for left in reversed(range(max_new_tokens)):
        chosen = batch.step(model)
        for row, token in zip(batch.rows, chosen.tolist(), strict=True):
            if not stopped[row]:
                stopped[row] = token in stop
                if not stopped[row]:
                    tokens[row].append(token)
        live = [at for at, row in enumerate(batch.rows) if not stopped[row]]
        if not live or not left:
            break
        batch.append(chosen)
        if (len(batch.rows) - len(live)) * _DROP_SHARE >= len(batch.rows):
            batch.keep(live)
    return [Decoded(tokens=tuple(t), stopped=s) for t, s in zip(tokens, stopped, strict=True)]


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
        """The most likely next token of every row."""
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
        chosen: Tensor = logits[:, -1].argmax(dim=-1)
        return chosen

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
