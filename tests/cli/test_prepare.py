"""`lora-repair reference prepare` on a tiny pair: packs that are made once, found again, and written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cli.errors import Exit
from gate.digest import sha256_file
from tests import tiny

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cli.conftest import Said

    Say = Callable[..., Said]

WORDS = "how do I a the to make help me write with your you for is of i'm can't sorry, but that".split()  # noqa: SIM905


@pytest.fixture
def ledger(sqlite_url: str, tmp_path: Path) -> tuple[object, ...]:
    return "--data-dir", tmp_path / "data", "--database", sqlite_url


def test_packs_are_made_once_and_written_down(say: Say, ledger: tuple[object, ...], tmp_path: Path) -> None:
    """Both where there is a base, one where there is none; the second time nothing is made again."""
    pair = [tiny.tiny_llama(tmp_path / name, seed=at, words=WORDS) for at, name in enumerate(("aligned", "base"))]
    say("reference", "add", "pair", "--aligned", pair[0], "--base", pair[1], *ledger)
    say("reference", "add", "alone", "--aligned", pair[0], *ledger)
    prepare = ("reference", "prepare", "pair", "--device", "cpu", *ledger, "--json")

    first = say(*prepare)
    assert first.code == Exit.OK, first.err
    made = json.loads(first.out)
    for kind, header in (("calibration", "calibration.json"), ("basis", "basis.json")):
        folder = Path(made[kind]["path"])
        assert folder.parent == tmp_path / "data" / "packs" / kind
        assert made[kind]["digest"] == sha256_file(folder / header)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "data" / "packs").rglob("*") if path.is_file()}

    assert json.loads(say(*prepare).out) == made
    alone = json.loads(say("reference", "prepare", "alone", "--device", "cpu", *ledger, "--json").out)
    assert (alone["calibration"], "basis" in alone) == (made["calibration"], False)
    assert "base model" in alone["note"]
    assert {path: path.stat().st_mtime_ns for path in written} == written

    (pair[0] / "config.json").write_text((pair[0] / "config.json").read_text() + " ")
    changed = say(*prepare)
    assert changed.code == Exit.ERROR
    assert "no longer what was registered" in changed.err
    (pair[0] / "model.safetensors").unlink()
    assert "was not made" in say(*prepare).err
    assert say("reference", "prepare", "nobody", *ledger).code == Exit.ERROR
