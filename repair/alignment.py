"""What alignment changed in a weight, as an operator on low-rank columns: streamed, never formed.

``v = aligned - base`` is read a few rows at a time. What comes out has as many columns as what went in.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from repair.basis_operator import leading_directions, leading_triplets, truncated_operator
from repair.linalg import Comparison, Spectrum, compare_alone
from repair.lora import LayerReference
from repair.products import product

PROBE_COLUMNS = 16
PROBE_SEED = 20240516
NO_DISPLACEMENT = 1e-9
"""Below this share of the weight's norm, what alignment changed is rounding."""


@dataclass(frozen=True, kw_only=True)
class AlignmentProducts:
    """``v v^T x / |v|`` for some groups of columns x, and the norm of v."""

    norm: float
    groups: list[Float[Tensor, "_out _columns"]]


@dataclass(frozen=True, kw_only=True)
class Projection:
    """Columns after an operator, and how the operator treats columns without any preference."""

    columns: Float[Tensor, "out columns"]
    blank: Comparison


@functools.lru_cache(maxsize=8)
def gaussian_probe(out_features: int, columns: int = PROBE_COLUMNS) -> Float[Tensor, "out columns"]:
    """Columns without any preference, always the same ones: what a score is read against. Not to be changed."""
    generator = torch.Generator().manual_seed(PROBE_SEED)
    return torch.randn(out_features, columns, generator=generator)


def alignment_products(groups: Sequence[Float[Tensor, "out _columns"]], reference: LayerReference) -> AlignmentProducts:
    """I10: ``(v v^T / |v|) x`` for ``v = aligned - base``, by two passes over v and none over ``v v^T``.

    Groups are multiplied one by one, so that the bits of one never depend on which others came along; whoever does not
    mind puts all columns into one group, which is faster. Where alignment changed nothing the operator is undefined;
    then the norm and the columns are zero.
    """
    dtype, device = reference.alignment_dtype(), reference.device
    turned = [x.T.to(device=device, dtype=dtype).contiguous() for x in groups]
    reads = _read(turned, reference)
    norm = math.sqrt(reads.square)
    if _is_rounding(norm, reference):
        return AlignmentProducts(norm=0.0, groups=[torch.zeros_like(x) for x in groups])
    written = _write([total.div_(norm).T for total in reads.columns], reference)
    found = [out.to(device=x.device, dtype=x.dtype) for out, x in zip(written, groups, strict=True)]
    return AlignmentProducts(norm=norm, groups=found)


@dataclass(frozen=True, kw_only=True)
class _Reads:
    """What the first pass over v finds: its squared norm, and ``x^T v`` for each group."""

    square: float
    columns: list[Tensor]


def _read(turned: list[Tensor], reference: LayerReference) -> _Reads:
    """The first pass, for groups given as ``x^T``."""
    squares: list[Tensor] = []
    totals: list[Tensor] = []
    for tile in reference.alignment_tiles():
        flat = tile.values.view(-1)
        squares.append(torch.dot(flat, flat))
        parts = [product(x[:, tile.start : tile.stop], tile.values) for x in turned]
        totals = [total.add_(part) for total, part in zip(totals, parts, strict=True)] if totals else parts
    return _Reads(square=float(torch.stack(squares).double().sum()), columns=totals)


def _write(columns: list[Tensor], reference: LayerReference) -> list[Tensor]:
    """The second pass: ``v y`` for each y. It begins where the first has ended, with what is in the cache."""
    height, device = reference.shape[0], reference.device
    written = [torch.empty(height, y.shape[1], dtype=y.dtype, device=device) for y in columns]
    for tile in reference.alignment_tiles(backwards=True):
        for y, out in zip(columns, written, strict=True):
            out[tile.start : tile.stop] = product(tile.values, y)
    return written


def published_projection(
    b: Float[Tensor, "out columns"], reference: LayerReference, *, remember: bool = True
) -> Projection | None:
    """Safe LoRA's operator on ``b``, and on the probe, which is asked once for each weight of a reference.

    None where alignment changed nothing. Out of a basis pack, the operator is the truncated one. The columns that were
    asked last are remembered unless told not to, so that many candidates for one adapter read the weights once.
    """
    basis = reference.basis
    if basis is not None:
        if basis.norm == 0:
            return None
        return Projection(columns=truncated_operator(b, basis), blank=Comparison(**basis.blank))
    asked: tuple[Tensor, Projection] | None = reference.remembered.get("projection")
    if asked is not None and (asked[0] is b or (asked[0].dtype == b.dtype and torch.equal(asked[0], b))):
        return asked[1]
    blank = reference.remembered.get("published")
    probe = gaussian_probe(len(b))
    products = alignment_products([b] if blank is not None else [b, probe], reference)
    if products.norm == 0:
        return None
    if blank is None:
        blank = reference.remembered["published"] = blank_comparison(products.groups[1], probe)
    found = Projection(columns=products.groups[0], blank=blank)
    if remember:
        reference.remembered["projection"] = b, found
    return found


def truncated_projection(
    b: Float[Tensor, "out columns"], reference: LayerReference, rank: int, share: float | None = None
) -> Projection | None:
    """``b`` inside the top left singular vectors of what alignment changed; None where it changed nothing.

    Of the ``rank`` that are looked for as many as hold ``share`` of the energy of v, where that is given.
    """
    u = _directions(reference, rank, share)
    return None if u is None else projection_onto(u, b)


def projection_onto(u: Float[Tensor, "out k"], b: Float[Tensor, "out columns"]) -> Projection:
    """``b`` inside orthonormal columns, and the probe."""
    probe = gaussian_probe(len(b))
    return Projection(columns=project(b, u), blank=blank_comparison(project(probe, u), probe))


def holding(values: Tensor, share: float | None, reference: LayerReference) -> int:
    """How many of the leading singular values of v hold ``share`` of its energy; all where they hold less, or None."""
    if share is None:
        return len(values)
    total = displacement_energy(reference) if reference.basis is None else reference.basis.norm**2
    reached = values.double().square().cumsum(0) >= share * (total or 0.0) - 1e-12
    return min(len(values), int((~reached).sum()) + 1)


def blank_comparison(edited: Float[Tensor, "out columns"], probe: Float[Tensor, "out columns"]) -> Comparison:
    """How an operator treats an update without any preference, neither among outputs nor among inputs."""
    return compare_alone(edited, probe)


def alignment_basis(
    reference: LayerReference, rank: int, *, oversample: int = 16, power: int = 2, seed: int = PROBE_SEED
) -> Spectrum | None:
    """Top singular triplets of ``v = aligned - base``, by subspace iteration with a fixed start.

    None where alignment changed nothing. v is streamed ``2 * power + 2`` times; out x k and in x k are all that stays.
    A basis pack has them already, and found them among as many as it holds.
    """
    if reference.basis is not None:
        return leading_triplets(reference.basis, rank)
    if reference.aligned is None:
        return None
    out_features, in_features = reference.aligned.shape
    width = min(rank + oversample, out_features, in_features)
    start = torch.randn(in_features, width, generator=torch.Generator().manual_seed(seed))
    u, _ = torch.linalg.qr(_times(reference, start.to(reference.device)))
    for _ in range(power):
        v, _ = torch.linalg.qr(_transposed_times(reference, u))
        u, _ = torch.linalg.qr(_times(reference, v))
    reads = _transposed_times(reference, u)
    norm = float(reads.norm())
    if _is_rounding(norm, reference):
        return None
    right, values, left = torch.linalg.svd(reads, full_matrices=False)
    kept = min(rank, int((values > values[0] * torch.finfo(values.dtype).eps * max(reads.shape)).sum()))
    return Spectrum(u=(u @ left.T)[:, :kept].cpu(), values=values[:kept].cpu(), v=right[:, :kept].cpu())


def along(reference: LayerReference, columns: Float[Tensor, "out k"]) -> Float[Tensor, "in k"]:
    """``v^T columns`` for ``v = aligned - base``, which is streamed once and never held."""
    return _transposed_times(reference, columns.to(reference.device)).cpu()


def displacement_energy(reference: LayerReference) -> float | None:
    """Squared norm of ``v = aligned - base``, streamed once; None where alignment changed nothing."""
    squares = sum(float(tile.values.square().sum(dtype=torch.float64)) for tile in reference.alignment_tiles())
    return None if _is_rounding(math.sqrt(squares), reference) else squares


def project(x: Float[Tensor, "out columns"], basis: Float[Tensor, "out k"]) -> Float[Tensor, "out columns"]:
    """``basis basis^T x`` without forming ``basis basis^T``."""
    wide = torch.promote_types(x.dtype, basis.dtype)
    directions = basis.to(wide).contiguous()  # so that where it comes from does not show in the bits
    inside = product(x.to(wide).T.contiguous(), directions)  # this way round it goes over the basis as it lies
    return product(directions, inside.T).to(x.dtype)


def _directions(reference: LayerReference, rank: int, share: float | None) -> Float[Tensor, "out k"] | None:
    if reference.basis is not None:
        u = leading_directions(reference.basis, rank)
        values = None if share is None or u is None else reference.basis.read("values")[:rank]
    else:
        found = alignment_basis(reference, rank)
        u, values = (None, None) if found is None else (found.u, found.values)
    return u if u is None or values is None else u[:, : holding(values, share, reference)]


def _times(reference: LayerReference, x: Float[Tensor, "in columns"]) -> Float[Tensor, "out columns"]:
    return _write([x.T.to(reference.alignment_dtype()).contiguous().T], reference)[0]


def _transposed_times(reference: LayerReference, x: Float[Tensor, "out columns"]) -> Float[Tensor, "in columns"]:
    turned = x.T.to(reference.alignment_dtype()).contiguous()
    parts = (product(turned[:, tile.start : tile.stop], tile.values) for tile in reference.alignment_tiles())
    return functools.reduce(Tensor.add_, parts).T


def _is_rounding(norm: float, reference: LayerReference) -> bool:
    """Whether the displacement is nothing against the weight. The weight is read only when that is in doubt."""
    if norm == 0.0 or reference.aligned is None:
        return True
    out_features, in_features = reference.aligned.shape
    if norm > 1e-6 * math.sqrt(out_features * in_features):
        return False
    weight = math.sqrt(sum(float(tile.values.square().sum(dtype=torch.float64)) for tile in reference.aligned_tiles()))
    return norm < NO_DISPLACEMENT * weight
