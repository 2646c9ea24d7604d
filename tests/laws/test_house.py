"""Rules of the house that no other test would notice breaking."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from ledger.audit import Action
from ledger.settings import Settings
from tests import generated

ROOT = Path(__file__).parents[2]


def test_generated_files_are_fresh_and_migrations_make_the_tables() -> None:
    """What is committed is what the code would write today."""
    assert generated.stale() == []


def test_every_variable_that_is_read_stands_in_the_page_of_settings() -> None:
    """Whoever looks for a variable of ours in the sources finds it explained."""
    page = set(re.findall(r"LORA_REPAIR_[A-Z_]+", (ROOT / "docs" / "settings.md").read_text()))
    folders = ("api", "cli", "docker", "gate", "ledger", "pages", "repair", "worker", "tests")
    files = [ROOT / "Makefile", *(path for name in folders for path in (ROOT / name).rglob("*") if path.is_file())]
    texts = [
        path.read_text()
        for path in files
        if path.suffix in {".py", ".yml", ".md", ""} and "__pycache__" not in path.parts
    ]
    named = {name for text in texts for name in re.findall(r"LORA_REPAIR_[A-Z_]*[A-Z]\b", text)}
    no_variables = {name for name in named if name.startswith(("LORA_REPAIR_VERDICT", "LORA_REPAIR_CHECK_PASSED"))}
    assert named - no_variables <= page
    assert {f"LORA_REPAIR_{name.upper()}" for name in Settings.model_fields} <= page


@pytest.mark.parametrize(
    "module", ["api.app", "ledger.db", "ledger.verify", "cli.main", "gate.admission", "pages.render"]
)
def test_no_torch_outside_the_worker(module: str) -> None:
    """The API, the ledger, the gate and the command line start without loading torch, transformers or celery."""
    heavy = "{'torch', 'transformers', 'peft', 'celery'}"
    code = f"import sys, {module}; sys.exit(', '.join({heavy} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


def test_contributing_tells_what_make_does() -> None:
    """Every target that it names is one, and the real model is used by the one that it says."""
    told = dict(re.findall(r"^make (\w+) +# (.*)$", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE))
    recipes = dict(re.findall(r"^(\w+):[^\n]*\n((?:\t[^\n]*\n)+)", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert told.keys() <= recipes.keys()
    assert [name for name, words in told.items() if "135M" in words] == ["test", "flow"]
    assert "-m " not in recipes["test"].replace("-m pytest", "")
    assert "-m model" in recipes["flow"]


def test_every_method_has_its_page() -> None:
    """Where CONTRIBUTING says that it lies, and the list of methods leads there."""
    assert "`docs/methods/<name>.md`" in (ROOT / "CONTRIBUTING.md").read_text()
    names = {path.stem for path in (ROOT / "repair" / "methods").glob("[!_]*.py")}
    folder = ROOT / "docs" / "methods"
    assert {path.stem for path in folder.glob("*.md")} - {"README"} == names
    assert set(re.findall(r"\]\((\w+)\.md\)", (folder / "README.md").read_text())) == names


def test_the_readme_names_every_command_that_exists() -> None:
    """Every `lora-repair` command shown to a reader is one that the program knows."""
    from typer.main import get_command

    import cli.main  # noqa: F401 - hangs the commands onto the tree
    from cli.tree import app

    known = set(get_command(app).commands)  # type: ignore[attr-defined] # a click group
    text = (ROOT / "README.md").read_text() + (ROOT / "docker" / "README.md").read_text()
    shown = set(re.findall(r"^\s*lora-repair ([a-z]+)", text, flags=re.MULTILINE))
    assert shown
    assert shown <= known


def test_no_text_of_a_reply_has_a_place_in_a_row() -> None:
    """Rows keep hashes and counts: a field for the reply's text would end in a report."""
    from dataclasses import fields

    from repair.checks.evidence import Row

    assert not {field.name for field in fields(Row)} & {"text", "reply", "response", "completion", "prompt"}


@pytest.mark.parametrize("action", Action)
def test_every_event_that_the_log_knows_is_written_somewhere(action: Action) -> None:
    """A word that nobody writes promises a record that does not exist."""
    import re

    sources = [path for folder in ("ledger", "worker", "api", "cli") for path in (ROOT / folder).rglob("*.py")]
    assert any(re.search(rf"Action\.{action.name}\b", path.read_text()) for path in sources)
