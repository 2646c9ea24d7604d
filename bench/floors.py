"""What a repair cannot do without: reading both checkpoints once, and the multiply-adds of the formulas."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.pair import RANK, Sizes
from repair.alignment import PROBE_COLUMNS
from repair.checkpoint import Checkpoint
from repair.context import RepairContext
from repair.lora import TILE_NUMBERS, LayerReference, LoraLayer
from repair.products import product
from repair.read_ahead import ReadAhead


def opened(folder: Path) -> RepairContext:
    """The pair, with nothing remembered from before."""
    return RepairContext(aligned=Checkpoint.open(folder / "aligned"), base=Checkpoint.open(folder / "base"))


def read_once(folder: Path, layers: tuple[LoraLayer, ...], *, ahead: bool = False) -> int:
    """Every row of both checkpoints through the reader that a repair uses, in tiles of the same size; bytes read.

    The reader hands out views of a mapped file, so each tile is copied to where a repair would widen it. One thread
    reads, however many there are. ``ahead``: what comes next is fetched meanwhile, as a repair does it.
    """
    context = opened(folder)
    known = {layer.name: layer for layer in layers}
    with ReadAhead(list(known), lambda name: context.reference_for(known[name])) as fetched:
        references = map(context.reference_for, layers)
        return sum(_read(fetched.watched(one) if ahead else one) for one in references)


def _read(reference: LayerReference) -> int:
    reference.wait()
    total = 0
    for weight in (reference.aligned, reference.base):
        assert weight is not None
        step = reference.rows_at_once
        tile = torch.empty(step, weight.shape[1], dtype=torch.bfloat16)
        for start in range(0, weight.shape[0], step):
            rows = weight.rows(start, min(start + step, weight.shape[0]))
            total += tile[: len(rows)].copy_(rows).nbytes

    return total


def forget(folder: Path) -> None:
    """Ask the system to drop the pages of these files, and of no others."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def gemm_rate(size: int = 1024) -> float:
    """Multiply-adds of float32 matrices, in FLOP per CPU second of one thread, best of five."""
    x, threads = torch.randn(size, size), torch.get_num_threads()
    torch.set_num_threads(1)
    least = _least(lambda: product(x, x), 5)
    torch.set_num_threads(threads)
    return 2 * size**3 / least


def flops(sizes: Sizes, columns: int) -> int:
    """Of ``v (v^T x)`` for so many columns, over every linear."""
    return 4 * columns * weights(sizes)


def weights(sizes: Sizes) -> int:
    """Numbers in the linears of one model."""
    return sum(out * width for out, width in sizes.shapes().values())


def pieces(sizes: Sizes) -> dict[str, Any]:
    """CPU seconds of each piece of a first repair, alone, on tiles that lie in the cache, one thread, over all weights.

    What is left of a repair beyond their sum and the read is moving weights from memory, and calls.
    """
    rows = max(1, TILE_NUMBERS // sizes.hidden)
    tile, other = torch.randn(rows, sizes.hidden), torch.empty(rows, sizes.hidden)
    stored = tile.bfloat16()
    flat, total = tile.view(-1), torch.zeros(RANK, sizes.hidden)
    found: dict[str, Any] = {}
    work: dict[str, tuple[int, Callable[[], object]]] = {
        "widen": (4, lambda: other.copy_(stored)),  # two models, two passes
        "subtract": (2, lambda: other.sub_(tile)),
        "norm": (1, lambda: torch.dot(flat, flat)),
    }
    x, y = torch.randn(RANK, rows), torch.randn(RANK, sizes.hidden).T
    groups = 1 + PROBE_COLUMNS // RANK  # the adapter's columns and the probe's
    work["first_product"] = (groups, lambda: total.add_(product(x, tile)))
    work["second_product"] = (groups, lambda: product(tile, y))
    for name, (times, one) in work.items():
        found[name] = times * _least(one, 50) * weights(sizes) / tile.numel()
    return found


def _least(work: Callable[[], object], runs: int) -> float:
    """The least CPU seconds of some runs."""
    found = float("inf")
    for _ in range(runs):
        start = time.thread_time()
        work()
        found = min(found, time.thread_time() - start)
    return found
