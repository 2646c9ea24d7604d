"""Where an update lies next to what alignment changed: by a basis pack, or by the weights of the model pair.

With v = aligned - base, its leading left singular vectors U and ``c = v v^T / |v|``: Safe LoRA's cosine against its
value for an update without preference, the share of the update inside U, and LoX's ratios of v before and after.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from repair.alignment import alignment_basis
from repair.basis_operator import reported_error, truncated_operator
from repair.grams import gram, row_gram
from repair.layer_basis import LayerBasis
from repair.linalg import Spectrum, compare, delta_energy, energy, homogeneous, spectrum
from repair.lora import LayerReference, LoraLayer
from repair.score import NO_DISPLACEMENT, ModuleScore

_ZERO = "zero adapter: nothing is added here"


@dataclass(frozen=True, kw_only=True)
class Displacement:
    """What is known about v for one module.

    Attributes:
        u: Leading left singular vectors, orthonormal columns.
        values: Their singular values.
        v: The right singular vectors; None where they were not kept.
        norm: Of the whole of v.
        cross: ``<v, D>``; None where only the held triplets are known.
        following: The singular value after the held ones; what the rest of ``<v, D>`` is bounded by.
    """

    u: Tensor
    values: Tensor
    v: Tensor | None
    norm: float
    cross: float | None = None
    following: float = 0.0


def from_pack(layer: LoraLayer, basis: LayerBasis) -> dict[str, Any] | str:
    """Every measure out of a basis pack, or why there is none. No weight is read."""
    found = cosine_of(layer, basis)
    if isinstance(found, str):
        return found
    known = Displacement(
        u=basis.read("u"),
        values=basis.read("values"),
        v=basis.read("v") if basis.inputs else None,
        norm=basis.norm,
        following=basis.following,
    )
    cosine = _cosine("basis pack", *found)
    return {**cosine, "rho_error": reported_error(layer, basis), **inside(layer, known.u), **ratios(layer, known)}


def cosine_of(layer: LoraLayer, basis: LayerBasis) -> tuple[float, float] | str:
    """Safe LoRA's cosine of the update and that of one without preference, or why there is none."""
    if reason := _silent(layer, basis.unusable, basis.norm):
        return reason
    factors = homogeneous(layer)
    seen = compare(truncated_operator(factors.b, basis), factors.b, row_gram(factors.a))
    return seen.cosine, basis.blank["cosine"]


def from_pair(layer: LoraLayer, reference: LayerReference, score: ModuleScore, directions: int) -> dict[str, Any] | str:
    """The cosine as ``score`` has it; with ``directions`` also the others, which read v a few times more."""
    if score.score is None or score.null is None:
        return score.reason
    found = _cosine("checkpoints", score.score, score.null)
    leading = None if directions == 0 else alignment_basis(reference, directions)
    if leading is None:
        return found
    known = _displacement(layer, reference, leading)
    return {**found, **inside(layer, leading.u), **ratios(layer, known)}


def inside(layer: LoraLayer, u: Tensor) -> dict[str, Any]:
    """``|U^T D|^2 / |D|^2`` with the bias as one more column of D, next to that of a random update: k / out."""
    factors = homogeneous(layer)
    within = energy(gram(u, factors.b), factors.a)
    return {
        "directions": u.shape[1],
        "inside": within / energy(factors.b, factors.a),
        "inside_null": u.shape[1] / u.shape[0],
    }


def ratios(layer: LoraLayer, known: Displacement) -> dict[str, Any]:
    """LoX's ``|U^T v| / |v|`` before and ``|U^T (v + D)| / |v + D|`` after, by the identity for sums.

    ``r_after_error`` is how far the second may be off where ``<v, D>`` is known for the held triplets only: the rest is
    at most ``following`` times the sum of the singular values of D outside U.
    """
    before = float(known.values.double().norm()) / known.norm
    if known.v is None:
        return {"r_align": before}
    u, values = known.u.double(), known.values.double()
    writes, reads = u.T @ layer.b.double(), layer.a.double() @ known.v.double()
    held = layer.scale * float((values[:, None] * writes * reads.T).sum())
    within = float(values.square().sum()) + 2 * held + energy(writes, layer.a, layer.scale)
    own = energy(layer.b, layer.a, layer.scale)

    def ratio(cross: float) -> float:
        whole = known.norm**2 + 2 * cross + own
        return min(1.0, math.sqrt(max(0.0, within) / whole)) if whole > 0 else 0.0

    if known.cross is not None:
        return {"r_align": before, "r_after": ratio(known.cross)}
    outside = spectrum(layer.b.double() - u @ writes, layer.a.double(), layer.scale).values
    slack = known.following * float(outside.sum())
    middle = ratio(held)
    error = max(abs(ratio(held + slack) - middle), abs(ratio(held - slack) - middle))
    return {"r_align": before, "r_after": middle, "r_after_error": error}


def _displacement(layer: LoraLayer, reference: LayerReference, leading: Spectrum) -> Displacement:
    """Two exact numbers that the leading triplets do not have: the norm of v, and ``<v, D>``."""
    a, b = layer.a.to(reference.device), layer.b.to(reference.device)
    square, cross = 0.0, 0.0
    for tile in reference.alignment_tiles():
        square += float(tile.values.square().sum(dtype=torch.float64))
        read = tile.values @ a.T.to(tile.values.dtype)
        cross += float((read.double() * b[tile.start : tile.stop].double()).sum())
    return Displacement(
        u=leading.u, values=leading.values, v=leading.v, norm=math.sqrt(square), cross=layer.scale * cross
    )


def _cosine(source: str, rho: float, null: float) -> dict[str, Any]:
    return {"source": source, "rho": rho, "rho_null": null, "rho_over_null": rho / null if null > 0 else None}


def _silent(layer: LoraLayer, unusable: str | None, norm: float) -> str:
    """Why nothing can be said; empty when something can."""
    if unusable is not None:
        return unusable
    if delta_energy(layer) == 0:
        return _ZERO
    return NO_DISPLACEMENT if norm == 0 else ""
