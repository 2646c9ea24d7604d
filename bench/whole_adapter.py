"""A whole adapter on a random pair shaped like a 1B model: the reading floor, the basis pack, many adapters at once.

    python -m bench.whole_adapter                  all linears of 16 blocks; needs 4 GB of disk and some minutes
    python -m bench.whole_adapter --shrink 8       the same in seconds, for a look at whether it runs
    python -m bench.whole_adapter --part adapter   one part alone: adapter, basis or many

Each part runs in a fresh process, on one thread or on --threads, and writes bench/results/. Files are in the page cache
when the clock starts, unless the name says cold. Numbers are medians of runs that take turns. Elapsed seconds and CPU
seconds of the whole process are both shown: on a busy machine only the second mean much.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.floors import flops, forget, gemm_rate, opened, pieces, read_once
from bench.machine import Spent, machine, middle, spent
from bench.pair import ONE_BILLION, RANK, Sizes, made_adapter, write_pair
from repair.alignment import PROBE_COLUMNS
from repair.basis import BasisIdentity, BasisPack, BasisSettings
from repair.basis_writer import write_basis
from repair.context import RepairContext
from repair.lora import LoraAdapter
from repair.measure_basis import measured_linears
from repair.methods.safe_lora import Mode, SafeLora
from repair.run import repair_adapter
from repair.score import ModuleScore, score_adapters

RESULTS = Path(__file__).parent / "results"
ADAPTERS = 32
ROUNDS, COLD_ROUNDS, MANY_ROUNDS = 5, 3, 3
BASIS_RANK = 64


def adapter_part(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """(a) One Safe LoRA repair against reading what it needs once, in turns."""
    one, two, method = made_adapter(sizes), made_adapter(sizes, seed=1), SafeLora(threshold=1.0)
    runs: dict[str, list[Spent]] = {
        key: [] for key in ("read", "first_repair", "second_repair", "cold_read", "cold_read_ahead", "cold_repair")
    }
    size = read_once(folder, one.layers)
    for _ in range(ROUNDS):
        runs["read"].append(_reading(folder, one))
        context = opened(folder)
        for name, adapter in (("first_repair", one), ("second_repair", two)):
            with spent() as took:
                repair_adapter(adapter, method, context)
            runs[name].append(took)
        del context  # files that are still mapped are not forgotten
    for _ in range(COLD_ROUNDS):
        forget(folder)
        runs["cold_read"].append(_reading(folder, one))
        forget(folder)
        runs["cold_read_ahead"].append(_reading(folder, one, ahead=True))
        forget(folder)
        with spent() as took:
            repair_adapter(one, method, opened(folder))
        runs["cold_repair"].append(took)
    found = {name: middle(them) for name, them in runs.items()}
    ratios = {
        f"{name}_to_{floor}{short}": found[name][field] / found[floor][field]
        for name, floor in (
            ("first_repair", "read"),
            ("second_repair", "read"),
            ("cold_repair", "cold_read"),
            ("cold_repair", "cold_read_ahead"),
        )
        for short, field in (("", "seconds"), ("_cpu", "cpu_seconds"))
    }
    torch.set_num_threads(1)
    rate = gemm_rate()
    return (
        found
        | ratios
        | {
            "bytes_needed": size,
            "pieces_cpu_seconds": pieces(sizes),
            "gemm_flop_per_cpu_second": rate,
            "gemm_floor_cpu_seconds": {
                "first": flops(sizes, RANK + PROBE_COLUMNS) / rate,
                "second": flops(sizes, RANK) / rate,
            },
        }
    )


def _reading(folder: Path, adapter: LoraAdapter, *, ahead: bool = False) -> Spent:
    """One read of what the adapter needs, always on one thread: torch's own ones wait for each other at every tile."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with spent() as took:
        read_once(folder, adapter.layers, ahead=ahead)
    torch.set_num_threads(threads)
    return took


def basis_part(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """(b) A truncated repair from the checkpoints, the pack, and the same repair out of the pack."""
    adapter, method = made_adapter(sizes), SafeLora(mode=Mode.TRUNCATED, rank=BASIS_RANK, threshold=1.0)
    read_once(folder, adapter.layers)
    with spent() as direct:
        wanted = repair_adapter(adapter, method, opened(folder))
    settings = BasisSettings(rank=BASIS_RANK)
    identity = BasisIdentity(aligned="sha256:aligned", base="sha256:base", settings=settings)
    where = identity.folder(folder / "packs")
    with spent() as making:
        write_basis(identity, measured_linears(opened(folder), settings), where, left_out={}, about={})
    with spent() as first:
        found = repair_adapter(adapter, method, RepairContext(basis=BasisPack.open(where)))
    pack = BasisPack.open(where)
    errors = [entry["numbers"]["error"] for entry in pack.header["modules"].values()]
    same = all(
        torch.allclose(one.b, two.b, rtol=1e-3, atol=1e-6)
        for one, two in zip(found.adapter.layers, wanted.adapter.layers, strict=True)
    )
    assert same, "both ways must agree"
    return {
        "basis_rank": BASIS_RANK,
        "from_checkpoints": asdict(direct),
        "making_the_pack": asdict(making),
        "from_the_pack": asdict(first),
        "time_ratio": direct.seconds / first.seconds,
        "cpu_ratio": direct.cpu_seconds / first.cpu_seconds,
        "pack_bytes": sum(path.stat().st_size for path in where.iterdir()),
        "operator_error": {"smallest": min(errors), "largest": max(errors)},
    }


def many_part(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """(c) Scores of one adapter against scores of 32 in one pass, in turns."""
    adapters = {str(seed): made_adapter(sizes, seed=seed) for seed in range(ADAPTERS)}
    read_once(folder, adapters["0"].layers)
    runs: dict[str, list[Spent]] = {"one": [], "many": []}
    apart = 0.0
    for _ in range(MANY_ROUNDS):
        with spent() as took:
            alone = list(score_adapters({"0": adapters["0"]}, opened(folder)))
        runs["one"].append(took)
        with spent() as took:
            together = list(score_adapters(adapters, opened(folder)))
        runs["many"].append(took)
        apart = max(apart, _apart(alone, [score for score in together if score.adapter == "0"]))
    assert apart < 1e-6, "one adapter's scores depend on the others by rounding only"
    found = {name: middle(them) for name, them in runs.items()}
    return found | {
        "adapters": ADAPTERS,
        "largest_relative_difference": apart,
        "many_to_one": found["many"]["seconds"] / found["one"]["seconds"],
        "many_to_one_cpu": found["many"]["cpu_seconds"] / found["one"]["cpu_seconds"],
        "gemm_floor_cpu_seconds": {
            "one": flops(sizes, RANK + PROBE_COLUMNS) / gemm_rate(),
            "many": flops(sizes, ADAPTERS * RANK + PROBE_COLUMNS) / gemm_rate(),
        },
    }


def _apart(ones: list[ModuleScore], others: list[ModuleScore]) -> float:
    pairs = zip(ones, others, strict=True)
    return max(abs((one.score or 0.0) / (other.score or 1.0) - 1) for one, other in pairs)


PARTS: dict[str, Callable[[Path, Sizes], dict[str, Any]]] = {
    "adapter": adapter_part,
    "basis": basis_part,
    "many": many_part,
}


def child(part: str, folder: Path, sizes: Sizes, threads: int) -> dict[str, Any]:
    """One part in this process; the libraries are loaded before the clock starts."""
    small = sizes.shrunk(max(1, sizes.hidden // 64))
    with tempfile.TemporaryDirectory() as warm:
        write_pair(Path(warm), small)
        PARTS[part](Path(warm), small)
    torch.set_num_threads(threads)  # floors, which come last, are those of one thread
    return PARTS[part](folder, sizes)


def measured(part: str, folder: Path, shrink: int, threads: int) -> dict[str, Any]:
    """One part in a fresh process."""
    words = ["--child", part, "--folder", str(folder), "--shrink", str(shrink), "--threads", str(threads)]
    command = [sys.executable, "-m", "bench.whole_adapter", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root, env=environment)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> int:
    """Write the pair to a folder of its own, run the parts on it, print and keep what they say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shrink", type=int, default=1, help="divide every width and the number of blocks by this")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; default all")
    parser.add_argument("--threads", type=int, default=1, help="threads of a repair; default %(default)s")
    parser.add_argument("--folder", type=Path, help="where the pair is written; default the system's temporary folder")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results; default %(default)s")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    wish = parser.parse_args()
    sizes = ONE_BILLION.shrunk(wish.shrink)
    if wish.child:
        torch.set_num_threads(wish.threads)
        print(json.dumps(child(wish.child, wish.folder, sizes, wish.threads)))
        return 0
    place = machine()
    wish.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=wish.folder) as folder:
        write_pair(Path(folder), sizes)
        for part in wish.part or PARTS:
            about = {
                "sizes": asdict(sizes),
                "rank": RANK,
                "dtype": "bfloat16",
                "threads": wish.threads,
                "machine": place,
            }
            result = measured(part, Path(folder), wish.shrink, wish.threads) | about
            more = "" if wish.threads == 1 else f"_{wish.threads}_threads"
            name = f"whole_adapter_{part}{more}{'' if wish.shrink == 1 else '_smoke'}.json"
            (wish.out / name).write_text(json.dumps(result, indent=2) + "\n")
            print(f"{part}: {json.dumps(result, indent=2)}")
    if not place["quiet"]:
        print(f"the machine was not quiet: load {place['load_before']:.2f} before the first part")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
