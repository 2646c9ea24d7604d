"""How the cost of choosing a repair grows: with the bytes of the weights and the rank, not with the candidates.

    python -m bench.curve               a 1B-shaped pair of 8 blocks, 2 GB of disk; writes a plot into docs/
    python -m bench.curve --shrink 16   the same in seconds, without the plot

CPU seconds on one thread, the least of several runs; files are in the page cache. A candidate is a repair method with
parameters, applied to one adapter in one process: Safe LoRA with other thresholds, counts and norms, and SPLoRA.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from bench.floors import opened, read_once
from bench.machine import machine
from bench.pair import ONE_BILLION, Sizes, made_adapter, write_pair
from bench.plot import Line, Panel, svg
from repair.lora import LoraAdapter
from repair.method import RepairMethod
from repair.methods import METHODS
from repair.run import repair_adapter

RESULTS = Path(__file__).parent / "results"
PLOT = Path(__file__).parents[1] / "docs" / "performance.svg"
BLOCKS, RANKS, CANDIDATES = (1, 2, 4, 8), (4, 16, 64), (1, 10, 20, 40)
RUNS = 3


def candidates(count: int) -> list[RepairMethod]:
    """Different ones, all of which ask for the published operator."""
    found: list[RepairMethod] = []
    for at in range(count):
        share = (at + 1) / (count + 1)
        wishes: list[tuple[str, dict[str, Any]]] = [
            ("safe_lora", {"threshold": share}),
            ("safe_lora", {"ratio": 2 * share}),
            ("safe_lora", {"threshold": 1.0, "norm_share": share}),
            ("splora", {"share": share}),
        ]
        name, wish = wishes[at % len(wishes)]
        found.append(METHODS[name].parse(wish))
    return found


def choosing(folder: Path, adapter: LoraAdapter, count: int) -> float:
    """CPU seconds of repairing an adapter by so many candidates, on models that were just opened."""
    methods = candidates(count)

    def work() -> None:
        context = opened(folder)
        for method in methods:
            repair_adapter(adapter, method, context)

    return least(work)


def least(work: Callable[[], object]) -> float:
    """The least CPU seconds of some runs."""
    found = float("inf")
    for _ in range(RUNS):
        start = time.process_time()
        work()
        found = min(found, time.process_time() - start)
    return found


def measured(folder: Path, sizes: Sizes) -> list[dict[str, Any]]:
    """Every point: so many blocks, rank, candidates; gigabytes of both models, CPU seconds; and of reading alone."""
    found: list[dict[str, Any]] = []
    for blocks in [blocks for blocks in BLOCKS if blocks <= sizes.blocks]:
        part = replace(sizes, blocks=blocks)
        read = made_adapter(part)
        size = read_once(folder, read.layers)
        about = {"blocks": blocks, "modules": len(read.layers), "bytes": size}
        found.append(about | {"rank": 0, "candidates": 0, "cpu_seconds": least(lambda: read_once(folder, read.layers))})  # noqa: B023 - called at once
        wanted = [(rank, 1) for rank in RANKS] + [(16, count) for count in CANDIDATES[1:] if blocks in BLOCKS[:3]]
        for rank, count in wanted:
            seconds = choosing(folder, made_adapter(part, rank=rank), count)
            found.append(about | {"rank": rank, "candidates": count, "cpu_seconds": seconds})
    return found


def panels(points: list[dict[str, Any]]) -> list[Panel]:
    """Cost against bytes for each rank, against the rank for each size, against candidates for each size."""

    def line(label: str, across: str, scale: float = 1.0, **fixed: int) -> Line:
        chosen = [one for one in points if all(one[key] == value for key, value in fixed.items()) and one[across]]
        return Line(label=label, points=[(one[across] * scale, one["cpu_seconds"]) for one in chosen])

    bytes_lines = [line(f"rank {rank}", "bytes", 1e-9, rank=rank, candidates=1) for rank in RANKS]
    sizes = sorted({(one["blocks"], one["modules"]) for one in points})
    many = [line(f"{modules} modules", "candidates", blocks=blocks, rank=16) for blocks, modules in sizes[:3]]
    first = many[-1].points[0][1]
    again = Line(
        label=f"{sizes[:3][-1][1]} modules, each reading again", points=[(1, first), (5, 5 * first)], dashed=True
    )
    up = "CPU seconds"
    return [
        Panel(
            title="one candidate",
            across="GB of weights, both models",
            up=up,
            lines=[*bytes_lines, line("reading alone", "bytes", 1e-9, rank=0)],
        ),
        Panel(
            title="one candidate",
            across="rank of the adapter",
            up=up,
            lines=[line(f"{modules} modules", "rank", blocks=blocks, candidates=1) for blocks, modules in sizes],
        ),
        Panel(title="rank 16", across="candidates for one adapter", up=up, lines=[*many, again]),
    ]


def main() -> int:
    """Write the pair, measure, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shrink", type=int, default=1, help="divide every width by this")
    parser.add_argument("--folder", type=Path, help="where the pair is written; default the system's temporary folder")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result; default %(default)s")
    wish = parser.parse_args()
    torch.set_num_threads(1)
    place = machine()
    blocks = max(BLOCKS) if wish.shrink == 1 else min(BLOCKS)
    sizes = replace(ONE_BILLION.shrunk(wish.shrink), blocks=blocks)
    with tempfile.TemporaryDirectory(dir=wish.folder) as folder:
        write_pair(Path(folder), sizes)
        points = measured(Path(folder), sizes)
    result = {"points": points, "runs": RUNS, "sizes": asdict(sizes), "threads": 1, "machine": place}
    wish.out.mkdir(parents=True, exist_ok=True)
    (wish.out / f"curve{'' if wish.shrink == 1 else '_smoke'}.json").write_text(json.dumps(result, indent=1) + "\n")
    plot = PLOT if wish.shrink == 1 else wish.out / "curve_smoke.svg"
    plot.write_text(svg(panels(points)))
    for one in points:
        counted = "{modules:4d} modules, rank {rank:2d}, candidates {candidates:2d}".format(**one)
        print(f"{counted}, {one['bytes']} bytes: {one['cpu_seconds']:.3f} CPU s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
