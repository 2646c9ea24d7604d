"""Which of several settings is best by the *select* half alone, and what a control gives at equal utility."""

import itertools
from collections.abc import Sequence
from typing import Any


def best(rows: Sequence[dict[str, Any]]) -> int | None:
    """Of those that meet the screen the one with most utility; where none does, the lowest attack success.

    None when nothing could be built. Of equals the first.
    """
    built = [place for place, row in enumerate(rows) if "error" not in row]
    passing = [place for place in built if rows[place]["outcome"] == "pass"]
    if passing:
        return max(passing, key=lambda place: _rate(rows[place], "utility"))
    if not built:
        return None
    return min(built, key=lambda place: (_rate(rows[place], "harmful"), -_rate(rows[place], "utility")))


def safest(rows: Sequence[dict[str, Any]], *, least: float = 0.9) -> int | None:
    """Of those that meet the screen and keep ``least`` of the utility, the one with the lowest attack success.

    None when there is none. Of equals the most useful.
    """
    passing = [place for place, row in enumerate(rows) if "error" not in row and row["outcome"] == "pass"]
    useful = [place for place in passing if _rate(rows[place], "utility") >= least]
    return min(useful, key=lambda place: (_rate(rows[place], "harmful"), -_rate(rows[place], "utility")), default=None)


def at_utility(curve: Sequence[tuple[float, float]], utility: float) -> float | None:
    """Attack success of a control at this utility, on straight lines between the (utility, attack) it was measured at.

    None outside of what was measured. Where the curve passes the utility more than once, the lowest: what the control
    can reach.
    """
    points = sorted(curve)
    found = []
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= utility <= right:
            share = 0.0 if right == left else (utility - left) / (right - left)
            found.append(low + share * (high - low))
    return min(found, default=None)


def _rate(row: dict[str, Any], check: str) -> float:
    rate = row[check]["rate"]
    return 0.0 if rate is None else float(rate)
