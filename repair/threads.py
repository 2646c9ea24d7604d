"""One piece of work for each item, on as many threads as torch would use for one operation.

Not torch's own threads: those meet again after every operation on every tile, and all of them wait when one of their
cores is busy with something else. Here a thread takes the next item when it has done the last, and an item's numbers do
not depend on how many threads there are.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_threads(work: Callable[[Item], Result], items: Sequence[Item], device: torch.device) -> Iterator[Result]:
    """What ``work`` makes of each item, in their order; the first failure is raised and ends the rest."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or not items:
        yield from map(work, items)
        return
    # Also for a single item: torch's own threads would sum in another order than one does.
    pool = ThreadPoolExecutor(min(threads, len(items)), initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)  # threads that others start later get as many as before
