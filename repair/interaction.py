"""How what is concatenated to a module relates to what the module adds already. It is told, it decides nothing.

An account of weights: an addition that the adapter does not oppose here may still be overruled on activations. How loud
the two are there is told as well where a calibration has the module's inputs.
"""

from dataclasses import dataclass, replace

import torch

from repair.grams import gram
from repair.linalg import Factors, Spectrum, energy, homogeneous, low_rank_cosine, spectrum
from repair.lora import LoraLayer
from repair.moments import LayerCalibration
from repair.response import response_ratio

NEGLIGIBLE = 1e-6
"""Directions below this share of the largest singular value are what float32 left over."""


@dataclass(frozen=True, kw_only=True)
class Addition:
    """What was concatenated to one module; the shares are None where one of the two updates is zero.

    Attributes:
        rank: What it adds to the rank of the module.
        energy: Its squared norm, strength included.
        cosine: Between it and the module's own update; strongly negative when the adapter cancels it.
        output_overlap: How much of the smaller of their column spaces lies in the other, 0 to 1.
        input_overlap: The same for their row spaces: whether they read the same inputs.
        opposed: Share of its energy that the module's own update takes away along its singular directions, 0 to 1.
        response: How loud the module's own update is beside it on harmful prompts, as `response_ratio` has it; None
            without a calibration.
    """

    rank: int
    energy: float
    cosine: float | None = None
    output_overlap: float | None = None
    input_overlap: float | None = None
    opposed: float | None = None
    response: float | None = None


def interaction(own: LoraLayer | None, added: LoraLayer, known: LayerCalibration | None = None) -> Addition:
    """Compare an addition with the module's own update, by factors; ``own`` is None where there is none.

    What the calibration ``known`` says of the module's inputs adds how the two answer to harmful prompts.
    """
    theirs = homogeneous(_like(added, own))
    size = energy(theirs.b, theirs.a, added.scale)
    if own is None:
        return Addition(rank=added.rank, energy=size)
    ours = homogeneous(_like(own, added))
    mine, other = _directions(ours, own.scale), _directions(theirs, added.scale)
    if len(mine.values) == 0 or len(other.values) == 0:
        return Addition(rank=added.rank, energy=size)
    sign = 1 if own.scale * added.scale > 0 else -1
    return Addition(
        rank=added.rank,
        energy=size,
        cosine=sign * low_rank_cosine(ours, theirs),
        output_overlap=_overlap(mine.u, other.u),
        input_overlap=_overlap(mine.v, other.v),
        opposed=_opposed(ours, own.scale, other),
        response=response_ratio(own, added, known),
    )


def directions(layer: LoraLayer) -> Spectrum:
    """Singular triplets of everything a layer adds, in float64, without those that are rounding.

    A bias counts as one more input, the last one. Depends on the update, not on how it is factored.
    """
    return _directions(homogeneous(layer), layer.scale)


def _directions(factors: Factors, scale: float) -> Spectrum:
    found = spectrum(factors.b, factors.a, scale)
    kept = int((found.values > NEGLIGIBLE * found.values[0]).sum())
    return Spectrum(u=found.u[:, :kept], values=found.values[:kept], v=found.v[:, :kept])


def _like(layer: LoraLayer, other: LoraLayer | None) -> LoraLayer:
    """The layer with a bias of zero where only the other one has a bias, so that both have as many inputs."""
    if other is None or other.bias is None or layer.bias is not None:
        return layer
    return replace(layer, bias=layer.b.new_zeros(layer.shape[0]))


def _overlap(one: torch.Tensor, two: torch.Tensor) -> float:
    """Mean squared cosine of the principal angles between two orthonormal bases."""
    return float(gram(one, two).square().sum()) / min(one.shape[1], two.shape[1])


def _opposed(own: Factors, scale: float, added: Spectrum) -> float:
    """``sum_i (s_i^2 - max(s_i + min(c_i, 0), 0)^2) / sum_i s_i^2`` with ``c_i = u_i^T D v_i`` for triplets (u, s, v).

    Only what points against a direction counts, and no more than all of it.
    """
    along = scale * (gram(added.u, own.b) * (own.a.double() @ added.v).T).sum(1)
    left = (added.values + along.clamp(max=0)).clamp(min=0)
    return 1 - float(left.square().sum() / added.values.square().sum())
