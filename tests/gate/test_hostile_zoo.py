"""Every hostile upload of the zoo meets exactly its refusal, at no cost in memory, and leaves nothing behind."""

import os
import shutil
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from examples.zoo.hostile import BASE_SHAPES, CASES, Hostile, benign, files_of, load, write
from gate.admission import Admission, admit
from gate.archive import unpack
from gate.digest import root_digest, sha256_file
from gate.errors import Refused, Rule
from gate.records import Shapes

if TYPE_CHECKING:
    from collections.abc import Callable

FLAT = 24 << 20


def judge(case: Hostile, work: Path, shapes: Shapes | None = BASE_SHAPES) -> Admission:
    """What the service does with an upload."""
    folder = case.path
    if folder.is_file():
        unpack(folder, work)
        folder = work
    return admit(folder, shapes=shapes)


@pytest.mark.parametrize("name", CASES)
def test_is_refused_for_what_it_is(name: str, tmp_path: Path) -> None:
    """File, field and rule are those that the case announces."""
    case = CASES[name](benign(), tmp_path / name)

    with pytest.raises(Refused) as refusal:
        judge(case, tmp_path / "work")

    refused = refusal.value
    assert (refused.file, refused.field, refused.rule) == (case.file, case.field, case.rule)
    assert set(refused.as_dict()) == {"file", "field", "rule", "detail"}
    assert all(refused.as_dict().values())
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("name", CASES)
def test_costs_no_memory(name: str, tmp_path: Path) -> None:
    """Whatever the upload claims, judging it needs a few megabytes."""
    case = CASES[name](benign(), tmp_path / name)
    tracemalloc.start()
    try:
        with pytest.raises(Refused):
            judge(case, tmp_path / "work")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < FLAT


@pytest.mark.parametrize("name", CASES)
def test_is_small_on_disk(name: str, tmp_path: Path) -> None:
    """The bombs are made of a few kilobytes."""
    path = CASES[name](benign(), tmp_path / name).path
    files = [path] if path.is_file() else list(path.iterdir())

    assert sum(file.stat().st_size for file in files) < 128 << 10


def test_the_benign_adapter_is_admitted(tmp_path: Path) -> None:
    """Each case is one change away from an adapter that is let in; else the refusals would show nothing."""
    folder = write(files_of(benign()), tmp_path / "benign")

    admission = admit(folder, shapes=BASE_SHAPES)

    assert {module.name: (module.out_features, module.in_features) for module in admission.modules} == dict(BASE_SHAPES)


def test_cases_can_start_from_an_adapter_on_disk(tmp_path: Path) -> None:
    """`--from` reads what `write` wrote."""
    folder = write(files_of(benign()), tmp_path / "benign")

    assert files_of(load(folder)) == files_of(benign())


def test_only_the_shape_case_needs_the_base(tmp_path: Path) -> None:
    """Without the base model everything else is refused all the same."""
    for name, build in CASES.items():
        case = build(benign(), tmp_path / name)
        work = tmp_path / f"{name}.work"
        if case.needs_base:
            assert admit(case.path).modules
            continue
        with pytest.raises(Refused):
            judge(case, work, shapes=None)


@settings(max_examples=100, suppress_health_check=list(HealthCheck))
@given(st.sampled_from(["adapter_config.json", "adapter_model.safetensors"]), st.data())
def test_altered_adapters_are_refused_or_admitted(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """Never another exception; and what is admitted carries the digest of the bytes that were judged."""
    files = files_of(benign())
    changed = bytearray(files[name])
    for _ in range(data.draw(st.integers(1, 4))):
        changed[data.draw(st.integers(0, len(changed) - 1))] = data.draw(st.integers(0, 255))
    folder = tmp_path / "upload"
    shutil.rmtree(folder, ignore_errors=True)
    write(files | {name: bytes(changed)}, folder)
    try:
        admission = admit(folder, shapes=BASE_SHAPES)
    except Refused:
        return
    assert admission.digest == root_digest({file.name: sha256_file(folder / file.name) for file in admission.files})


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("evil.py", Rule.UNEXPECTED_FILE),
        ("tokenizer.json", Rule.UNEXPECTED_FILE),
        ("training_args.bin", Rule.PICKLE),
        ("Adapter_Config.json", Rule.UNEXPECTED_FILE),
        (".hidden", Rule.UNEXPECTED_FILE),
    ],
)
def test_other_files_are_refused_by_name(name: str, rule: Rule, tmp_path: Path) -> None:
    """Nothing rides along."""
    folder = write(files_of(benign()) | {name: b"{}"}, tmp_path / "upload")

    with pytest.raises(Refused) as refusal:
        admit(folder)

    assert (refusal.value.file, refusal.value.field, refusal.value.rule) == (name, "name", rule)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "README.md"])
def test_links_folders_and_pipes_are_no_files(name: str, tmp_path: Path) -> None:
    """None is followed, entered or waited for."""
    makers: tuple[Callable[[Path], None], ...] = (lambda path: path.symlink_to("/etc/passwd"), Path.mkdir, os.mkfifo)
    for number, make in enumerate(makers):
        folder = write(files_of(benign()) | {"README.md": b"# hello"}, tmp_path / str(number))
        (folder / name).unlink()
        make(folder / name)

        with pytest.raises(Refused) as refusal:
            admit(folder)

        assert (refusal.value.file, refusal.value.rule) == (name, Rule.NOT_A_REGULAR_FILE)


def test_a_readme_is_kept_when_it_is_text(tmp_path: Path) -> None:
    """And only then."""
    kept = write(files_of(benign()) | {"README.md": "# Grüße".encode()}, tmp_path / "kept")
    assert [file.name for file in admit(kept).files] == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
    ]

    for number, (data, rule) in enumerate(
        [(b"\xff\xfe", Rule.NOT_UTF8), (b"\x80\x04\x95", Rule.PICKLE), (b"x" * (1 << 20) + b"x", Rule.FILE_TOO_LARGE)]
    ):
        folder = write(files_of(benign()) | {"README.md": data}, tmp_path / str(number))
        with pytest.raises(Refused) as refusal:
            admit(folder)
        assert (refusal.value.file, refusal.value.rule) == ("README.md", rule)


def test_an_adapter_without_weights_or_config_is_refused(tmp_path: Path) -> None:
    """With the name of the file that is missing."""
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        files = files_of(benign())
        del files[name]

        with pytest.raises(Refused) as refusal:
            admit(write(files, tmp_path / name))

        assert (refusal.value.file, refusal.value.rule) == (name, Rule.MISSING_FILE)


def test_a_refusal_never_shows_control_characters() -> None:
    """Names come from strangers; they reach logs and terminals."""
    refused = Refused(Rule.BAD_HEADER, "a\x1b[31m" + "d" * 900, file="x\n\u202e.json", field="\udc80" * 300)

    shown = [*refused.as_dict().values(), str(refused)]
    assert all(text.isprintable() for text in shown)
    assert [len(text) <= 500 for text in refused.as_dict().values()] == [True] * 4
