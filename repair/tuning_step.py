"""The loss of one batch: answers to learn, and answers along which nothing is to change.

The chat template's common opening is computed once, rows of like length go together, and only the answers' positions
ever see the vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from repair.body import body_of
from repair.tuning_rows import Row


@dataclass(kw_only=True)
class Trainer:
    """What one step needs to know; remembers what the kept rows hold on to."""

    model: Any
    pad: int
    without: Callable[[], Any]
    remembered: dict[tuple[int, ...], Tensor] = field(default_factory=dict)

    def loss(self, batch: Sequence[Row], chunks: int) -> Tensor:
        """Mean over the batch's answer tokens, each row's mean counting as its weight says."""
        self._remember([row for row in batch if row.keep])
        per_row: list[Tensor] = []
        weights: list[float] = []
        for rows, hidden in self._forward(batch, chunks):
            per_row += self._row_losses(rows, hidden)
            weights += [row.weight for row in rows]
        losses = torch.stack(per_row)
        if set(weights) == {1.0}:
            return losses.mean()
        shares = torch.tensor(weights, device=losses.device)
        return (losses * shares).sum() / shares.sum()

    def _remember(self, rows: Sequence[Row]) -> None:
        """Final hidden states without the new weights: small, and the vocabulary follows from them."""
        new = [row for row in {row.tokens: row for row in rows}.values() if row.tokens not in self.remembered]
        if not new:
            return
        with torch.no_grad(), self.without():
            for part, hidden in self._forward(new, 1):
                lengths = [len(row.answer) for row in part]
                for row, states in zip(part, hidden.split(lengths), strict=True):
                    self.remembered[row.tokens] = states

    def _forward(self, rows: Sequence[Row], chunks: int) -> Iterator[tuple[list[Row], Float[Tensor, "token dim"]]]:
        """Hidden states at every place that predicts an answer token, for rows of like length together."""
        body, shared = body_of(self.model), _shared_opening(rows)
        cache = DynamicCache(config=self.model.config)
        if shared:
            opening = torch.tensor([rows[0].question[:shared]], device=self.model.device)
            body(input_ids=opening, past_key_values=cache, use_cache=True)
        ordered = sorted(rows, key=lambda row: len(row.tokens))
        size = math.ceil(len(ordered) / chunks)
        for start in range(0, len(ordered), size):
            part = ordered[start : start + size]
            width = max(len(row.tokens) for row in part) - shared - 1  # the last token predicts nothing
            # Padded on the right: a causal model never looks there.
            ids = [(row.tokens[shared:-1] + (self.pad,) * width)[:width] for row in part]
            states = body(
                input_ids=torch.tensor(ids, device=self.model.device),
                past_key_values=_repeated(cache, len(part), self.model.config) if shared else None,
                use_cache=bool(shared),
            ).last_hidden_state
            places = [(len(row.question) - shared - 1, len(row.tokens) - shared - 1) for row in part]
            yield part, torch.cat([states[at, first:last] for at, (first, last) in enumerate(places)])

    def _row_losses(self, rows: Sequence[Row], hidden: Float[Tensor, "token dim"]) -> list[Tensor]:
        head = self.model.get_output_embeddings()
        logs = head(hidden).float().log_softmax(dim=-1)
        losses = []
        for row, own in zip(rows, logs.split([len(row.answer) for row in rows]), strict=True):
            if row.keep:
                with torch.no_grad():
                    wanted = head(self.remembered[row.tokens]).float().log_softmax(dim=-1)
                losses.append(functional.kl_div(own, wanted, reduction="sum", log_target=True) / len(row.answer))
            else:
                losses.append(functional.nll_loss(own, torch.tensor(row.answer, device=own.device)))
        return losses


def _shared_opening(rows: Sequence[Row]) -> int:
    """Length of what all questions begin with; at least one token of each question is left over."""
    columns = zip(*(row.question for row in rows), strict=False)
    common = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))
    return min(common, min(len(row.question) for row in rows) - 1)


def _repeated(cache: DynamicCache, rows: int, config: Any) -> DynamicCache:
    """The cache of one opening for many rows, gradients intact."""
    copy = DynamicCache(config=config)
    for index, layer in enumerate(cache.layers):
        keys, values = layer.keys, layer.values
        copy.update(keys.expand(rows, -1, -1, -1), values.expand(rows, -1, -1, -1), index)
    return copy
