"""What every benchmark says about where its numbers come from, and the memory of this process."""

import ctypes
import os
import platform
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

QUIET_LOAD = 0.3
"""Runnable threads of others, on average over the last minute, below which a machine counts as quiet."""


def machine() -> dict[str, Any]:
    """What the numbers depend on. Ask before the work: the load is then that of others."""
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    load = os.getloadavg()[0]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "pinned_to": sorted(os.sched_getaffinity(0)),
        "load_before": load,
        "quiet": load < QUIET_LOAD,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def memory(field: str) -> int:
    """A line of this process's status, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


@dataclass(kw_only=True)
class Spent:
    """What some work took: elapsed seconds, CPU seconds of the whole process, and the peak of memory above its start.

    ``peak_bytes`` is memory of the process's own, sampled; ``peak_rss_bytes`` is what the system counted, with the
    pages of mapped files, which it takes back when it needs them.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    peak_rss_bytes: int = 0


@contextmanager
def spent(interval: float = 0.01) -> Iterator[Spent]:
    """Fills a `Spent` with what happens inside; a peak of own memory shorter than ``interval`` can be missed.

    The watching thread is part of the CPU time: less than one in a hundred.
    """
    ctypes.CDLL(None).malloc_trim(0)  # what earlier work has left behind must not serve as this one's memory
    found, done = Spent(), threading.Event()
    start_own, start_all = memory("RssAnon"), memory("VmRSS")

    def watch() -> None:
        while not done.wait(interval):
            found.peak_bytes = max(found.peak_bytes, memory("RssAnon") - start_own)

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    start, start_cpu = time.perf_counter(), time.process_time()
    try:
        yield found
    finally:
        found.seconds, found.cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
        found.peak_rss_bytes = memory("VmHWM") - start_all
        done.set()
        watcher.join()


def middle(runs: list[Spent]) -> dict[str, Any]:
    """Medians of the times, the largest of the peaks, and every single run."""
    return {
        "seconds": statistics.median(one.seconds for one in runs),
        "cpu_seconds": statistics.median(one.cpu_seconds for one in runs),
        "least_seconds": min(one.seconds for one in runs),
        "peak_bytes": max(one.peak_bytes for one in runs),
        "peak_rss_bytes": max(one.peak_rss_bytes for one in runs),
        "runs": [asdict(one) for one in runs],
    }
