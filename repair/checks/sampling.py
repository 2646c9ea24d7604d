"""Drawing tokens instead of choosing the likeliest: temperature, the nucleus of Holtzman et al. 2020, one lot a token.

Every request has a stream of lots of its own, on the CPU, so that its reply depends neither on what shares its batch
nor on the device (but for logits that round differently). A token is found from its lot by inverting the sum.
"""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

from repair.checks.frame import Sampling


@final
class Draws:
    """Chooses the next token of each request by its own lots."""

    def __init__(self, sampling: Sampling, prompts: Sequence[str]) -> None:
        self._sampling = sampling
        self._streams = [torch.Generator().manual_seed(sampling.seed_of(prompt)) for prompt in prompts]

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """Tokens ``(row,)`` from logits ``(row, vocabulary)``; ``rows`` says whose they are."""
        lots = [torch.rand((), generator=self._streams[row], dtype=torch.float64) for row in rows]
        return drawn(
            logits,
            torch.stack(lots).to(logits.device),
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
        )


def drawn(logits: Tensor, lots: Tensor, *, temperature: float, top_p: float) -> Tensor:
    """The token of each row at which the nucleus's summed probabilities pass ``lots``, each in [0, 1)."""
    ordered, tokens = logits.double().sort(dim=-1, descending=True, stable=True)
    # The largest is taken off first: a small temperature would otherwise make infinities.
    shares = ((ordered - ordered[:, :1]) / temperature).softmax(dim=-1)
    # A token belongs to the nucleus while those before it do not fill it; so the likeliest always does.
    nucleus = shares.where(shares.cumsum(dim=-1) - shares < top_p, shares.new_zeros(()))
    sums = nucleus.cumsum(dim=-1)
    places = (sums <= lots[:, None] * sums[:, -1:]).sum(dim=-1)
    places = places.minimum((nucleus > 0).sum(dim=-1) - 1)
    return tokens.gather(1, places[:, None])[:, 0]
