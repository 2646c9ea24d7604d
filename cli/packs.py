"""`lora-repair reference prepare`: measure the models of a reference once, and let every job use what was found.

The tensor work is `python -m repair calibrate` and `basis`, in processes of their own: their progress is the
operator's to see (on standard error, with a terminal or without), their JSON is ours to read.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.errors import Refusal
from cli.tree import DatabaseUrl, DataDir, Json, reference_app, show

if TYPE_CHECKING:
    from ledger.packs import Pack
    from ledger.settings import Settings
    from ledger.tables import Reference


@reference_app.command("prepare")
def reference_prepare(
    name: str,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda:N; default that of the settings.")] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: Json = False,
) -> None:
    """Make the packs of a reference once: its calibration and, where it has a base, what alignment changed.

    Packs lie under the data folder, named by all that decides them: one that is there is not made again.
    """
    from cli.settings import load

    show(prepare(load(data_dir, database_url=database_url, device=device), name), as_json=as_json)


def prepare(settings: Settings, name: str) -> dict[str, Any]:
    """Make or find the packs, and write them into the ledger at hand."""
    from ledger import packs, references
    from ledger.db import Database

    with Database(settings.database) as database:
        with database.read() as tx:
            row = references.get(tx, name)
        made = [_made(settings, row, "calibration")]
        if row.base_path is not None:
            made.append(_made(settings, row, "basis"))
        with database.begin() as tx:
            packs.attach(tx, name, *made, aligned_digest=row.aligned_digest, actor="system:cli")
    why = "" if row.base_path is not None else "a basis pack needs a base model, which this reference has none of"
    return {"name": name, **{pack.kind: {"digest": pack.digest, "path": pack.path} for pack in made}, "note": why}


def _made(settings: Settings, row: Reference, kind: str) -> Pack:
    """One pack. Raises Refusal when it cannot be made, or when the models are no longer what was registered."""
    from ledger import packs

    command = {"calibration": "calibrate", "basis": "basis"}[kind]
    models = {"aligned": (row.aligned_path, row.aligned_digest)}
    if kind == "basis" and row.base_path is not None and row.base_digest is not None:
        models["base"] = (row.base_path, row.base_digest)
    words = [word for model, (path, _) in models.items() for word in (f"--{model}", path)]
    store = settings.packs_dir / kind
    print(f"{row.name}: the {kind} pack", file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "repair", command, *words, "--out", str(store), "--device", settings.device, "--json"],
        check=False,
        stdout=subprocess.PIPE,  # its progress and its problems go where ours go
        text=True,
    )
    if done.returncode != 0:
        raise Refusal(f"the {kind} pack of {row.name} was not made; the reason stands above")
    answer = json.loads(done.stdout)
    for model, (path, registered) in models.items():
        if (found := answer["inputs"][model]["digest"]) != registered:
            raise Refusal(f"{path} is no longer what was registered: now {found}, then {registered}")
    return packs.describe(kind, Path(answer["outputs"][kind]["path"]))
