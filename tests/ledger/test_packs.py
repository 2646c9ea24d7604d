"""What was measured about the models of a reference: attached once, replaced with a trace, bound to the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from gate.digest import sha256_file
from ledger import audit, packs, references
from ledger.audit import Query
from ledger.errors import Conflict, NotFound
from ledger.packs import Pack
from ledger.references import NewReference

if TYPE_CHECKING:
    from pathlib import Path

    from ledger.db import Database

ALIGNED = "sha256:1"


def add(database: Database) -> None:
    with database.begin() as tx:
        references.add(tx, NewReference(name="r", aligned_path="/a", aligned_digest=ALIGNED), actor="system:cli")


def attach(database: Database, *given: Pack, aligned: str = ALIGNED) -> None:
    with database.begin() as tx:
        packs.attach(tx, "r", *given, aligned_digest=aligned, actor="system:cli")


def pack(kind: str, letter: str) -> Pack:
    return Pack(kind=kind, path=f"/{letter}", digest=f"sha256:{letter}")


def test_packs_may_come_later_and_are_in_the_log(database: Database) -> None:
    """One event for each other pack; the same again is none; the pair again leaves them where they are."""
    add(database)
    attach(database, pack("calibration", "c"))
    attach(database, pack("calibration", "c"), pack("basis", "b"))
    attach(database, pack("calibration", "d"))
    add(database)

    with database.read() as tx:
        row = references.get(tx, "r")
        events = audit.search(tx, Query(action="reference.prepared"), newest_first=False).items
        assert audit.verify(tx).ok
    assert (row.calibration_path, row.calibration_digest) == ("/d", "sha256:d")
    assert (row.basis_path, row.basis_digest) == ("/b", "sha256:b")
    assert references.optional_parts(row)["calibration"] == "sha256:d"
    assert [(event.digest, event.detail) for event in events] == [
        ("sha256:c", {"pack": "calibration", "before": None}),
        ("sha256:b", {"pack": "basis", "before": None}),
        ("sha256:d", {"pack": "calibration", "before": "sha256:c"}),
    ]


def test_a_pack_that_moved_is_found_and_is_no_event(database: Database) -> None:
    """Its bytes are the same ones; paths are an operator's own words."""
    add(database)
    attach(database, pack("basis", "b"))
    attach(database, Pack(kind="basis", path="/elsewhere", digest="sha256:b"))

    with database.read() as tx:
        assert references.get(tx, "r").basis_path == "/elsewhere"
        assert len(audit.search(tx, Query(action="reference.prepared")).items) == 1


def test_a_pack_of_another_model_is_not_taken(database: Database) -> None:
    """Nor one for a reference that nobody registered; then nothing is written."""
    with pytest.raises(NotFound):
        attach(database, pack("basis", "b"))
    add(database)
    with pytest.raises(Conflict, match="another model"):
        attach(database, pack("basis", "b"), aligned="sha256:2")
    with database.read() as tx:
        assert references.get(tx, "r").basis_digest is None


@pytest.mark.parametrize(("kind", "header"), packs.HEADERS.items())
def test_a_pack_is_called_by_its_header(tmp_path: Path, kind: str, header: str) -> None:
    """Another byte in it is another pack; a folder without it is none."""
    with pytest.raises(FileNotFoundError):
        packs.describe(kind, tmp_path)
    (tmp_path / header).write_text("{}")
    first = packs.describe(kind, tmp_path)
    assert (first.path, first.digest) == (str(tmp_path), sha256_file(tmp_path / header))
    (tmp_path / header).write_text("{ }")
    assert packs.describe(kind, tmp_path).digest != first.digest
