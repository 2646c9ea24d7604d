"""How often every interval, test, stopping rule and gate errs, simulated: `make bench-stats`.

    python -m bench.coverage                 ten thousand runs of each setting, some minutes on one core
    python -m bench.coverage --runs 500      the same in less time, without touching the page

Writes bench/results/statistics.json and the table of docs/statistics.md; fails where a rule that gates a release errs
more often than it promises. Seeded: the same numbers on every machine.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from bench.coverage import looking, pairs, rates, whole
from bench.coverage.measured import Measured
from bench.coverage.page import PAGE, filled

RESULTS: Final = Path(__file__).parents[1] / "results" / "statistics.json"
RUNS: Final = 10_000
SEED: Final = 1
PARTS: Final[tuple[Callable[[int, int], Iterator[Measured]], ...]] = (
    rates.exact_bounds,
    rates.score_intervals,
    rates.through_a_judge,
    rates.by_category,
    pairs.mcnemar,
    pairs.excess,
    pairs.means,
    pairs.clusters,
    looking.curtailed,
    looking.ratio_test,
    looking.anytime,
    whole.all_gates,
)


def main() -> int:
    """Simulate, write, and say what does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=RUNS, help="of each setting; default %(default)s")
    parser.add_argument("--seed", type=int, default=SEED, help="default %(default)s")
    parser.add_argument(
        "--out", type=Path, help="where the numbers go; default the committed file, if all runs are made"
    )
    wish = parser.parse_args()
    found: list[Measured] = []
    for part in PARTS:
        start = time.monotonic()
        lines = list(part(wish.runs, wish.seed))
        found += lines
        print(f"{part.__module__}.{part.__name__}: {len(lines)} settings, {time.monotonic() - start:.0f} s", flush=True)
    whole_run = (wish.runs, wish.seed) == (RUNS, SEED)
    if (out := wish.out or (RESULTS if whole_run else None)) is not None:
        document = {"runs": wish.runs, "seed": wish.seed, "measured": [one.as_dict() for one in found]}
        out.write_text(json.dumps(document, indent=1) + "\n")
    if whole_run:
        PAGE.write_text(filled(PAGE.read_text(), [one.as_dict() for one in found]))
    broken = [one for one in found if not one.holds]
    for one in broken:
        print(f"does not hold: {one.rule}, {one.setting}: {one.error} in {one.share:.2%}, promised {one.promised:.0%}")
    return int(bool(broken))


if __name__ == "__main__":
    raise SystemExit(main())
