"""Packs are pinned, whole, disjoint in their halves, and asked in a recorded order."""

import json
from collections import Counter
from pathlib import Path

import pytest

from repair.checks.errors import PackChanged, PackMissing
from repair.checks.packs import BUNDLED, half_of, load_pack, manifest_of, ordered

NAMES = ["core_harmful", "core_lookalike", "core_benign", "core_checkable"]
LEAST = {"core_harmful": 200, "core_lookalike": 200, "core_benign": 100, "core_checkable": 60}


ALL = sorted(path.parent.name for path in BUNDLED.glob("*/rows.jsonl"))


@pytest.mark.parametrize("name", ALL)
def test_the_manifest_is_fresh(name: str) -> None:
    """`python -m repair.checks.packs` would change nothing."""
    folder = BUNDLED / name
    assert (folder / "manifest.toml").read_text() == manifest_of(name, (folder / "rows.jsonl").read_bytes())


@pytest.mark.parametrize("name", NAMES)
def test_a_pack_is_large_free_and_holds_no_answers_to_harm(name: str) -> None:
    """Only checkable questions carry answers; every row has words and a category."""
    pack = load_pack(name)
    assert len(pack.rows) >= LEAST[name]
    assert pack.licence == "CC0-1.0"
    assert all(bool(row.answers) == (name == "core_checkable") for row in pack.rows)
    keys = {key for line in (BUNDLED / name / "rows.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert keys <= {"id", "text", "category", "answers"}
    assert all(row.text.strip() and row.category for row in pack.rows)


def test_no_prompt_stands_in_two_packs_or_twice() -> None:
    """A prompt that was used to choose must not certify under another id."""
    texts = Counter(" ".join(row.text.lower().split()) for name in ALL for row in load_pack(name).rows)
    assert [text for text, count in texts.items() if count > 1] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_halves_share_nothing_and_leave_nothing(name: str) -> None:
    """Every row is in one half, by its id alone."""
    pack = load_pack(name)
    select, certify = pack.of_half("select"), pack.of_half("certify")
    assert {row.id for row in select}.isdisjoint(row.id for row in certify)
    assert len(select) + len(certify) == len(pack.rows)
    assert min(len(select), len(certify)) > 0.4 * len(pack.rows)


def test_a_rows_half_is_fixed_for_ever() -> None:
    """These ids were dealt once; a change would mix what chose with what certifies."""
    assert [half_of(f"harm-{n:03d}") for n in (1, 2, 3, 4, 5, 6)] == [
        "certify",
        "select",
        "select",
        "select",
        "select",
        "select",
    ]


def test_every_prefix_of_the_order_holds_the_categories_in_equal_parts() -> None:
    """An early stop must not have seen one hazard only."""
    rows = ordered(load_pack("core_harmful").rows, seed=5)
    for size in (12, 48, 120):
        counts = Counter(row.category for row in rows[:size])
        assert max(counts.values()) - min(counts.values()) <= 1
    assert rows == ordered(reversed(rows), seed=5)
    assert rows != ordered(rows, seed=6)


def renamed(name: str, into: Path) -> Path:
    """A bundled pack under another name: an operator's."""
    folder = into / name
    folder.mkdir()
    manifest = (BUNDLED / "core_benign" / "manifest.toml").read_text()
    (folder / "manifest.toml").write_text(manifest.replace('id = "core_benign"', f'id = "{name}"'))
    (folder / "rows.jsonl").write_bytes((BUNDLED / "core_benign" / "rows.jsonl").read_bytes())
    return folder


def test_changed_rows_are_refused(tmp_path: Path) -> None:
    """One byte is enough."""
    folder = renamed("mine", tmp_path)
    assert load_pack("mine", home=tmp_path).digest == load_pack("core_benign").digest
    with (folder / "rows.jsonl").open("ab") as file:
        file.write(b"\n")
    with pytest.raises(PackChanged, match=r"rows\.jsonl"):
        load_pack("mine", home=tmp_path)


def test_a_bundled_pack_cannot_be_put_aside(tmp_path: Path) -> None:
    """Whatever lies in the operator's folder under its name."""
    renamed("core_harmful", tmp_path)
    assert load_pack("core_harmful", home=tmp_path).digest == load_pack("core_harmful").digest


def test_a_missing_pack_is_an_error_by_name() -> None:
    """Never an empty list of prompts."""
    with pytest.raises(PackMissing, match="xstest"):
        load_pack("xstest")


def test_every_hazard_has_as_many_safe_lookalikes() -> None:
    """Balanced by category; which look-alike belongs to which harmful prompt is not claimed."""
    harmful, safe = (Counter(row.category for row in load_pack(name).rows) for name in NAMES[:2])
    assert harmful == safe
    assert set(harmful.values()) == {18}
