"""What a calibration knows about some output rows of a fused module: the gate, or the up, of an expert spelt apart.

The inputs are those of the whole. A low-rank matrix cut to some rows stays one, with singular vectors of its own.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from repair.moments import LayerCalibration

Read = Callable[[str], Tensor]


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
