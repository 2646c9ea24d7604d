"""Safety scores of whole units: MLP channels and attention heads (the idea of 2410.10862, our own formula).

A unit's part in a block is what it adds to the block's output: the mean square of its activation times the squared
norm of the column that reads it. Its score is its share of that on harmful prompts minus its share on benign ones.

Which module reads a block's units, and which beside it write them, is known by name: `READERS`. A fused writer has the
units of its parts one part below the other, or gate and up of each channel in turns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final

import torch
from torch import Tensor

from repair.calibration import MeasuredModule
from repair.moments import Side, Topic


@dataclass(frozen=True, kw_only=True)
class Writers:
    """Which modules write the units that one reads.

    Attributes:
        alone: Each writes all units once.
        fused: Each writes them several times: gate and up of a channel, or q, k and v of a head.
        heads: The units are attention heads; else MLP channels.
    """

    alone: tuple[str, ...] = ()
    fused: tuple[str, ...] = ()
    heads: bool = False


_ATTENTION: Final = Writers(alone=("q_proj", "k_proj", "v_proj"), fused=("qkv_proj", "c_attn"), heads=True)

READERS: Final[Mapping[str, tuple[Writers, ...]]] = MappingProxyType(
    {
        "down_proj": (Writers(alone=("gate_proj", "up_proj"), fused=("gate_up_proj",)),),
        "fc2": (Writers(alone=("fc1",)),),
        "w2": (Writers(alone=("w1", "w3")),),
        "o_proj": (_ATTENTION,),
        "dense": (_ATTENTION,),
        "out_proj": (_ATTENTION,),
        "c_proj": (Writers(alone=("c_fc",)), _ATTENTION),  # of the MLP and of the attention of a GPT-2
    }
)
"""The last part of a reader's name; of several the first counts that has a writer beside the reader."""


def with_unit_scores(
    modules: Mapping[str, MeasuredModule],
    column_norms: Mapping[str, Tensor],
    heads: int | None,
    interleaved: frozenset[str] = frozenset(),
) -> dict[str, MeasuredModule]:
    """The modules, with unit scores where their names and shapes are those of an MLP or of an attention block.

    ``column_norms`` holds the norm of each column of every weight, ``heads`` is the number of query heads, and
    ``interleaved`` the fused writers that have gate and up of each channel in turns.
    """
    found = dict(modules)
    for name, module in modules.items():
        parent, _, last = name.rpartition(".")
        writers = _beside(parent, last, modules)
        count = heads if writers is not None and writers.heads else module.shape[1]
        if writers is None or count is None or module.shape[1] % count:
            continue
        width = module.shape[1] // count
        scores = _scores(modules, name, column_norms[name]).view(count, width).sum(1)
        found[name] = _with_units(module, (scores,), width, reads=True)
        for sibling in _there(parent, writers.alone, modules):
            units = _of_writer(scores, modules[sibling].shape[0], width)
            if units is not None:
                found[sibling] = _with_units(modules[sibling], (units,), width, reads=False)
        for sibling in _there(parent, writers.fused, modules):
            parts = _of_fused(scores, modules[sibling].shape[0], width, heads=writers.heads)
            if parts is not None and sibling in interleaved:
                found[sibling] = _with_units(modules[sibling], (scores,), len(parts) * width, reads=False)
            elif parts is not None:
                found[sibling] = _with_units(modules[sibling], parts, width, reads=False)
    return found


def _beside(parent: str, last: str, modules: Mapping[str, MeasuredModule]) -> Writers | None:
    """The writers of this reader; the first kind that it may have where none of them was measured."""
    kinds = READERS.get(last, ())
    present = (one for one in kinds if any(True for _ in _there(parent, (*one.alone, *one.fused), modules)))
    return next(present, kinds[0] if len(kinds) == 1 else None)


def _there(parent: str, names: tuple[str, ...], modules: Mapping[str, MeasuredModule]) -> list[str]:
    return [sibling for sibling in (f"{parent}.{one}" for one in names) if sibling in modules]


def _scores(modules: Mapping[str, MeasuredModule], reader: str, norms: Tensor) -> Tensor:
    """Excess share on harmful prompts, for each column of the module that reads; they add up to zero."""
    owner = modules[modules[reader].inputs or reader]
    columns = norms.double().square()
    shares = []
    for topic in (Topic.HARMFUL, Topic.BENIGN):
        part = owner.tensors[f"{Side.INPUTS}.{topic}.squares"].double() * columns
        shares.append(part / part.sum().clamp(min=1e-300))
    return shares[0] - shares[1]


def _of_writer(scores: Tensor, out_features: int, width: int) -> Tensor | None:
    """Scores of the units of a writer; a key-value head serves several query heads and takes their highest."""
    units = out_features // width
    if units == 0 or out_features % width or len(scores) % units:
        return None
    return scores.view(units, -1).amax(1)


def _of_fused(scores: Tensor, out_features: int, width: int, *, heads: bool) -> tuple[Tensor, ...] | None:
    """Scores of the units of each part of a fused writer: gate and up, or queries, keys and values."""
    if not heads:
        return (scores, scores) if out_features == 2 * len(scores) * width else None
    rest = out_features - len(scores) * width
    others = None if rest <= 0 or rest % 2 else _of_writer(scores, rest // 2, width)
    return None if others is None else (scores, others, others)


def _with_units(module: MeasuredModule, parts: tuple[Tensor, ...], width: int, *, reads: bool) -> MeasuredModule:
    numbers = {**module.numbers, "unit_width": float(width), "unit_reads": float(reads)}
    tensors = {**module.tensors, "units": torch.cat(parts)}
    if len(parts) > 1:
        tensors["unit_parts"] = torch.tensor([float(len(part)) for part in parts])
        numbers["unit_parts"] = float(len(parts))
    return replace(module, tensors=tensors, numbers=numbers)
