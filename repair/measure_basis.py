"""Measure a basis pack: the leading singular triplets of what alignment changed, one linear after the other.

Randomised subspace iteration over row tiles: v is read ``2 * power + 2`` times for the triplets and twice more for its
norm and for the error of truncating the operator, and never formed.
"""

from collections.abc import Iterator
from dataclasses import asdict

import torch

from repair.alignment import alignment_basis, alignment_products, blank_comparison, gaussian_probe
from repair.basis import BasisSettings
from repair.basis_writer import MeasuredBasis
from repair.context import RepairContext
from repair.errors import MissingReference
from repair.linalg import Comparison, Spectrum
from repair.lora import LayerReference, LoraLayer
from repair.read_ahead import ReadAhead
from repair.threads import in_threads

_NOTHING = Comparison(cosine=0.0, energy=0.0, edited=0.0, distance=0.0)


def measured_linears(context: RepairContext, settings: BasisSettings) -> Iterator[MeasuredBasis]:
    """Every linear of the pair, sorted by name; tells ``context.progress`` after each. Raises WrongReference."""
    if context.aligned is None or context.base is None:
        raise MissingReference("a basis pack is made of two models", field="base" if context.aligned else "aligned")
    aligned, base = context.aligned, context.base
    known = [name for name in sorted(aligned.linears) if base.has(name)]

    def reference_for(name: str) -> LayerReference:
        return context.reference_for(_blank(name, aligned.shape(name)))

    def measured(name: str) -> MeasuredBasis:
        return _measured(ahead.watched(reference_for(name)), settings)

    with ReadAhead(known, reference_for) as ahead:
        # As a repair does it, so that a repair of the pack's own rank gives the very bits.
        for done, one in enumerate(in_threads(measured, known, context.device), start=1):
            yield one
            context.progress(one.name, done / len(known))


def left_out(context: RepairContext) -> dict[str, str]:
    """Linears that a pack of this pair says nothing about, and why."""
    if context.aligned is None or context.base is None:
        return {}
    base = context.base
    return {name: "the base has no such module" for name in context.aligned.linears if not base.has(name)}


def _blank(name: str, shape: tuple[int, ...]) -> LoraLayer:
    """A layer that adds nothing, to ask for the weights of its module."""
    return LoraLayer(name=name, a=torch.zeros(1, shape[1]), b=torch.zeros(shape[0], 1), scale=1.0)


def _measured(reference: LayerReference, settings: BasisSettings) -> MeasuredBasis:
    if reference.unusable is not None:
        return _empty(reference)
    # One triplet more out of the same subspace: the value that follows tells what a truncation can miss.
    found = alignment_basis(reference, settings.rank + 1, oversample=settings.oversample - 1, power=settings.power)
    probe = gaussian_probe(reference.shape[0])
    products = alignment_products([probe], reference)
    if found is None or products.norm == 0:
        return _empty(reference)
    kept = Spectrum(u=found.u[:, : settings.rank], values=found.values[: settings.rank], v=found.v[:, : settings.rank])
    whole = products.groups[0].double()
    u = kept.u.double()
    truncated = u @ ((kept.values.double().square() / products.norm)[:, None] * (u.T @ probe.double()))
    tensors = {"u": kept.u, "values": kept.values} | ({"v": kept.v} if settings.inputs else {})
    following = float(found.values[settings.rank]) if len(found.values) > settings.rank else 0.0
    return MeasuredBasis(
        name=reference.name,
        shape=reference.shape,
        tensors=tensors,
        numbers={
            "norm": products.norm,
            "following": following,
            "error": float((whole - truncated).norm() / whole.norm()),
        },
        blank=asdict(blank_comparison(products.groups[0], probe)),
        unusable=None,
    )


def _empty(reference: LayerReference) -> MeasuredBasis:
    return MeasuredBasis(
        name=reference.name,
        shape=reference.shape,
        tensors={},
        numbers={"norm": 0.0, "following": 0.0, "error": 0.0},
        blank=asdict(_NOTHING),
        unusable=reference.unusable,
    )
