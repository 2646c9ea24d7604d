"""Score many adapters of one model pair while its weights are read once for all of them.

The score is Safe LoRA's cosine, see `methods/safe_lora.py`. The columns of all adapters stand side by side in one
product, so that a weight is read and widened once. Which adapters came along can change the rounding of a sum and
nothing else: scores agree to 1e-6 of their size with those of an adapter alone (decision 14).
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from repair.alignment import published_projection
from repair.context import RepairContext
from repair.grams import row_gram
from repair.linalg import compare, homogeneous
from repair.lora import LayerReference, LoraAdapter, LoraLayer
from repair.read_ahead import ReadAhead
from repair.threads import in_threads

ZERO = "zero adapter: nothing is added here"
NO_DISPLACEMENT = "no alignment displacement: alignment did not change this weight"


@dataclass(frozen=True, kw_only=True)
class ModuleScore:
    """What one adapter's update of one module looks like next to what alignment changed there.

    Attributes:
        name: The module.
        adapter: Which adapter.
        score: Cosine between the update and its projection; None when nothing can be said.
        null: The same cosine for an update without any preference.
        shrink: Norm of the projection over that of the update.
        reason: Why nothing can be said; empty otherwise.
    """

    name: str
    adapter: str
    score: float | None = None
    null: float | None = None
    shrink: float | None = None
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self)


def score_adapters(adapters: Mapping[str, LoraAdapter], context: RepairContext) -> Iterator[ModuleScore]:
    """Every module of every adapter, module by module; tells ``context.progress`` after each.

    Raises MissingWeight or ShapeMismatch when an adapter was made for another model.
    """
    names = sorted({name for adapter in adapters.values() for name in adapter.names})
    layers = {adapter: one.by_name for adapter, one in adapters.items()}

    def scored(name: str) -> list[ModuleScore]:
        return list(_scored({key: found[name] for key, found in layers.items() if name in found}, context, ahead))

    def first(name: str) -> LayerReference:
        return context.reference_for(next(found[name] for found in layers.values() if name in found))

    with ReadAhead(names, first) as ahead:
        for done, scores in enumerate(in_threads(scored, names, context.device), start=1):
            yield from scores
            context.progress(names[done - 1], done / len(names))


def _scored(layers: Mapping[str, LoraLayer], context: RepairContext, ahead: ReadAhead) -> Iterator[ModuleScore]:
    """One module; adapters that see its weight the same way are read for together."""
    ways: dict[bool, dict[str, LoraLayer]] = {}
    for adapter, layer in layers.items():
        ways.setdefault(layer.transposed, {})[adapter] = layer
    for group in ways.values():
        references = {adapter: context.reference_for(layer) for adapter, layer in group.items()}
        reference = ahead.watched(next(iter(references.values())))
        yield from _together(group, reference)


def _together(layers: Mapping[str, LoraLayer], reference: LayerReference) -> Iterator[ModuleScore]:
    factors = {adapter: homogeneous(layer) for adapter, layer in layers.items()}
    heard = [adapter for adapter, one in factors.items() if bool(one.b.any())]
    if reference.unusable is not None or not heard:
        for adapter, layer in layers.items():
            yield ModuleScore(name=layer.name, adapter=adapter, reason=reference.unusable or ZERO)
        return
    columns = torch.cat([factors[adapter].b for adapter in heard], dim=1)
    found = published_projection(columns, reference, remember=False)
    widths = [factors[adapter].b.shape[1] for adapter in heard]
    projected = {} if found is None else dict(zip(heard, found.columns.split(widths, dim=1), strict=True))
    for adapter, layer in layers.items():
        if adapter not in heard or found is None:
            reason = NO_DISPLACEMENT if adapter in heard else ZERO
            yield ModuleScore(name=layer.name, adapter=adapter, reason=reason)
            continue
        one = factors[adapter]
        # Widened here and let go: nobody asks for these Grams again, and thousands of them would scatter the heap.
        edited, b, a = (x.double() for x in (projected[adapter], one.b, one.a))
        seen = compare(edited, b, row_gram(a))
        if seen.energy == 0:
            yield ModuleScore(name=layer.name, adapter=adapter, reason=ZERO)
            continue
        yield ModuleScore(
            name=layer.name,
            adapter=adapter,
            score=seen.cosine,
            null=found.blank.cosine,
            shrink=(seen.edited / seen.energy) ** 0.5,
        )
