"""Under which name a calibration knows an expert, and what it knows of the gate or the up of one that is spelt apart.

These are some output rows of a fused module. The inputs are those of the whole; a low-rank matrix cut to some rows
stays one, with singular vectors of its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gate.parameters import fused_home, homes, spellings
from repair.experts import slot_name
from repair.lora import LoraLayer, ParameterSlot
from repair.moments import LayerCalibration

Read = Callable[[str], Tensor]


def names_of(layer: LoraLayer) -> tuple[str, ...]:
    """What the module of a layer may be called in a pack: files and model classes differ for experts and routers."""
    if layer.slot is None:
        return spellings(layer.name)
    return (
        *spellings(layer.name),
        *(slot_name(replace(layer.slot, parameter=home)) for home in homes(layer.slot.parameter)),
    )


@dataclass(frozen=True, kw_only=True)
class Apart:
    """Where an expert that the adapter spells by itself is in a fused one: under which names, and which part of it."""

    names: tuple[str, ...]
    part: int
    parts: int


def apart_of(layer: LoraLayer) -> Apart | None:
    """For a layer that is an expert spelt by itself; None for any other."""
    found = None if layer.slot is not None else fused_home(layer.name)
    if found is None:
        return None
    path, expert, part, parts = found
    names = tuple(slot_name(ParameterSlot(parameter=home, expert=expert)) for home in homes(path))
    return Apart(names=names, part=part, parts=parts)


def part_of(whole: LayerCalibration, part: int, parts: int) -> LayerCalibration:
    """One of ``parts`` equal groups of output rows; itself when there is one.

    The length of the whole gradient is not known for a part: that of its held directions stands for it.
    """
    if parts == 1:
        return whole
    size = whole.shape[0] // parts
    rows = slice(part * size, (part + 1) * size)

    def read(name: str) -> Tensor:
        if name.startswith("inputs."):
            return whole.read(name)
        if name in {"gradient.u", "gradient.values", "gradient.v"}:
            return _gradient(whole.read, rows)[name]
        if name.endswith((".basis", ".values")):
            return _eigenpairs(whole.read, name.rpartition(".")[0], rows)[name.rpartition(".")[2]]
        return whole.read(name)[rows]  # means, squares, the gradient of a bias, and scores: one for each row

    numbers = {key: value for key, value in whole.numbers.items() if key != "unit_parts"}
    numbers["gradient_total"] = float(read("gradient.values").double().square().sum())
    return replace(whole, shape=(size, whole.shape[1]), numbers=numbers, read=read)


def _eigenpairs(read: Read, side: str, rows: slice) -> dict[str, Tensor]:
    """Of ``S Q diag(values) Q^T S^T`` where S picks the rows."""
    root = read(f"{side}.values").double().clamp(min=0).sqrt()
    u, values, _ = torch.linalg.svd(read(f"{side}.basis").double()[rows] * root, full_matrices=False)
    return {"basis": u.float(), "values": values.square().float()}


def _gradient(read: Read, rows: slice) -> dict[str, Tensor]:
    """Singular triplets of the rows of ``u diag(values) v^T``."""
    u, values, turn = torch.linalg.svd(
        read("gradient.u").double()[rows] * read("gradient.values").double(), full_matrices=False
    )
    v = read("gradient.v").double() @ turn.T
    return {"gradient.u": u.float(), "gradient.values": values.float(), "gradient.v": v.float()}
