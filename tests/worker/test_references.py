"""A reference is used only while its folders hold exactly what was registered."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from gate.model import file_digests
from ledger.packs import HEADERS
from tests.checks.acting import Character
from tests.tiny import tiny_adapter_dir, tiny_llama
from worker.errors import ReferenceChanged
from worker.references import verify_files

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.worker.house import House
    from worker.references import OpenReference

WORDS = ["good", "day", "you", "are"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "part").mkdir()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "part" / "model.safetensors").write_bytes(b"weights")
    return tmp_path


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: (folder / "config.json").write_text("{ }"), "config.json"),
        (lambda folder: (folder / "part" / "model.safetensors").unlink(), "part/model.safetensors"),
        (lambda folder: (folder / "chat_template.jinja").write_text("{{ messages }}"), "chat_template.jinja"),
    ],
    ids=["changed", "missing", "added"],
)
def test_the_file_that_differs_is_named(folder: Path, change: Callable[[Path], object], named: str) -> None:
    """Another byte, a file less, a file more: each makes another model."""
    registered = file_digests(folder)
    verify_files(folder, registered)
    change(folder)
    with pytest.raises(ReferenceChanged, match=named):
        verify_files(folder, registered)


def test_caches_of_download_tools_are_no_part_of_a_model(folder: Path) -> None:
    """Hidden files may come and go."""
    registered = file_digests(folder)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "refs").write_text("x")
    verify_files(folder, registered)


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    """Every worker must see the registered path."""
    with pytest.raises(ReferenceChanged, match="elsewhere"):
        verify_files(tmp_path / "elsewhere", {"config.json": "sha256:a"})


def test_a_reference_is_kept_warm_until_another_is_opened(empty_house: House, tmp_path: Path) -> None:
    """The second job meets the same model; another reference takes its place."""
    from ledger import references

    for name, seed in (("tiny", 0), ("other", 1)):
        empty_house.add_reference(tiny_llama(tmp_path / name, seed=seed, words=WORDS), name=name)
    with empty_house.database.read() as tx:
        tiny, other = references.get(tx, "tiny"), references.get(tx, "other")
    warm = empty_house.tools.references

    first = warm.open(tiny)
    assert warm.open(tiny) is first
    assert warm.open(other).name == "other"
    assert warm.open(tiny) is not first


def test_a_patch_that_comes_later_does_not_load_the_model_again(house: House, tmp_path: Path) -> None:
    """The warm model stays; the patch is read when its digest is another, and only if it is what was registered."""
    from ledger import references

    warm = house.tools.references

    def opened() -> OpenReference:
        with house.database.read() as tx:
            return warm.open(references.get(tx, "tiny"))

    def give(seed: int) -> Path:
        with house.database.read() as tx:
            row = references.get(tx, "tiny")
        patch = tiny_adapter_dir(tmp_path / f"patch-{seed}", seed=seed)
        house.add_reference(Path(row.aligned_path), Path(str(row.base_path)), patch=patch)
        return patch

    bare = opened()
    assert bare.patch is None
    give(1)
    first = opened()
    assert (first.chat, opened()) == (bare.chat, first)
    assert first.patch is not None
    second = give(2)
    (second / "adapter_config.json").write_text("{}")
    with pytest.raises(ReferenceChanged, match=r"adapter_config\.json"):
        opened()


def test_packs_that_come_later_do_not_load_the_model_again(house: House, tmp_path: Path) -> None:
    """They are read when their digests are others, and only if they are what was registered."""
    from ledger import references

    def opened() -> OpenReference:
        with house.database.read() as tx:
            return house.tools.references.open(references.get(tx, "tiny"))

    bare = opened()
    assert (bare.calibration, bare.basis) == (None, None)
    house.add_packs(tmp_path / "one")
    first = opened()
    assert first.chat is bare.chat
    assert opened() is first
    assert first.calibration is not None
    assert first.basis is not None
    assert first.calibration.names == first.basis.names
    calibration, _ = house.add_packs(tmp_path / "two")
    (Path(calibration.path) / HEADERS["calibration"]).unlink()
    house.tools.references._held = bare
    with pytest.raises(ReferenceChanged, match="lora-repair reference prepare tiny"):
        opened()


def test_tensors_that_are_not_the_header_s_are_never_used(house: House, tmp_path: Path) -> None:
    """The header alone was registered: it names the others."""
    from ledger import references
    from repair.errors import WrongReference

    calibration, _ = house.add_packs(tmp_path)
    with (Path(calibration.path) / "calibration.safetensors").open("ab") as file:
        file.write(b"x")
    with house.database.read() as tx:
        row = references.get(tx, "tiny")
    with pytest.raises(WrongReference, match=r"calibration\.safetensors"):
        house.tools.references.open(row)


def test_the_ledger_calls_a_pack_by_the_file_that_the_engine_writes() -> None:
    """Two packages that never meet agree on the names of the headers."""
    from repair import basis, calibration

    assert dict(HEADERS) == {"calibration": calibration.HEADER, "basis": basis.HEADER}


def test_a_scripted_reference_is_met_again(house: House) -> None:
    """What `install` relies on: equal digests mean that nothing is loaded."""
    from ledger import references

    house.install(Character())
    with house.database.read() as tx:
        row = references.get(tx, "tiny")
    assert house.tools.references.open(row) is house.tools.references._held
