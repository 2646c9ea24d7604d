"""The operators of `alignment.py` out of a basis pack, and whether a pack is good enough for one layer.

``c = v v^T / |v|`` becomes ``c_k = u diag(values^2) u^T / |v|``; no weight is read.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from repair.grams import gram, row_gram
from repair.layer_basis import BasisNeed, LayerBasis
from repair.linalg import Spectrum, homogeneous
from repair.lora import LoraLayer


def leading_triplets(basis: LayerBasis, rank: int) -> Spectrum | None:
    """The ``rank`` largest triplets of v, out of a pack with both sides; None where alignment changed nothing."""
    if basis.norm == 0:
        return None
    parts = {"u": basis.read("u")[:, :rank], "v": basis.read("v")[:, :rank]}
    return Spectrum(values=basis.read("values")[:rank], **parts)


def leading_directions(basis: LayerBasis, rank: int) -> Float[Tensor, "out k"] | None:
    """The output side of the same: enough to project."""
    return None if basis.norm == 0 else basis.read("u")[:, :rank]


def operator_size(basis: LayerBasis) -> float:
    """Spectral norm of ``c``; 0 where alignment changed nothing."""
    return 0.0 if basis.norm == 0 else float(_stretch(basis)[0])


def truncated_operator(b: Float[Tensor, "out columns"], basis: LayerBasis) -> Float[Tensor, "out columns"]:
    """``c_k b``, in the number format of ``b``."""
    u, stretch = basis.read("u").double(), _stretch(basis)
    found: Tensor = u @ (stretch[:, None] * (u.T @ b.double()))
    return found.to(b.dtype)


def operator_error(layer: LoraLayer, basis: LayerBasis) -> float:
    """At most how far ``c_k D`` is from ``c D``, relative to ``|c_k D|``; derived.

    ``|(c - c_k) D| <= following^2 / |v| * |D - u u^T D|``. ``following`` is estimated from below, so the bound is as
    good as that estimate. Infinite when nothing of D is left by ``c_k`` but something is outside.
    """
    factors = homogeneous(layer)
    inputs = row_gram(factors.a)
    inside = basis.read("u").double().T @ factors.b.double()
    whole = float((gram(factors.b, factors.b) * inputs).sum())
    outside = max(0.0, whole - float((gram(inside, inside) * inputs).sum()))
    seen = _stretch(basis)[:, None] * inside
    left = math.sqrt(max(0.0, float((gram(seen, seen) * inputs).sum())))
    missed = basis.following**2 / basis.norm * math.sqrt(outside)
    if missed == 0:
        return 0.0
    return missed / left if left > 0 else math.inf


def shortfall(layer: LoraLayer, basis: LayerBasis, need: BasisNeed) -> str | None:
    """Why the pack cannot answer for this layer; None when it can."""
    if basis.unusable is not None or basis.norm == 0:
        return None  # there is nothing to know, and that is known
    if need.inputs and not basis.inputs:
        return "it was made without the input side"
    if need.rank is not None:
        return None if basis.spans(need.rank) else f"it has {basis.asked} directions, {need.rank} were asked for"
    if not bool(layer.b.any()):
        return None
    worst = reported_error(layer, basis)
    return None if worst <= basis.tolerance else f"its operator error is {worst:.3g}, above {basis.tolerance:g}"


def reported_error(layer: LoraLayer, basis: LayerBasis) -> float:
    """The error of the truncated operator: on columns without preference as measured, or on this layer if larger."""
    return max(basis.error, operator_error(layer, basis))


def _stretch(basis: LayerBasis) -> Tensor:
    """What ``c_k`` multiplies each kept direction with, in float64."""
    found: Tensor = basis.read("values").to(torch.float64).square() / basis.norm
    return found
