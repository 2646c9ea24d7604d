"""`python -m repair`: the engine on local files, without any service. `lora-repair repair|inspect|check` ends here.

Exit codes: 0 ok, 1 error (one JSON problem, the last line of standard error: above it stands progress), 2 the policy
said no, 3 inconclusive: nothing is released, and what was measured shows neither that the policy is met nor that it is
not.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from repair import elsewhere
from repair.arguments import read_arguments
from repair.telling import Teller

if TYPE_CHECKING:
    from repair.commands import Answer, Place, Writing
    from repair.treatment import Replacements


def main(arguments: list[str] | None = None) -> int:
    """Run one command; whatever we know how to name becomes a problem, not a traceback."""
    wish = read_arguments(arguments)
    from gate.errors import Refused
    from repair.errors import RepairError

    try:
        if wish.command == "judge":
            return _judge_rows(wish) if wish.action == "run" else _judge_measured(wish)
        answer = _answer(wish)
    except (RepairError, Refused) as error:
        print(json.dumps(error.as_dict()), file=sys.stderr)
        return 1
    except OSError as error:
        problem = {"file": str(error.filename or ""), "field": "", "rule": "io", "detail": error.strerror or str(error)}
        print(json.dumps(problem), file=sys.stderr)
        return 1
    print(json.dumps(answer.document) if wish.json else "\n".join(_lines(answer.document)))
    if getattr(wish, "html", None) is not None:  # after the answer, which took minutes and must not be lost
        from pages.render import render

        wish.html.write_text(render(answer.document), encoding="utf-8")
    return int(answer.code)


def _judge_rows(wish: argparse.Namespace) -> int:
    """A line for every row as soon as it is judged; what could not be read or judged is told at the end."""
    from repair import judge_commands

    told, lines = judge_commands.run(wish.rows, judge_commands.settings_of(wish))
    for line in lines:
        print(json.dumps(line) if wish.json else _row(line), flush=True)
    for problem in told.problems:
        print(json.dumps(problem.as_dict()), file=sys.stderr)
    return 1 if told.problems else 0


def _judge_measured(wish: argparse.Namespace) -> int:
    from repair import judge_commands

    settings = judge_commands.settings_of(wish)
    found = judge_commands.calibrate(wish.rows, wish.wheel, settings, held_out=wish.held_out, out=wish.out)
    print(json.dumps(found) if wish.json else "\n".join(_lines(found)))
    return 0


def _answer(wish: argparse.Namespace) -> "Answer":
    from repair import commands

    if wish.command == "methods":
        return commands.catalogue()
    if wish.command == "inspect":
        return commands.inspect(wish.adapter)
    if wish.command in {"convert", "merge"}:
        return _model_command(wish)
    if wish.command == "packs":
        return _pack_command(wish)
    if getattr(wish, "prompts_home", None) is not None:
        from repair.checks.packs import HOME

        HOME.path = wish.prompts_home
    answers = {"calibrate": _measuring_command, "check": _measuring_command, "basis": _pair_command}
    answers |= {"score": _pair_command, "repair": _repair_command}
    return answers[wish.command](wish, _place(wish))


def _pack_command(wish: argparse.Namespace) -> "Answer":
    from repair import pack_commands

    if wish.action == "list":
        return pack_commands.listing(wish.home)
    if wish.action == "verify":
        return pack_commands.verify(wish.home, wish.names)
    from repair.checks.fetch import HubFile
    from repair.checks.own_packs import Description
    from repair.checks.recipes import RECIPES
    from repair.checks.tables import Columns
    from repair.errors import BadParameters

    if wish.file is None and wish.hub is None:
        if wish.name not in RECIPES:
            raise BadParameters(f"no recipe knows it; there are {', '.join(RECIPES)}; --file or --hub?", field="name")
        return pack_commands.add_known(wish.name, wish.home, wish.network, wheel=wish.wheel)
    columns = Columns(text=wish.text, category=wish.category, answers=wish.answers)
    source = f"hub {wish.hub} {wish.revision} {wish.path}" if wish.hub else wish.file.name
    about = Description(kind=wish.kind, split=wish.split, licence=wish.licence, columns=columns, source=source)
    if wish.file is not None:
        return pack_commands.add_own(wish.name, wish.home, about, table=wish.file)
    wanted = HubFile(repository=wish.hub, path=wish.path, revision=wish.revision, sha256=wish.sha256)
    return pack_commands.add_from_hub(wish.name, wish.home, about, wanted, wish.network)


def _repair_command(wish: argparse.Namespace, place: "Place") -> "Answer":
    from repair import commands

    if wish.policy is not None:
        from repair import measure

        if wish.html is not None:
            wish.html.write_text("", encoding="utf-8")  # minutes before it is needed
        return measure.repair_by_policy(
            wish.adapter, wish.policy, place, wish.out, samples=wish.samples, replacements=_replacements(wish)
        )
    method = commands.method_named(wish.method, wish.settings)
    return commands.repair_by_method(
        wish.adapter, method, place, wish.out, _writing(wish), thorough=wish.diagnostics == "full"
    )


def _writing(wish: argparse.Namespace) -> "Writing":
    from repair.commands import Writing
    from repair.errors import BadParameters
    from repair.treatment import Replacements

    if wish.rank_limit is not None and wish.rank_limit < 2:  # noqa: PLR2004 - one for the adapter, one for a patch
        raise BadParameters("at least 2", field="rank-limit")
    found = _replacements(wish) or Replacements()
    return Writing(replacements=found, balanced=wish.balanced, rank_limit=wish.rank_limit)


def _replacements(wish: argparse.Namespace) -> "Replacements | None":
    """What was asked to become of whole tensors; None where nobody said."""
    from repair.treatment import Replacements

    text = "drop" if wish.drop_replacements else wish.replacements
    return None if text is None else Replacements.parse(text)


def _measuring_command(wish: argparse.Namespace, place: "Place") -> "Answer":
    if wish.command == "check":
        from repair import measure

        return measure.check(
            wish.adapter,
            wish.suite,
            place,
            samples=wish.samples,
            there=elsewhere.Elsewhere.of(wish),
            robustness=wish.robustness,
        )
    from repair.calibration import CalibrationSettings
    from repair.commands import calibrate

    given = {name: getattr(wish, name) for name in ("prompts", "gradient_prompts", "directions", "seed")}
    settings = CalibrationSettings(**{name: value for name, value in given.items() if value is not None})
    return calibrate(place, wish.out, settings)


def _pair_command(wish: argparse.Namespace, place: "Place") -> "Answer":
    from repair import pair_commands
    from repair.basis import BasisSettings

    if wish.command == "score":
        return pair_commands.score(wish.adapters, place)
    given = {} if wish.rank is None else {"rank": wish.rank}
    return pair_commands.make_basis(place, wish.out, BasisSettings(**given, inputs=not wish.left_only))


def _model_command(wish: argparse.Namespace) -> "Answer":
    from repair.commands import Answer
    from repair.report import digests

    if wish.command == "convert":
        from repair.gguf import convert_gguf

        convert_gguf(wish.gguf, wish.out)
    else:
        from repair.merge import merge_adapter

        merge_adapter(wish.model, wish.adapter, wish.out)
    return Answer(document={"outputs": {"model": digests(wish.out)}})


def _place(wish: argparse.Namespace) -> "Place":
    from repair.commands import Place, device_of
    from repair.determinism import ask_determinism

    ask_determinism()
    basis = {} if wish.basis_tolerance is None else {"basis_tolerance": wish.basis_tolerance}
    return Place(
        aligned=wish.aligned,
        base=wish.base,
        calibration=wish.calibration,
        patch=wish.patch,
        twin=wish.twin,
        basis=wish.basis,
        **basis,
        device=device_of(wish.device),
        progress=Teller(),
    )


def _lines(document: Mapping[str, Any]) -> list[str]:
    """The answer for a person: plain values first, then each list as a table."""
    lines = [f"{key}: {value}" for key, value in document.items() if isinstance(value, str | int | float)]
    for key, value in document.items():
        if key == "diagnostics":
            lines.append(f"{key}: {json.dumps(value['summary'])}; all of them with --json")
        elif isinstance(value, dict) and value:
            lines.append(f"{key}: {json.dumps(value)}")
        elif isinstance(value, list) and value and key != "rows":
            lines.append(f"{key}:")
            lines += [f"  {_row(item)}" for item in value]
    return lines


def _row(item: Any) -> str:
    if not isinstance(item, dict):
        return str(item)
    shown = {key: value for key, value in item.items() if value not in (None, "", [], {}) and key != "parameters"}
    cells = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()]
    return "  ".join(cells).removeprefix("name ")


if __name__ == "__main__":
    raise SystemExit(main())
