"""Log-probabilities of given answers: one forward pass, rows of like length together, their common opening once.

Nothing is generated here. Knows token ids only; what they mean is the caller's.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from repair.checks.batching import BATCH_TOKENS, batches
from repair.checks.decode import WORTH_SHARING, Place, cache_of_opening, common_opening, one_arm

_BATCH: Final = 8  # rows of one arm
_TOKENS: Final = BATCH_TOKENS // 4  # the probabilities of a whole vocabulary stand at every one of them

R = TypeVar("R")

Pair = tuple[list[int], list[int]]
"""Token ids of a question and of its answer."""


def answer_log_probs(
    model: Any,
    pairs: Sequence[Pair],
    keep: Callable[[int, Tensor], R],
    *,
    pad: int,
    arms: Sequence[int] | None = None,
    place: Place = one_arm,
    tokens: int = _TOKENS,
) -> list[R]:
    """What ``keep`` makes of each pair's log-probabilities ``(answer, vocabulary)``, in order of the pairs.

    It is given the pair's place and the tensor, at the places of the answer's tokens. A vocabulary is large: whoever
    wants a number should keep a number. A batch has no more than ``tokens`` positions.
    """
    found: dict[int, R] = {}
    of = list(arms or [0] * len(pairs))
    lengths = [len(question) + len(answer) for question, answer in pairs]
    rows = _BATCH * (len(set(of)) or 1)  # the opening is computed once for each arm of a batch: as many rows as alone
    for some in batches(lengths, rows=rows, tokens=tokens):
        chunk = sorted(some, key=lambda at: of[at])
        scored = _scored(model, [pairs[at] for at in chunk], [of[at] for at in chunk], pad=pad, place=place)
        found.update((at, keep(at, log_probs)) for at, log_probs in zip(chunk, scored, strict=True))
    return [found[at] for at in range(len(pairs))]


def _scored(model: Any, pairs: Sequence[Pair], arms: list[int], *, pad: int, place: Place) -> Iterator[Tensor]:
    """One batch, rows of one arm side by side."""
    shared = common_opening([question for question, _ in pairs])
    shared = shared if shared >= WORTH_SHARING and len(pairs) > 1 else 0
    width = max(len(question) + len(answer) for question, answer in pairs) - shared
    # Padded on the right: a causal model never looks there, and positions need no shifting.
    ids = [(q[shared:] + a + [pad] * width)[:width] for q, a in pairs]
    first = min(len(question) for question, _ in pairs) - shared - 1  # no place before it predicts an answer's token
    with torch.inference_mode():
        cache = cache_of_opening(model, pairs[0][0][:shared], arms, place) if shared else None
        place(arms)
        logits = model(
            input_ids=torch.tensor(ids, device=model.device),
            past_key_values=cache,
            use_cache=bool(shared),
            logits_to_keep=width - first,
        ).logits
        for row, (question, answer) in enumerate(pairs):
            at = len(question) - shared - 1 - first
            yield logits[row, at : at + len(answer)].float().log_softmax(dim=-1)
