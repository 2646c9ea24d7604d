"""The shape of an update by its factors alone: norms, singular values, tails. No reference is needed.

After 2602.15195, which tells poisoned adapters of one making from clean ones by such features. They say nothing about
what an update does; docs/diagnostics.md tells how far they go.
"""

import math
from typing import Any, Final

import torch
from torch import Tensor

from repair.linalg import homogeneous, sampled_entries, spectrum
from repair.lora import LayerReference, LoraLayer

SAMPLES: Final = 1 << 15
SEED: Final = 20260215


def spectrum_of(layer: LoraLayer) -> dict[str, Any]:
    """Norm and spectrum of everything a layer adds, its bias as one more column; None where there is no update.

    ``entropy`` is ``-sum p ln p`` with ``p_i = sigma_i^2 / sum sigma^2``, in nats; ``stable_rank`` is
    ``|D|^2 / sigma_1^2``; ``kurtosis`` is that of the entries of ``B A`` at random places, 3 for a Gaussian.
    """
    factors = homogeneous(layer)
    values = spectrum(factors.b, factors.a, layer.scale).values
    squares = values.square()
    total = float(squares.sum())
    found = {"norm": math.sqrt(total), "largest_singular_value": float(values[0])}
    if total == 0:
        return found | dict.fromkeys(("share_of_largest", "stable_rank", "entropy", "kurtosis"))
    shares = squares / total
    return found | {
        "share_of_largest": float(shares[0]),
        "stable_rank": 1 / float(shares[0]),
        "entropy": -float(torch.special.xlogy(shares, shares).sum()),
        "kurtosis": kurtosis(sampled_entries(layer.b.double(), layer.a.double(), SAMPLES, SEED)),
    }


def kurtosis(values: Tensor) -> float | None:
    """Fourth central moment over the squared second; None for values that are all alike."""
    squares = (values.double() - values.double().mean()).square()
    second = float(squares.mean())
    return float(squares.square().mean()) / second**2 if second > 0 else None


def weight_norm(reference: LayerReference) -> float:
    """Frobenius norm of the aligned weight; read once for each reference that stays open."""
    known = reference.remembered.get("weight_norm")
    if known is None:
        squares = [tile.values.square().sum(dtype=torch.float64) for tile in reference.aligned_tiles()]
        known = reference.remembered["weight_norm"] = math.sqrt(float(torch.stack(squares).sum()))
    return float(known)
