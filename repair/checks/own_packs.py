"""An operator's own prompts: a table becomes a pack in the installation's home, and is then read like others."""

import hashlib
import json
import re
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_args

from repair.checks.packs import BUNDLED, Pack, jsonl, read_pack
from repair.checks.recipes import RECIPES, Split
from repair.checks.tables import Columns, Read, prompts_of, records
from repair.errors import BadParameters, OutputExists

KINDS: Final = ("harmful", "lookalike", "benign", "checkable")
FORMS: Final = {".csv": "csv", ".jsonl": "jsonl", ".json": "json", ".yaml": "yaml", ".yml": "yaml"}
_NAME: Final = re.compile(r"[a-z][a-z0-9_]{0,63}")
_PLAIN: Final = re.compile(r"[ -~]{1,200}")


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a table does not say of itself.

    Attributes:
        kind: What its prompts are asked for.
        split: Which half they belong to.
        licence: Under which they may be used; ours to repeat, not to judge.
        columns: Where the table keeps what.
        source: Where it came from, for the manifest.
    """

    kind: str
    split: Split = "hash"
    licence: str
    columns: Columns = field(default_factory=Columns)
    source: str = ""


def check_name(name: str, home: Path) -> None:
    """Raises BadParameters or OutputExists unless a pack of this name may be added."""
    if _NAME.fullmatch(name) is None:
        raise BadParameters("small letters, digits and underscores, a letter first", field="name")
    if (BUNDLED / name).exists() or name in RECIPES or name == "wheels":
        raise BadParameters(f"{name} is a name of ours", field="name")
    if (home / name).exists():
        raise OutputExists(
            f"there is a pack {name}; a change is another name, or remove the old one", file=str(home / name)
        )


def add_table(name: str, table: Path, about: Description, home: Path) -> Pack:
    """Read a table whole, write it as a pack, and read it back. Raises PackInvalid with line and column."""
    check_name(name, home)
    _check(about)
    form = FORMS.get(table.suffix.lower())
    if form is None:
        raise BadParameters(f"one of {', '.join(FORMS)} is wanted", file=table.name, field="file")
    content = table.read_bytes()
    read = prompts_of(name, records(content, form, file=table.name), about.columns, file=table.name)
    if not read.rows:
        raise BadParameters("no row of it was taken", file=table.name, field="file")
    home.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=home, prefix=".adding-") as folder:
        made = Path(folder) / name
        made.mkdir()
        rows = jsonl(read.rows)
        (made / "rows.jsonl").write_bytes(rows)
        (made / "manifest.toml").write_text(_manifest(name, read, about, content), encoding="utf-8")
        read_pack(made, origin="operator")
        shutil.move(made, home / name)
    return read_pack(home / name, origin="operator")


def _check(about: Description) -> None:
    for what, value, allowed in (("kind", about.kind, KINDS), ("split", about.split, get_args(Split))):
        if value not in allowed:
            raise BadParameters(f"one of {', '.join(allowed)} is wanted", field=what)
    if (about.kind == "checkable") != bool(about.columns.answers):
        raise BadParameters("checkable questions, and only those, have a column of answers", field="column answers")
    for what, text in (("licence", about.licence), ("source", about.source or "-")):
        if _PLAIN.fullmatch(text) is None:
            raise BadParameters("one line of plain ASCII is wanted", field=what)


def _manifest(name: str, read: Read, about: Description, content: bytes) -> str:
    """What pins the rows and tells of them; strings of JSON in plain ASCII are strings of TOML."""
    fields: dict[str, Any] = {
        "id": name,
        "version": 1,
        "licence": about.licence,
        "kind": about.kind,
        "split": about.split,
        "source": about.source,
        "source_sha256": f"sha256:{hashlib.sha256(content).hexdigest()}",
        "rows": len(read.rows),
        "sha256": f"sha256:{hashlib.sha256(jsonl(read.rows)).hexdigest()}",
        "categories": sorted({row.category for row in read.rows}),
    }
    lines = [f"{key} = {json.dumps(value)}" for key, value in fields.items()]
    lines += ["", "[left_out]", *(f"{json.dumps(why)} = {count}" for why, count in sorted(read.left_out.items()))]
    return "\n".join(lines) + "\n"
