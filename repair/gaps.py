"""Zeros in the blocks that a repair left out, where an engine would otherwise leave a whole kind of module out.

TGI serves a kind of module (`up_proj`) only where every block of the model has it. A repair that adds one to some
blocks, on an upload without such gaps, would be served without its addition. Factors of zeros in the other blocks add
nothing, exactly, and close the gaps. Written only then: for every other adapter they are dead weight.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

import torch

from repair.checkpoint import Checkpoint
from repair.lora import LayerKind, LoraAdapter, LoraLayer
from repair.serving import serving
from repair.serving_facts import Taken
from repair.serving_traits import BLOCK, Traits

_ENGINE: Final = "tgi"
_FINE: Final = frozenset({Taken.YES, Taken.IF})
WHY: Final = "adds nothing: zeros, because TGI leaves a kind of module out that a block lacks"


@dataclass(frozen=True, kw_only=True)
class Closed:
    """An adapter without gaps.

    Attributes:
        adapter: The very one that was given, where nothing had to be done or nothing would have helped.
        zeros: Names of the modules that were added.
        notes: For the report, where gaps are left that could have been closed.
    """

    adapter: LoraAdapter
    zeros: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def closed(before: LoraAdapter, after: LoraAdapter, aligned: Checkpoint | None) -> Closed:
    """``after`` with zeros where TGI served ``before`` and would serve something else than ``after``.

    ``before`` is as it was read from its files. Without the aligned model nobody knows which modules there are.
    """
    traits = Traits(adapter=after)
    if not traits.with_gaps or traits.unknown_to_tgi or not _served(before):
        return Closed(adapter=after)
    if aligned is None:
        kinds = ", ".join(traits.with_gaps)
        note = f"serving: TGI will leave out {kinds}, not every block has it; with the aligned model zeros are written"
        return Closed(adapter=after, notes=(note,))
    zeros = tuple(_missing(after, aligned))
    whole = replace(after, layers=(*after.layers, *zeros))
    if Traits(adapter=whole).with_gaps:
        return Closed(adapter=after)  # the model has no such module in some block: zeros are of no help
    return Closed(adapter=whole, zeros=tuple(layer.name for layer in zeros))


def _served(adapter: LoraAdapter) -> bool:
    return next(one.taken for one in serving(adapter) if one.engine == _ENGINE) in _FINE


def _missing(adapter: LoraAdapter, aligned: Checkpoint) -> Iterator[LoraLayer]:
    """Zeros of rank 1 for every block of the model that lacks a kind of module which the adapter has."""
    matches = (BLOCK.match(name) for name in aligned.modules)
    depth = 1 + max((int(found["number"]) for found in matches if found is not None), default=-1)
    kinds: dict[tuple[str, str], LoraLayer] = {}
    for layer in adapter.layers:
        found = BLOCK.match(layer.name)
        if found is not None and layer.kind is LayerKind.LINEAR:
            kinds.setdefault((found["before"], found["after"]), layer)
    names = set(adapter.names)
    for (start, end), like in kinds.items():
        for name in (f"{start}.{number}.{end}" for number in range(depth)):
            if name not in names and aligned.has(name):
                yield _zeros(name, like, aligned)


def _zeros(name: str, like: LoraLayer, aligned: Checkpoint) -> LoraLayer:
    stored = aligned.shape(name)
    out_features, in_features = stored[::-1] if like.transposed else stored
    return replace(
        like,
        name=name,
        a=torch.zeros(1, in_features, dtype=like.a.dtype),
        b=torch.zeros(out_features, 1, dtype=like.b.dtype),
        scale=1.0,
    )
