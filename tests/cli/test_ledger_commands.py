"""Commands that write into the ledger at hand, or read it, without a service."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file
from sqlalchemy import create_engine, select, text, update

from cli.errors import Exit
from gate.digest import root_digest
from gate.model import file_digests
from ledger.audit_chain import content, link_hash
from ledger.tables import AuditEvent, AuditHead
from tests.api.conftest import IN, MODULE, OUT, adapter_files
from tests.cli.conftest import write_folder

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.cli.conftest import Said

    Say = Callable[..., Said]


@pytest.fixture
def ledger(sqlite_url: str, tmp_path: Path) -> tuple[object, ...]:
    """The options that name a fresh ledger."""
    return "--data-dir", tmp_path / "data", "--database", sqlite_url


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A checkpoint of one matrix."""
    folder = tmp_path / "model"
    folder.mkdir()
    save_file({f"{MODULE}.weight": np.zeros((OUT, IN), np.float32)}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("tool", ["patch", "twin"])
def test_a_reference_is_registered_with_its_tools(
    say: Say, ledger: tuple[object, ...], model: Path, folder: Path, tool: str
) -> None:
    """The answer has the digest of each part; a patch or a twin for another model is refused by name."""
    add = ("reference", "add", "pair", "--aligned", model, *ledger, "--json")
    assert json.loads(say(*add).out)[tool] is None

    said = say(*add, f"--{tool}", folder)

    assert json.loads(said.out) == {
        "name": "pair",
        "aligned": root_digest(file_digests(model)),
        "base": None,
        "patch": None,
        "twin": None,
        tool: root_digest(file_digests(folder)),
    }
    assert sorted(file_digests(folder)) == sorted(adapter_files())
    other = write_folder(folder.parent / "other", target_modules=["k_proj"])
    refused = say(*add, f"--{tool}", other)
    assert refused.code == Exit.ERROR
    assert json.loads(refused.err.removeprefix("lora-repair: "))["file"] == "adapter_model.safetensors"


def test_a_noted_head_shows_what_was_rewritten(
    say: Say, ledger: tuple[object, ...], sqlite_url: str, model: Path, tmp_path: Path
) -> None:
    """The head that `audit verify` prints is what `--head` takes; it tells of a rewrite that holds by itself."""
    for name in ("one", "two"):
        assert say("reference", "add", name, "--aligned", model, *ledger).code == Exit.OK
    said = json.loads(say("audit", "verify", *ledger, "--json").out)
    noted = said["head"]
    assert (said["ok"], noted) == (True, f"{said['last']['seq']}:{said['last']['hash']}")
    assert say("audit", "verify", "--head", noted, *ledger).code == Exit.OK
    rewrite_the_end(sqlite_url, subject="three")
    assert say("audit", "verify", *ledger).code == Exit.OK

    compared = say("audit", "verify", "--head", noted, *ledger, "--json")

    assert compared.code == Exit.ERROR
    assert json.loads(compared.out)["broken"] == {"seq": 2, "why": "head-mismatch"}


def test_an_export_is_walked_without_the_database(
    say: Say, ledger: tuple[object, ...], model: Path, tmp_path: Path
) -> None:
    """It ends with the event of its own making, whose head is printed; cut short, only the head can tell."""
    say("reference", "add", "one", "--aligned", model, *ledger)
    file = tmp_path / "log.jsonl"
    noted = json.loads(say("audit", "export", "--out", file, *ledger, "--json").out)["head"]
    whole = json.loads(say("audit", "verify", "--file", file, "--json").out)
    assert (whole["ok"], whole["head"], whole["checked"]) == (True, noted, 2)
    lines = file.read_text().splitlines(keepends=True)
    assert json.loads(lines[-1])["action"] == "audit.exported"
    file.write_text("".join(lines[:-1]))
    assert say("audit", "verify", "--file", file).code == Exit.OK
    assert say("audit", "verify", "--file", file, "--head", noted).code == Exit.ERROR
    (tmp_path / "other.jsonl").write_text("[]\n")
    assert say("audit", "verify", "--file", tmp_path / "other.jsonl").err.count("\n") == 1
    # Nothing is written over.
    assert say("audit", "export", "--out", file, *ledger).code == Exit.ERROR
    assert file.read_text() == "".join(lines[:-1])


@pytest.mark.parametrize("head", ["", "1", "1:abc", f"-1:{'0' * 64}", f"1:{'g' * 64}", f"0:{'1' * 64}"])
def test_a_head_that_is_none_is_one_line(say: Say, ledger: tuple[object, ...], head: str) -> None:
    """Before anything is read."""
    said = say("audit", "verify", "--head", head, *ledger)
    assert (said.code, said.err.count("\n")) == (Exit.ERROR, 1)
    assert "SEQ:HASH" in said.err


def rewrite_the_end(url: str, *, subject: str) -> None:
    """As the owner of the database can: the triggers go, the last event is another, and the chain holds again."""
    engine = create_engine(url)
    with engine.begin() as connection:
        for name in connection.scalars(text("SELECT name FROM sqlite_master WHERE type = 'trigger'")).all():
            connection.execute(text(f"DROP TRIGGER {name}"))
        row = dict(connection.execute(select(AuditEvent.__table__).order_by(AuditEvent.seq.desc())).first()._mapping)  # type: ignore[union-attr]
        row["subject_id"] = subject
        forged = link_hash(row["prev_hash"], content(row))
        seq = row["seq"]
        connection.execute(update(AuditEvent).where(AuditEvent.seq == seq).values(subject_id=subject, hash=forged))
        connection.execute(update(AuditHead).values(hash=forged))
    engine.dispose()
