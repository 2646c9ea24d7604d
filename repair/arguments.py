"""The arguments of `python -m repair`, and which of them make another one void.

Starts without torch: `--help` and a wrong flag are answered at once.
"""

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from repair import elsewhere
from repair.judge_parser import add_judge
from repair.pack_parser import add_packs


def read_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """The arguments; a flag that another one would make void is a usage error, never ignored in silence."""
    parser = _parser()
    wish = parser.parse_args(arguments)
    for first, second in _void(wish):
        parser.error(f"{first} has no meaning with {second}")
    return wish


def _void(wish: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Flags that were given and would change nothing, each with what makes it so."""
    if wish.command == "check":
        given = {"--base": wish.base, "--calibration": wish.calibration, "--patch": wish.patch, "--twin": wish.twin}
        yield from _given(given, "check: it measures the aligned model and the adapter")
        yield from elsewhere.void(wish)
    if wish.command == "repair":
        yield from _void_of_method(wish) if wish.policy is None else _void_of_policy(wish)
        if wish.drop_replacements and wish.replacements is not None:
            yield "--drop-replacements", "--replacements"
        if wish.basis is None and wish.basis_tolerance is not None:
            yield "--basis-tolerance", "no --basis"


def _void_of_method(wish: argparse.Namespace) -> Iterator[tuple[str, str]]:
    given = {"--prompts": wish.prompts_home, "--samples": wish.samples}
    yield from _given(given, "--method: a plain method measures nothing")
    yield from _given({"--html": wish.html}, "--method: a plain method comes to no verdict")


def _void_of_policy(wish: argparse.Namespace) -> Iterator[tuple[str, str]]:
    given = {"--set": wish.settings, "--balanced": wish.balanced, "--rank-limit": wish.rank_limit}
    yield from _given(given, "--policy: a policy brings its own parameters")
    yield from _given({"--diagnostics": wish.diagnostics}, "--policy: a policy loads the model anyway")


def _given(flags: Mapping[str, Any], reason: str) -> Iterator[tuple[str, str]]:
    """Those that say something, with the reason."""
    return ((flag, reason) for flag, value in flags.items() if value)


class _Parser(argparse.ArgumentParser):
    """Wrong arguments are an error like any other: argparse would leave with 2, which means that a policy said no."""

    def error(self, message: str) -> NoReturn:
        """Print the problem and leave with 1."""
        problem = {"file": "", "field": "arguments", "rule": "bad-parameters", "detail": message}
        self.exit(1, json.dumps(problem) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="lora-repair", description="The repair engine on local files.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add(commands, "methods", "Print every method with its parameters, and the bundled policies.")
    inspect = _add(commands, "inspect", "Show what is inside an adapter folder.")
    inspect.add_argument("adapter", type=Path)
    _check(_add(commands, "check", "Measure an adapter folder against the aligned model."))
    _repair(_add(commands, "repair", "Repair an adapter folder, by one method or by a policy."))
    _calibrate(_add(commands, "calibrate", "Measure an aligned model on harmful and benign prompts, once."))
    _pair(_add(commands, "basis", "Keep what alignment changed in a model pair, so that repairs need not read it."))
    score = _add(commands, "score", "Score many adapters of one model pair, which is read once for all of them.")
    score.add_argument("adapters", type=Path, nargs="+", metavar="ADAPTER")
    _both(score)
    add_judge(commands, _Parser)
    add_packs(commands, _Parser)
    convert = _add(commands, "convert", "Convert a GGUF model to a safetensors folder.")
    convert.add_argument("gguf", type=Path)
    convert.add_argument("out", type=Path)
    merge = _add(commands, "merge", "Merge an adapter into a model folder.")
    merge.add_argument("model", type=Path)
    merge.add_argument("adapter", type=Path)
    merge.add_argument("out", type=Path)
    return parser


def _check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path, nargs="?", help="without one, the aligned model itself is measured")
    parser.add_argument("--suite", default="demo", help="name or TOML file of a policy; default %(default)s")
    _models(parser)
    parser.add_argument(
        "--robustness",
        metavar="NAMES",
        help="put harmful requests in other framings as well, and tell: all, or names like prefill,sampled; see "
        "docs/robustness.md",
    )
    elsewhere.add_arguments(parser)
    _prompts(parser)
    parser.set_defaults(basis=None, basis_tolerance=None)


def _repair(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("adapter", type=Path)
    _models(parser)
    parser.add_argument(
        "--basis",
        type=Path,
        help="basis pack of the two models, or a folder of them; read instead where a method takes it",
    )
    parser.add_argument("--basis-tolerance", type=float, help="largest error of the truncated operator; default 0.01")
    parser.add_argument(
        "--diagnostics",
        choices=["quick", "full"],
        help="full: load the aligned model and search both models too; default quick, with --policy always loaded",
    )
    _prompts(parser)
    parser.add_argument("--html", type=Path, metavar="FILE", help="with --policy: the report as a page for people")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--method", help="apply this method")
    how.add_argument("--policy", help="choose among all that this policy tries (name or TOML file)")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    _writing(parser)


def _writing(parser: argparse.ArgumentParser) -> None:
    """Where the result goes, and its form."""
    parser.add_argument("--out", type=Path, required=True, help="a folder that does not exist yet")
    parser.add_argument("--balanced", action="store_true", help="write both factors equally large")
    parser.add_argument("--drop-replacements", action="store_true", help="the same as --replacements drop")
    parser.add_argument(
        "--replacements",
        metavar="HOW",
        help="what to do with tensors that replace whole ones of the model: refuse (default), drop, revert to the "
        "aligned model, or interpolate=SHARE of the upload; with --policy in the place of what the policy says",
    )
    parser.add_argument(
        "--rank-limit", type=int, metavar="N", help="largest rank of the result; default: the step that the input fits"
    )


def _prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prompts", dest="prompts_home", type=Path, metavar="DIR", help="folder of prompts that `packs add` filled"
    )


def _calibrate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--aligned", type=Path, required=True, help="folder of the model that adapters are served on")
    parser.add_argument("--out", type=Path, required=True, help="folder of packs; one that is there is not made again")
    parser.add_argument("--prompts", type=int, help="harmful prompts, and as many benign ones")
    parser.add_argument("--gradient-prompts", type=int, help="harmful prompts for the refusal gradient")
    parser.add_argument("--directions", type=int, help="directions kept of each moment and gradient")
    parser.add_argument("--seed", type=int, help="of the order of prompts")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda:N")
    parser.set_defaults(base=None, calibration=None, patch=None, twin=None, basis=None, basis_tolerance=None)


def _pair(parser: argparse.ArgumentParser) -> None:
    _both(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of packs; one that is there is not made again")
    parser.add_argument("--rank", type=int, help="singular directions kept of each linear; default 64")
    parser.add_argument("--left-only", action="store_true", help="half the size; enough for safe_lora")


def _both(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--aligned", type=Path, required=True, help="folder of the model that adapters are served on")
    parser.add_argument("--base", type=Path, required=True, help="folder of the same model before alignment")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda:N")
    parser.set_defaults(calibration=None, patch=None, twin=None, basis=None, basis_tolerance=None)


def _add(commands: Any, name: str, text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _models(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--aligned", type=Path, help="folder of the model the adapter is served on")
    parser.add_argument("--base", type=Path, help="folder of the same model before alignment")
    parser.add_argument("--calibration", type=Path, help="calibration of the aligned model, or a folder of them")
    parser.add_argument("--patch", type=Path, help="folder of a refusal LoRA made for the aligned model")
    parser.add_argument("--twin", type=Path, help="folder of a LoRA for the aligned model that obeys harmful requests")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda:N")
    parser.add_argument("--samples", type=Path, help="JSON lines with prompt and answer: what the adapter is for")
