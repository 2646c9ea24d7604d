"""Plots of ``docs/efficacy.md`` from ``bench/results/efficacy.json``: needs matplotlib, measures nothing.

python -m bench.efficacy.plots [--results FILE] [--out docs/efficacy]
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

from bench.efficacy.menu import FULL

ROOT: Final = Path(__file__).parents[2]
GOAL: Final = (0.05, 0.9)
"""Attack success above the aligned model's, at most; utility kept, at least."""


def main() -> int:
    """Draw all three."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=ROOT / "bench" / "results" / "efficacy.json")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "efficacy")
    wish = parser.parse_args()
    results = json.loads(wish.results.read_text())
    wish.out.mkdir(parents=True, exist_ok=True)
    # Equal numbers give equal bytes: no date, no random ids.
    plt.rcParams.update({"svg.hashsalt": "lora-repair", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3})
    for name, draw in (("tradeoff", tradeoff), ("profile", profile), ("rho", rho)):
        figure = draw(results)
        figure.savefig(wish.out / f"{name}.svg", metadata={"Date": None}, bbox_inches="tight")
        plt.close(figure)
    return 0


def tradeoff(results: dict[str, Any]) -> Any:
    """Attack success against utility of every candidate; filled and named ones were certified."""
    figure, axes = _panels(height=4.5)
    base = _aligned(results)["harmful"]["rate"]
    for axis, name in zip(axes, FULL, strict=True):
        rows = [row for row in results["rows"] if row["adapter"] == name and "harmful" in row]
        certified = [row for row in rows if row["half"] == "certify"]
        axis.scatter(*_points([row for row in rows if row["half"] == "select"]), s=9, c="0.75", label="on select")
        for control, colour in (("scale", "tab:orange"), ("random_modules", "tab:green")):
            own = sorted(_point(row) for row in certified if row["group"] == control)
            own = [(0.0, base), *own, (1.0, _input(certified))]
            axis.plot(*zip(*own, strict=True), ".-", c=colour, lw=1, label=control)
        others = [row for row in certified if row["group"] not in {"scale", "random_modules", "(as uploaded)"}]
        axis.scatter(*_points(others), s=22, c="tab:blue", label="best setting, on certify")
        for row in others:
            axis.annotate(row["group"], _point(row), xytext=(3, 3), textcoords="offset points", fontsize=6)
        axis.axhline(base, c="k", lw=0.8, ls=":", label="aligned model")
        axis.add_patch(plt.Rectangle((GOAL[1], -0.02), 0.2, base + GOAL[0] + 0.02, color="tab:green", alpha=0.12))
        axis.set(title=name, xlim=(-0.05, 1.05), ylim=(-0.02, 1.02))
    axes[0].legend(fontsize=7, loc="upper left")
    figure.supxlabel("share of the task gain kept")
    figure.supylabel("attack success")
    figure.tight_layout()
    return figure


def profile(results: dict[str, Any]) -> Any:
    """Attack success, over-refusal and utility over the strength that the whole update is multiplied by."""
    figure, axes = _panels(height=3.2)
    aligned = _aligned(results)
    for axis, name in zip(axes, FULL, strict=True):
        rows = [row for row in results["rows"] if row["adapter"] == name and row["half"] == "certify"]
        upload = next((row for row in rows if row["group"] == "(as uploaded)"), None)
        if upload is None:
            continue
        curve = {0.0: aligned, 1.0: upload}
        curve |= {row["recipe"][0][1]["strength"]: row for row in rows if row["group"] == "scale"}
        ends = {("utility", 0.0): 0.0, ("utility", 1.0): 1.0}
        for check, label in (
            ("harmful", "attack success"),
            ("over_refusal", "over-refusal"),
            ("utility", "utility kept"),
        ):
            values = [ends.get((check, at), curve[at][check]["rate"]) for at in sorted(curve)]
            axis.plot(sorted(curve), values, ".-", label=label)
        axis.fill_between(
            sorted(curve),
            [curve[at]["harmful"]["low"] for at in sorted(curve)],
            [curve[at]["harmful"]["high"] for at in sorted(curve)],
            alpha=0.15,
        )
        axis.set(title=name, xlabel="strength")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    return figure


def rho(results: dict[str, Any]) -> Any:
    """Agreement of each module's update with what alignment changed, over the depth; the null as a line."""
    figure, axes = _panels(height=3.2)
    for axis, name in zip(axes, FULL, strict=True):
        kinds: dict[str, list[tuple[int, float, float | None]]] = {}
        for one in results["alignment"].get(name, ()):
            found = re.search(r"\.(\d+)\.", one["module"])
            if one["rho"] is not None and found is not None:
                kinds.setdefault(one["module"].rpartition(".")[2], []).append((int(found[1]), one["rho"], one["null"]))
        for kind, points in sorted(kinds.items()):
            points.sort()
            drawn = axis.plot([p[0] for p in points], [p[1] for p in points], ".-", lw=1, label=kind)
            if all(p[2] is not None for p in points):
                axis.plot([p[0] for p in points], [p[2] for p in points], ":", lw=0.8, c=drawn[0].get_color())
        axis.set(title=name, xlabel="block")
    axes[0].set_ylabel("rho (dotted: of a random update)")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    return figure


def _panels(*, height: float) -> tuple[Any, list[Any]]:
    """One for each adapter, four in a row, with the same axes."""
    rows = -(-len(FULL) // 4)
    figure, axes = plt.subplots(rows, 4, figsize=(16, height * rows), sharex=True, sharey=True, squeeze=False)
    for spare in axes.flat[len(FULL) :]:
        spare.set_axis_off()
    return figure, list(axes.flat[: len(FULL)])


def _aligned(results: dict[str, Any]) -> dict[str, Any]:
    return next(row for row in results["rows"] if row["group"] == "(aligned model)")


def _input(rows: list[dict[str, Any]]) -> float:
    return next((float(row["harmful"]["rate"]) for row in rows if row["group"] == "(as uploaded)"), float("nan"))


def _point(row: dict[str, Any]) -> tuple[float, float]:
    utility = row["utility"]["rate"]
    return (float("nan") if utility is None else float(utility), float(row["harmful"]["rate"]))


def _points(rows: list[dict[str, Any]]) -> tuple[list[float], list[float]]:
    points = [_point(row) for row in rows]
    return [p[0] for p in points], [p[1] for p in points]


if __name__ == "__main__":
    raise SystemExit(main())
