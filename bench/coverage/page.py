"""The table of ``docs/statistics.md`` from ``bench/results/statistics.json``; reads numbers only, simulates nothing.

python -m bench.coverage.page [--check]
"""

import argparse
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
RESULTS: Final = ROOT / "bench" / "results" / "statistics.json"
PAGE: Final = ROOT / "docs" / "statistics.md"
BEGIN: Final = "<!-- statistics: generated -->"
END: Final = "<!-- /statistics -->"
HEAD: Final = "| rule | setting | an error is | promised | simulated | prompts |\n|---|---|---|---|---|---|"


def main() -> int:
    """Write the page, or say whether it is what the numbers give."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail when the page is not up to date")
    wish = parser.parse_args()
    page = PAGE.read_text()
    wanted = filled(page, json.loads(RESULTS.read_text())["measured"])
    if wish.check:
        return int(page != wanted)
    PAGE.write_text(wanted)
    return 0


def filled(page: str, measured: Iterable[Mapping[str, Any]]) -> str:
    """The page with everything between the marks made anew. Raises ValueError where it has no marks."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"the page has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{HEAD}\n" + "\n".join(map(_line, measured)) + f"\n{END}{after}"


def _line(one: Mapping[str, Any]) -> str:
    promised = f"{one['promised']:.1%}" if one["gates"] else f"about {one['promised']:.1%}"
    seen = f"{one['share']:.2%} ± {one['monte_carlo_error']:.2%}"
    asked = "" if one["prompts"] is None else f"{one['prompts']:.0f}"
    return f"| {one['rule']} | {one['setting']} | {one['error']} | {promised} | {seen} | {asked} |"


if __name__ == "__main__":
    raise SystemExit(main())
