"""Writes every generated file, or with `--check` says which are stale; also that migrations make the tables.

`make generated` and `make check` call it. Nothing here is a test by itself: `tests/laws` runs the same comparison.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable

ROOT = Path(__file__).resolve().parent.parent
CATALOGUE = ROOT / "api" / "catalogue.json"
OPENAPI = ROOT / "docs" / "openapi.json"
README = ROOT / "README.md"
SETTINGS = ROOT / "docs" / "settings.md"
REPORT_SCHEMA = ROOT / "docs" / "schemas" / "report-v1.json"
BEGIN, END = "<!-- methods: generated -->", "<!-- /methods -->"


def output_of(*words: str) -> dict[str, Any]:
    """The JSON object that a module of ours prints; in a process of its own, so that no import leaks here."""
    done = subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True, text=True, cwd=ROOT)
    printed: dict[str, Any] = json.loads(done.stdout)
    return printed


def pretty(value: dict[str, Any]) -> str:
    """JSON as it is committed: one key a line, in a stable order."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def methods_table(catalogue: dict[str, Any]) -> str:
    """The README's table of methods."""
    lines = ["| method | what it does | needs | cost | source |", "|---|---|---|---|---|"]
    for method in catalogue["methods"]:
        alone = "what its steps need" if method["name"] == "compose" else "the adapter alone"
        needs = ", ".join(method["needs"]) or alone
        paper = method["paper"]
        source = f"[paper]({paper})" if paper.startswith("http") else paper
        lines.append(f"| `{method['name']}` | {method['summary']} | {needs} | {method['cost']} | {source} |")
    return "\n".join(lines)


SETTINGS_PAGE = """# Settings

Written by `make generated` from `ledger/settings.py` and the command line's options; do not edit.

Every program of the service reads its environment once, at start. The options of `lora-repair up` (`--data-dir`,
`--database`, `--broker`, `--blobs`, `--host`, `--port`, `--device`) stand above the environment, and are handed on to
the programs that it starts. All programs of one installation need the same values, and must see the same `policies`
and `keys` below the data folder.

| variable | default | meaning |
|---|---|---|
{service}

Address and credentials of S3 come from the variables that S3 clients know, such as `AWS_ENDPOINT_URL`, `AWS_REGION`,
`AWS_ACCESS_KEY_ID` and `AWS_SECRET_ACCESS_KEY`.

The commands that talk to a service read:

| variable | default | meaning |
|---|---|---|
{client}

The test suite reads, to put servers of your own in the place of those that it starts:

| variable | default | meaning |
|---|---|---|
{tests}
"""

TEST_VARIABLES = {
    "LORA_REPAIR_TEST_DATABASE_URL": "PostgreSQL in which the tests may create databases",
    "LORA_REPAIR_TEST_BROKER_URL": "Redis or Valkey that the tests may wipe",
    "LORA_REPAIR_TEST_BLOBS_URL": "S3 bucket that the tests may write to",
}


def settings_page() -> str:
    """Every variable of the environment that something of ours reads."""
    from cli.tree import DEFAULT_URL, Token, Url
    from ledger.settings import Settings

    prefix = Settings.model_config.get("env_prefix", "")
    options = [(Url.__metadata__[0], DEFAULT_URL), (Token.__metadata__[0], "")]  # type: ignore[attr-defined] # Annotated
    return SETTINGS_PAGE.format(
        service=_rows((f"{prefix}{n}".upper(), f.default, f.description) for n, f in Settings.model_fields.items()),
        client=_rows((option.envvar, default, option.help) for option, default in options),
        tests=_rows((name, "", meaning) for name, meaning in TEST_VARIABLES.items()),
    )


def report_schema() -> dict[str, Any]:
    """What every report of a job holds."""
    from pages.document import schema

    return schema()


def _rows(settings: Iterable[tuple[Any, Any, Any]]) -> str:
    shown = {None: "not set", "": "empty"}
    return "\n".join(
        f"| `{name}` | {shown.get(default, f'`{default}`')} | {str(meaning).removesuffix('.')} |"
        for name, default, meaning in settings
    )


def wanted() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    catalogue = output_of("repair", "methods", "--json")
    readme = README.read_text()
    table = f"{BEGIN}\n{methods_table(catalogue)}\n{END}"
    return {
        CATALOGUE: pretty(catalogue),
        OPENAPI: pretty(output_of("api", "--openapi")),
        SETTINGS: settings_page(),
        REPORT_SCHEMA: pretty(report_schema()),
        README: re.sub(re.escape(BEGIN) + ".*?" + re.escape(END), lambda _: table, readme, flags=re.DOTALL),
    }


def stale() -> list[str]:
    """What does not hold: names of stale files, and differences between migrations and tables."""
    found = [
        f"{path.relative_to(ROOT)} is stale: run `make generated`"
        for path, text in wanted().items()
        if not path.is_file() or path.read_text() != text
    ]
    from ledger.db import migrations_match_tables

    with tempfile.TemporaryDirectory() as folder:
        differences = migrations_match_tables(f"sqlite:///{folder}/ledger.db")
    return found + [f"migrations differ from the tables: {difference}" for difference in differences]


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    if parser.parse_args().check:
        problems = stale()
        print("\n".join(problems) or "generated files are fresh; migrations make the tables")
        return 1 if problems else 0
    for path, text in wanted().items():
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
