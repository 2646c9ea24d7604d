"""The seven linears of one 7B-shaped block, scored one after the other: ours against the faithful naive implementation.

    python -m bench.block               prints ratios, writes bench/results/block.json; naive needs 2 GB and a minute
    python -m bench.block --shrink 16   the same in seconds

As `bench.safe_lora`, for which see there: weights lie in memory, both sides get fresh processes, one thread each, in
turns. Ours asks the probe each time, as it does for a weight that it has never seen. Times are medians of the turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.floors import gemm_rate
from bench.machine import machine, spent
from bench.pair import RANK, SEVEN_BILLION, Sizes, made_weights
from bench.safe_lora import naive, ours
from repair.alignment import PROBE_COLUMNS
from repair.grams import row_gram
from repair.linalg import compare
from repair.lora import LoraLayer

RESULTS = Path(__file__).parent / "results"
SIDES = ("ours", "naive")
TURNS = 3
TOLERANCE = 1e-4


def child(side: str, sizes: Sizes) -> dict[str, Any]:
    """Measure one side in this process: every linear once, its own weights made before the clock starts."""
    found: dict[str, Any] = {}
    for at, (name, (out_features, in_features)) in enumerate([("warm", (64, 64)), *sizes.linears().items()]):
        aligned, base = made_weights((out_features, in_features), seed=at)
        source = torch.Generator().manual_seed(at)
        a, b = torch.randn(RANK, in_features, generator=source), torch.randn(out_features, RANK, generator=source)
        layer = LoraLayer(name=name, a=a * 0.01, b=b * 0.01, scale=2.0)
        with spent() as took:
            cosine, projected = naive(aligned, base, layer) if side == "naive" else ours(aligned, base, layer, {})
        exact = compare(projected, layer.b, row_gram(layer.a)).cosine
        about = {"cosine": cosine, "cosine_summed_in_float64": exact, "shape": [out_features, in_features]}
        found[name] = asdict(took) | about
    del found["warm"]
    return found


def measured(side: str, shrink: int) -> dict[str, Any]:
    """Measure one side in a fresh process."""
    command = [sys.executable, "-m", "bench.block", "--side", side, "--shrink", str(shrink)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def in_turns(shrink: int) -> dict[str, dict[str, Any]]:
    """Both sides, one after the other, several times; of each linear the median times and the largest peaks."""
    turns = [{side: measured(side, shrink) for side in SIDES} for _ in range(TURNS if shrink == 1 else 1)]
    return {side: {name: _median([turn[side][name] for turn in turns]) for name in turns[0][side]} for side in SIDES}


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    times = {field: statistics.median(run[field] for run in runs) for field in ("seconds", "cpu_seconds")}
    peaks = {field: max(run[field] for run in runs) for field in ("peak_bytes", "peak_rss_bytes")}
    return runs[0] | times | peaks | {"all_cpu_seconds": [run["cpu_seconds"] for run in runs]}


def total(side: dict[str, Any], field: str) -> float:
    """Over the seven linears."""
    return float(sum(one[field] for one in side.values()))


def main() -> int:
    """Run both sides, hold their cosines together, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--shrink", type=int, default=1, help="divide every width by this")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result; default %(default)s")
    wish = parser.parse_args()
    sizes = SEVEN_BILLION.shrunk(wish.shrink)
    if wish.side:
        torch.set_num_threads(1)
        print(json.dumps(child(wish.side, sizes)))
        return 0
    place = machine()
    sides = in_turns(wish.shrink)
    for name, one in sides["ours"].items():
        # Of the columns that naive made: its own cosine sums up to 45 million squares in float32, which loses digits.
        other = sides["naive"][name]["cosine_summed_in_float64"]
        assert abs(one["cosine"] / other - 1) < TOLERANCE, f"both sides must agree on {name}"
    peak = {side: max(one["peak_rss_bytes"] for one in found.values()) for side, found in sides.items()}
    result = sides | {
        "time_ratio": total(sides["naive"], "seconds") / total(sides["ours"], "seconds"),
        "turns": TURNS,
        "cpu_ratio": total(sides["naive"], "cpu_seconds") / total(sides["ours"], "cpu_seconds"),
        "memory_ratio": peak["naive"] / max(1, peak["ours"]),
        "sizes": asdict(sizes),
        "rank": RANK,
        "bytes": sum(2 * 2 * out * width for out, width in sizes.linears().values()),
        "gemm_flop_per_cpu_second": (rate := gemm_rate()),
        "gemm_floor_cpu_seconds": sum(
            4 * (RANK + PROBE_COLUMNS) * out * width / rate for out, width in sizes.linears().values()
        ),
        "dtype": "bfloat16",
        "threads": 1,
        "machine": place,
    }
    wish.out.mkdir(parents=True, exist_ok=True)
    (wish.out / f"block{'' if wish.shrink == 1 else '_smoke'}.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
