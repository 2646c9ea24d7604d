"""The algebra of low-rank updates. No function here ever forms an out x in delta or an out x out operator.

``D = scale * b @ a`` throughout. Every r x r product is summed in float64: the factors are thin, so that costs nothing,
and scores stay comparable between modules. The names I1 to I12 are only labels for the identities.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from repair.grams import gram, row_gram
from repair.lora import LayerReference, LoraLayer


@dataclass(frozen=True, kw_only=True)
class Factors:
    """The two factors of an update, scale left out."""

    b: Float[Tensor, "out rank"]
    a: Float[Tensor, "rank in"]


@dataclass(frozen=True, kw_only=True)
class Spectrum:
    """A thin singular value decomposition ``u @ diag(values) @ v.T``."""

    u: Float[Tensor, "out k"]
    values: Float[Tensor, " k"]
    v: Float[Tensor, "in k"]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """How an edited update ``P a`` compares with the original ``B a``; the scale is left out of the energies.

    Attributes:
        cosine: Between the two, 0 when one of them is zero.
        energy: Squared norm of the original.
        edited: Squared norm of the edited one.
        distance: Norm of their difference.
    """

    cosine: float
    energy: float
    edited: float
    distance: float


def homogeneous(layer: LoraLayer) -> Factors:
    """The factors of what a layer adds, its bias taken as one more column that reads the constant 1.

    So every score, energy and edit treats ``lora_B.bias`` as the part of the update that it is.
    """
    if layer.bias is None:
        return Factors(b=layer.b, a=layer.a)
    rank, width = layer.a.shape
    a = layer.a.new_zeros(rank + 1, width + 1)
    a[:rank, :width] = layer.a
    a[rank, width] = 1.0
    return Factors(b=torch.cat([layer.b, layer.bias[:, None].to(layer.b.dtype)], dim=1), a=a)


def energy(b: Float[Tensor, "out rank"], a: Float[Tensor, "rank in"], scale: float = 1.0) -> float:
    """I1: ``|D|^2 = s^2 tr((b^T b)(a a^T))``, never below zero."""
    return max(0.0, scale**2 * float((gram(b, b) * row_gram(a)).sum()))


def delta_energy(layer: LoraLayer) -> float:
    """Squared norm of everything a layer adds."""
    factors = homogeneous(layer)
    return energy(factors.b, factors.a, layer.scale)


def inner_product(one: Factors, two: Factors) -> float:
    """I3: ``<b1 a1, b2 a2> = tr((b1^T b2)(a2 a1^T))``."""
    return float((gram(one.b, two.b) * gram(one.a.T, two.a.T)).sum())


def low_rank_cosine(one: Factors, two: Factors) -> float:
    """Cosine between two flattened updates; 0 when one of them is zero."""
    size = math.sqrt(energy(one.b, one.a) * energy(two.b, two.a))
    return inner_product(one, two) / size if size > 0 else 0.0


def relative_distance(one: LoraLayer, two: LoraLayer) -> float:
    """``|D1 - D2| / |D1|``, from the singular values of the stacked factors; 0 when both are zero."""
    b = torch.cat([one.scale * one.b.double(), -two.scale * two.b.double()], dim=1)
    a = torch.cat([one.a.double(), two.a.double()], dim=0)
    size = math.sqrt(energy(one.b, one.a, one.scale))
    distance = float(spectrum(b, a).values.norm())
    return distance / size if size > 0 else distance


def compare(
    edited: Float[Tensor, "out rank"], b: Float[Tensor, "out rank"], inputs: Float[Tensor, "rank rank"]
) -> Comparison:
    """I2: three Grams say all about ``edited @ a`` against ``b @ a``; ``inputs`` is ``a @ a.T`` in float64."""
    before = max(0.0, float((gram(b, b) * inputs).sum()))
    after = max(0.0, float((gram(edited, edited) * inputs).sum()))
    cross = float((gram(edited, b) * inputs).sum())
    return _comparison(before, after, cross)


def compare_alone(edited: Float[Tensor, "out columns"], b: Float[Tensor, "out columns"]) -> Comparison:
    """The same for inputs without any preference: ``a @ a.T`` is the identity, and the Grams are dot products."""
    one, two = edited.double().flatten(), b.double().flatten()
    return _comparison(float(two @ two), float(one @ one), float(one @ two))


def _comparison(before: float, after: float, cross: float) -> Comparison:
    size = math.sqrt(before * after)
    return Comparison(
        cosine=cross / size if size > 0 else 0.0,
        energy=before,
        edited=after,
        distance=math.sqrt(max(0.0, after - 2 * cross + before)),
    )


def spectrum(b: Float[Tensor, "out rank"], a: Float[Tensor, "rank in"], scale: float = 1.0) -> Spectrum:
    """I5: singular values of D through two thin QR and one r x r SVD.

    Not through the eigenvalues of Grams: squaring the condition number loses the small singular values.
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    u, values, vh = torch.linalg.svd(scale * r_b @ r_a.T, full_matrices=False)
    return Spectrum(u=q_b @ u, values=values, v=q_a @ vh.T)


def balanced(b: Float[Tensor, "out rank"], a: Float[Tensor, "rank in"], scale: float = 1.0) -> Factors:
    """The same update with both factors equally large, so that neither under- nor overflows in 16 bits."""
    found = spectrum(b, a, scale)
    root = found.values.sqrt()
    return Factors(b=found.u * root, a=root[:, None] * found.v.T)


def row_energies(b: Float[Tensor, "out rank"], a: Float[Tensor, "rank in"], scale: float) -> Tensor:
    """I6: squared norm of each row of D, in float64: one number for each output."""
    wide = b.double()
    found: Tensor = scale**2 * ((wide @ row_gram(a)) * wide).sum(1)
    return found


def row_norms(layers: list[LoraLayer], reference: LayerReference) -> list[Tensor]:
    """Row norms of ``W + D`` for several updates of one weight, which is read once.

    ``|W_i + D_i|^2 = |W_i|^2 + 2 s (W a^T)_i . b_i + |D_i|^2``: DoRA's denominator, without D.
    """
    inputs = torch.cat([layer.a for layer in layers], dim=0).to(reference.device)
    squares: list[Tensor] = []
    products: list[Tensor] = []
    for tile in reference.aligned_tiles():
        squares.append(tile.values.square().sum(1, dtype=torch.float64).cpu())
        products.append((tile.values @ inputs.T.to(tile.values.dtype)).double().cpu())
    weight, read = torch.cat(squares), torch.split(torch.cat(products), [layer.rank for layer in layers], dim=1)
    norms = []
    for layer, seen in zip(layers, read, strict=True):
        cross = 2 * layer.scale * (seen * layer.b.double()).sum(1)
        norms.append((weight + cross + row_energies(layer.b, layer.a, layer.scale)).clamp(min=0).sqrt())
    return norms


def sampled_entries(b: Float[Tensor, "out rank"], a: Float[Tensor, "rank in"], count: int, seed: int) -> Tensor:
    """I12: entries of ``b @ a`` at random positions, the same positions for the same shape and seed."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(b.shape[0], (count,), generator=generator)
    columns = torch.randint(a.shape[1], (count,), generator=generator)
    inputs = a.T.contiguous()
    chunks = zip(torch.split(rows, 65536), torch.split(columns, 65536), strict=True)
    return torch.cat([(b[i] * inputs[j]).sum(1) for i, j in chunks])
