"""Does it work? Every method at its best setting on every adapter of the zoo, measured on the real 135M model.

    python -m bench.efficacy [--data DIR] [--adapters poisoned,obedient] [--minutes 60]

Settings are chosen on the *select* half of `suite.toml` alone: the one that keeps most utility among those that
meet the screen and, where it is another, the safest that keeps 90 %; where none meets it, the safest of all. What is
chosen is measured once, in full, on the *certify* half. Interrupted work goes on where it stopped. The numbers land in
``bench/results/efficacy.json`` after each adapter.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from bench.efficacy.auto import measure_auto, widened
from bench.efficacy.choose import best, safest
from bench.efficacy.lab import ZOO, Lab, Store, load_chat
from bench.efficacy.menu import ALIKE, FULL, UNSEEN, Group, Recipe, controls, groups
from bench.efficacy.results import RESULTS, collect
from cli.demo_model import ModelPair, prepare, run_repair
from repair.adapter_file import read_adapter
from repair.calibration import Calibration
from repair.checkpoint import Checkpoint
from repair.checks.packs import HOME
from repair.checks.policy import load_policy
from repair.checks.rules import RulesJudge
from repair.context import RepairContext
from repair.determinism import ask_determinism
from repair.report import adapter_digests, digests

SUITE = Path(__file__).with_name("suite.toml")
PATCH = ZOO / "adapters" / "patch"


def main() -> int:
    """Measure until all is there or the time is up; then write what there is."""
    wish = parsed()
    ask_determinism()
    pair = (
        prepare(wish.models or wish.data / "models", PATCH)
        if wish.aligned is None
        else ModelPair(base=wish.base, aligned=wish.aligned)
    )
    lab = opened(pair, wish.store or wish.data / "efficacy", dtype=getattr(torch, wish.dtype))
    lab.deadline = time.monotonic() + 60 * wish.minutes
    lab.measure_aligned()
    names = wish.adapters.split(",")
    HOME.path = wish.prompts
    packs = [one for one in wish.packs.split(",") if one]
    for name in names if wish.auto else ():
        tell(measure_auto(lab, name, widened(load_policy(wish.auto), packs)))
        collect(lab, wish.out)
    for name in names:
        treat(lab, name)
        collect(lab, wish.out)
    if time.monotonic() > lab.deadline:
        print("out of time: run again for what is missing", flush=True)
    return 0


def treat(lab: Lab, name: str) -> None:
    """One adapter: as uploaded, each group at its best, then both controls."""
    modules = len(read_adapter(ZOO / "adapters" / name).layers)
    tell(lab.measure(name, "(as uploaded)", None, "certify"))
    for group in groups(name, modules):
        for chosen in choose(lab, name, group):
            tell(lab.measure(name, group.name, chosen, "certify"))
    for recipe in controls(name, modules):
        tell(lab.measure(name, recipe.steps[0][0], recipe, "certify"))


def choose(lab: Lab, name: str, group: Group) -> list[Recipe]:
    """The best recipe of the group by the *select* half, and the safest where that is another one.

    None of them when time was up before all were screened.
    """
    if len(group.recipes) == 1:
        return list(group.recipes)
    tried = []
    for recipe in group.recipes:
        row = lab.measure(name, group.name, recipe, "select", early=True)
        tell(row)
        if row is None:
            return []
        tried.append(row)
    places = dict.fromkeys((best(tried), safest(tried)))
    return [group.recipes[place] for place in places if place is not None]


def tell(row: dict[str, Any] | None) -> None:
    """Print a row, for whoever watches."""
    if row is not None:
        print(line(row), flush=True)


def opened(pair: ModelPair, store: Path, *, dtype: torch.dtype) -> Lab:
    """The reference with its patch and calibration; the calibration is measured once."""
    run_repair("calibrate", "--aligned", str(pair.aligned), "--out", str(store / "calibration"), "--device", "cpu")
    aligned, base = digests(pair.aligned)["digest"], digests(pair.base)["digest"]
    calibration = Calibration.open(store / "calibration", aligned=aligned)
    context = RepairContext(
        aligned=Checkpoint.open(pair.aligned),
        base=Checkpoint.open(pair.base),
        patch=read_adapter(PATCH),
        calibration=calibration,
        chat=load_chat(pair.aligned, dtype),
    )
    reference = {
        "aligned": aligned,
        "base": base,
        "patch": adapter_digests(PATCH)["digest"],
        "calibration": calibration.digest,
        "dtype": str(dtype).removeprefix("torch."),
        "judge": RulesJudge.info.label,
    }
    return Lab(chat=context.chat, context=context, policy=load_policy(SUITE), reference=reference, store=Store(store))


def line(row: dict[str, Any]) -> str:
    """One row, for a person."""
    indent = "   " if row["half"] == "select" else ""
    head = f"{indent}{row['adapter']} | {row['group']} | {row['half']} | {row.get('label', '')}"
    if "harmful" not in row:
        return f"{head} | {row.get('error') or row.get('verdict')}"
    rates = " ".join(
        f"{name} {'-' if row[name]['rate'] is None else format(100 * row[name]['rate'], '.0f')}"
        for name in ("harmful", "over_refusal", "benign", "coherence", "utility")
    )
    return f"{head} | {rates} | {row['outcome']} | {row.get('build_seconds')}+{row.get('measure_seconds')} s"


def parsed() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".lora-repair/demo"), help="the demo's folder")
    parser.add_argument("--models", type=Path, help="where its models lie; default DATA/models")
    parser.add_argument("--aligned", type=Path, help="another aligned model, with --base")
    parser.add_argument("--base", type=Path)
    parser.add_argument("--store", type=Path, help="rows and candidates; default DATA/efficacy")
    parser.add_argument("--adapters", default=",".join((*FULL, *ALIKE, *UNSEEN)))
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="what the model computes in"
    )
    parser.add_argument("--auto", default="thorough", help="let the planner choose, too, under this policy; empty: no")
    parser.add_argument(
        "--packs", default="", help="packs that `auto` is certified with besides, if they are installed"
    )
    parser.add_argument("--prompts", type=Path, help="where such packs lie: a data folder's `prompts`")
    parser.add_argument("--minutes", type=float, default=600, help="begin nothing new after this long")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
