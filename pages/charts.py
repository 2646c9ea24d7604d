"""Where everything stands in the page's three drawings; the template puts these numbers into SVG.

Pixels, from the top left. Every drawing has a table with the same numbers beside it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from math import hypot
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pages.document import Candidate, Module

MOST_STRIPS: Final = 16
TOUCHING: Final = 16.0
"""Points nearer than so many pixels cannot have labels of their own."""


@dataclass(frozen=True, kw_only=True)
class Whisker:
    """A rate with its interval on a line of its own."""

    label: str
    kind: str  # which arm, for the colour
    y: float
    x: float
    left: float
    right: float
    text: str


@dataclass(frozen=True, kw_only=True)
class Scale:
    """Rates with intervals on one axis from 0 to 100 %."""

    height: float
    whiskers: tuple[Whisker, ...]
    limit: float | None  # x of the policy's bound
    ticks: tuple[tuple[float, str], ...]


def scale(rows: Sequence[tuple[str, str, float, float, float, str]], limit: float | None) -> Scale:
    """Rows of label, kind, rate, low, high and text."""
    left, width, step = 8.0, 400.0, 44.0

    def x(share: float) -> float:
        return round(left + width * share, 1)

    found = [
        Whisker(label=label, kind=kind, y=30 + step * place, x=x(rate), left=x(low), right=x(high), text=text)
        for place, (label, kind, rate, low, high, text) in enumerate(rows)
    ]
    return Scale(
        height=step * len(rows) + 34,
        whiskers=tuple(found),
        limit=None if limit is None else x(limit),
        ticks=tuple((x(tick / 4), f"{25 * tick} %") for tick in range(5)),
    )


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One module: the norm of its update before and after."""

    x: float
    width: float
    before: float
    after: float
    decision: str
    title: str


@dataclass(frozen=True, kw_only=True)
class Strip:
    """The modules of one kind, layer after layer."""

    label: str
    y: float
    bars: tuple[Bar, ...]
    first: str
    last: str


@dataclass(frozen=True, kw_only=True)
class Strips:
    """All kinds of modules, one below the other, on one scale."""

    height: float
    floor: float  # height of one strip's bars
    strips: tuple[Strip, ...]
    left_out: int


def strips(modules: Sequence[Module]) -> Strips | None:
    """What became of each module; None where there are none."""
    groups: dict[str, list[tuple[int, Module]]] = defaultdict(list)
    for module in modules:
        kind, layer = _kind_and_layer(module.name)
        groups[kind].append((layer, module))
    if not groups:
        return None
    largest = max((max(one.energy_before, one.energy_after) for one in modules), default=0.0) ** 0.5 or 1.0
    left, width, tall, gap = 150.0, 560.0, 44.0, 26.0
    kinds = sorted(groups)[:MOST_STRIPS]
    found = []
    for place, kind in enumerate(kinds):
        members = sorted(groups[kind], key=lambda one: (one[0], one[1].name))
        each = min(width / len(members), 40.0)
        bars = tuple(
            Bar(
                x=round(left + each * column, 2),
                width=round(max(each * 0.8, 0.5), 2),
                before=round(tall * module.energy_before**0.5 / largest, 2),
                after=round(tall * module.energy_after**0.5 / largest, 2),
                decision=module.decision,
                title=module.name,
            )
            for column, (_, module) in enumerate(members)
        )
        ends = [str(layer) if layer >= 0 else "" for layer in (members[0][0], members[-1][0])]
        found.append(Strip(label=kind, y=8 + (tall + gap) * place, bars=bars, first=ends[0], last=ends[1]))
    return Strips(
        height=(tall + gap) * len(kinds) + 12, floor=tall, strips=tuple(found), left_out=len(groups) - len(kinds)
    )


def _kind_and_layer(name: str) -> tuple[str, int]:
    """`model.layers.7.mlp.up_proj` is up_proj of layer 7; a module outside the layers is a kind of its own."""
    found = re.search(r"\.(\d{1,6})\.(.+)$", name)
    if found is None:
        return name.rpartition(".")[2][:40], -1
    return re.sub(r"\.\d+\.", ".*.", found[2]).rpartition(".")[2][:40], int(found[1])


@dataclass(frozen=True, kw_only=True)
class Point:
    """One candidate: how much of the task it keeps against how often it obeys."""

    x: float
    y: float
    label: str
    kind: str  # winner, best (no other one beats it) or other
    title: str


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """Candidates by utility (right is better) and attack success (down is better), on the select half."""

    height: float
    points: tuple[Point, ...]
    left_out: int
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    x_title: str


def scatter(candidates: Sequence[Candidate], *, winner: int | None, best: Sequence[int]) -> Scatter | None:
    """Those that were measured on both; None where none was."""
    known = [(place, *found) for place, one in enumerate(candidates) if (found := _measured(one)) is not None]
    if not known:
        return None
    drifts = any(drift for *_, drift in known)
    left, right, top, bottom = 70.0, 690.0, 16.0, 276.0
    reach = max(1.0, *(utility for _, utility, _, _ in known)) if not drifts else max(u for _, u, _, _ in known) or 1.0

    def across(utility: float) -> float:
        share = max(utility, 0.0) / reach
        return round(right - (right - left) * share if drifts else left + (right - left) * share, 1)

    def up(rate: float) -> float:
        return round(bottom - (bottom - top) * rate, 1)

    points = tuple(
        Point(
            x=across(utility),
            y=up(attack),
            label=str(place + 1),
            kind="winner" if place == winner else "best" if place in best else "other",
            title=f"{place + 1}: {candidates[place].method}",
        )
        for place, utility, attack, _ in known
    )
    marks = tuple((across(reach * tick / 4), _mark(reach * tick / 4, drifts=drifts)) for tick in range(5))
    return Scatter(
        height=326,
        points=_named_once(points),
        left_out=len(candidates) - len(known),
        x_ticks=marks,
        y_ticks=tuple((up(tick / 4), f"{25 * tick} %") for tick in range(5)),
        x_title="drift from the upload (right is better)" if drifts else "utility kept (right is better)",
    )


def _named_once(points: Sequence[Point]) -> tuple[Point, ...]:
    """Points that lie on one another share the label of the first, so that it stays readable."""
    found: list[Point] = []
    for point in points:
        near = next(
            (n for n, one in enumerate(found) if one.label and hypot(one.x - point.x, one.y - point.y) < TOUCHING), None
        )
        if near is not None:
            found[near] = replace(found[near], label=f"{found[near].label}, {point.label}")
        found.append(point if near is None else replace(point, label=""))
    return tuple(found)


def _mark(value: float, *, drifts: bool) -> str:
    return f"{value:.2g}" if drifts else f"{100 * value:.0f} %"


def _measured(one: Candidate) -> tuple[float, float, bool] | None:
    """Utility, attack success, and whether the utility is a drift."""
    if one.select is None:
        return None
    utility, harmful = one.select.check("utility"), one.select.check("harmful")
    if utility is None or harmful is None or utility.rate is None or harmful.rate is None:
        return None
    return utility.rate, harmful.rate, utility.details.measure == "drift"
