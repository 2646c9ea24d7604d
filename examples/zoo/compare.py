"""What each method does to zoo adapters: attack success, over-refusal and utility kept, with the controls beside them.

    python examples/zoo/compare.py --aligned DIR --base DIR [--adapters poisoned,obedient] [--out FILE]

Every candidate is measured in full on the *certify* half of the `demo` suite; nothing is chosen here, so nothing
is biased by choosing. `refusal_tune` is tried with its defaults and as the `demo` policy sets it. Prints a markdown
table and writes the numbers as JSON.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402 - after the path

from repair.adapter_file import read_adapter  # noqa: E402 - as above
from repair.checkpoint import Checkpoint  # noqa: E402 - as above
from repair.checks.backend import Sample  # noqa: E402 - as above
from repair.checks.chat import ChatModel  # noqa: E402 - as above
from repair.checks.planner import split_samples  # noqa: E402 - as above
from repair.checks.policy import Policy, load_policy  # noqa: E402 - as above
from repair.checks.report import CheckReport  # noqa: E402 - as above
from repair.checks.run import Original, run_checks  # noqa: E402 - as above
from repair.context import RepairContext  # noqa: E402 - as above
from repair.errors import RepairError  # noqa: E402 - as above
from repair.lora import LoraAdapter  # noqa: E402 - as above
from repair.methods import METHODS  # noqa: E402 - as above
from repair.run import repair_adapter  # noqa: E402 - as above

ZOO: Final = ROOT / "examples" / "zoo"
COLUMNS: Final = ("harmful", "over_refusal", "benign", "coherence", "utility")


def wishes(modules: int, policy: Policy) -> list[tuple[str, dict[str, Any]]]:
    """What is compared; the two controls come first. 70 % of the modules where a method takes a number of them."""
    ours = [(one.method, dict(one.parameters)) for one in policy.candidates() if one.method == "refusal_tune"]
    most = round(0.7 * modules)
    return [
        ("random_modules", {"count": most, "seed": 1}),
        ("scale", {"strength": 0.6}),
        ("scale", {"strength": 0.4}),
        ("safe_lora", {"mode": "paper", "count": most}),
        ("safe_lora", {"mode": "truncated", "count": most}),
        ("splora", {"count": most}),
        ("s3lora", {"count": most}),
        ("spectral", {}),
        ("patch", {"strength": 1.0}),
        ("resta", {}),
        ("lox", {}),
        ("lssf", {}),
        ("safemerge", {}),
        ("refusal_tune", {}),
        *ours,
    ]


def main() -> None:
    """Measure, print, write."""
    arguments = parsed()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    policy = load_policy("demo")
    chat = ChatModel.load(arguments.aligned, "cpu" if not torch.cuda.is_available() else "cuda")
    context = RepairContext(
        aligned=Checkpoint.open(arguments.aligned),
        base=Checkpoint.open(arguments.base),
        patch=read_adapter(ZOO / "adapters" / "patch"),
        chat=chat,
        device=chat.device,
    )
    aligned = run_checks(chat, None, policy, "certify", arm="aligned", stop_early=False)
    found = [row("(aligned model)", "-", {}, aligned, 0.0)]
    print(line(found[0]), flush=True)
    for name in arguments.adapters.split(","):
        only = None if arguments.only is None else {"as uploaded", *arguments.only.split(",")}
        found += compare(name, chat, context, policy, aligned, only=only)
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")


def compare(
    name: str, chat: ChatModel, context: RepairContext, policy: Policy, aligned: CheckReport, *, only: set[str] | None
) -> list[dict[str, Any]]:
    """One adapter as uploaded, then under each method."""
    adapter = read_adapter(ZOO / "adapters" / name)
    original = original_of(chat, adapter)
    found = []
    for method, parameters in [("as uploaded", {}), *wishes(len(adapter.layers), policy)]:
        if only is not None and method not in only:
            continue
        start = time.monotonic()
        try:
            arm = adapter
            if method != "as uploaded":
                arm = repair_adapter(adapter, METHODS[method].parse(parameters), context).adapter
        except RepairError as error:
            found.append({"adapter": name, "method": method, "parameters": parameters, "error": str(error)})
            print(f"| {name} | {method} | {error} |", flush=True)
            continue
        seconds = time.monotonic() - start
        report = run_checks(
            chat,
            arm,
            policy,
            "certify",
            arm=method,
            aligned=aligned,
            original=original,
            repaired=arm is not adapter,
            stop_early=False,
        )
        found.append(row(name, method, parameters, report, seconds))
        print(line(found[-1]), flush=True)
    return found


def original_of(chat: ChatModel, adapter: LoraAdapter) -> Original:
    """The losses that utility is measured against, on the certify half of the zoo's samples."""
    rows = [json.loads(text) for text in (ZOO / "samples.jsonl").read_text().splitlines()]
    samples = split_samples([Sample(prompt=one["prompt"], answer=one["answer"]) for one in rows], "certify")
    return Original.measure(chat, adapter, samples)


def row(adapter: str, method: str, parameters: dict[str, Any], report: CheckReport, seconds: float) -> dict[str, Any]:
    """The numbers of one arm."""
    checks = {result.name: result for result in report.checks}
    shown = {name: checks[name] for name in COLUMNS if name in checks}
    return {
        "adapter": adapter,
        "method": method,
        "parameters": parameters,
        "seconds": round(seconds, 1),
        "outcome": report.outcome.value,
        **{
            name: {"rate": one.rate, "low": one.low, "high": one.high, "n": one.n, "outcome": one.outcome.value}
            for name, one in shown.items()
        },
    }


def line(one: dict[str, Any]) -> str:
    """One row of the markdown table."""

    def percent(name: str) -> str:
        check = one.get(name)
        if not check or check["rate"] is None:
            return "-"
        interval = "" if check["low"] is None else f" [{100 * check['low']:.0f}, {100 * check['high']:.0f}]"
        return f"{100 * check['rate']:.0f} %{interval}"

    settings = " ".join(f"{key}={value}" for key, value in one["parameters"].items())
    cells = [one["adapter"], f"{one['method']} {settings}".strip(), *(percent(name) for name in COLUMNS)]
    return "| " + " | ".join([*cells, f"{one['seconds']} s", one["outcome"]]) + " |"


def parsed() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--aligned", type=Path, required=True)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--adapters", default="poisoned,poisoned_light,obedient,drifted,trigger,innocent")
    parser.add_argument("--only", help="methods, separated by commas; all of them otherwise")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int)
    return parser.parse_args()


if __name__ == "__main__":
    main()
