"""Archives: what unpacks to an adapter is unpacked, everything else leaves nothing behind."""

import gzip
import io
import shutil
import stat
import struct
import tarfile
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from examples.zoo.hostile import benign, files_of
from gate.archive import DEFAULT_LIMITS, Limits, is_archive, unpack
from gate.errors import Refused, Rule

FILES = files_of(benign())
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def zipped(members: dict[str, bytes], change: Callable[[zipfile.ZipInfo], None] | None = None) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            if change:
                change(info)
            archive.writestr(info, data)
    return out.getvalue()


def tarred(
    members: dict[str, bytes], *, mode: str = "w", change: Callable[[tarfile.TarInfo], None] | None = None,
    form: int = tarfile.PAX_FORMAT,
) -> bytes:  # fmt: skip
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=form) as archive:  # type: ignore[call-overload]
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            info.mtime = 1.5  # what `tar.add` writes: an extended header for the fraction
            if change:
                change(info)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def refusal(folder: Path, data: bytes, limits: Limits = DEFAULT_LIMITS) -> Refused:
    path = folder / "upload.bin"
    path.write_bytes(data)
    with pytest.raises(Refused) as refused:
        unpack(path, folder / "into", limits)
    assert not (folder / "into").exists()
    assert refused.value.file == "upload.bin"
    return refused.value


GOOD = {
    "zip": zipped(FILES),
    "tar": tarred(FILES),
    "tar.gz": tarred(FILES, mode="w:gz"),
    "gnu tar": tarred(FILES, form=tarfile.GNU_FORMAT),
    "ustar": tarred(FILES, form=tarfile.USTAR_FORMAT),
    "dotted": tarred({f"./{name}": data for name, data in FILES.items()}),
    "in a folder": zipped({f"my-adapter/{name}": data for name, data in FILES.items()}),
    "in a folder, tar": tarred({f"my-adapter/{name}": data for name, data in FILES.items()}, mode="w:gz"),
    "with its folder": zipped({"my/": b""} | {f"my/{name}": data for name, data in FILES.items()}),
}


@pytest.mark.parametrize("name", GOOD)
def test_an_adapter_is_unpacked_byte_by_byte(name: str, tmp_path: Path) -> None:
    """Whatever common tool packed it."""
    path = tmp_path / "upload"
    path.write_bytes(GOOD[name])
    assert is_archive(GOOD[name][:512])

    unpack(path, tmp_path / "into")

    assert {file.name: file.read_bytes() for file in (tmp_path / "into").iterdir()} == FILES


def test_what_is_there_is_never_overwritten(tmp_path: Path) -> None:
    """The folder must be empty."""
    (tmp_path / "into").mkdir()
    (tmp_path / "into" / "mine").write_text("x")
    (tmp_path / "upload").write_bytes(GOOD["zip"])

    with pytest.raises(FileExistsError):
        unpack(tmp_path / "upload", tmp_path / "into")
    assert (tmp_path / "into" / "mine").read_text() == "x"


NAMES = {
    "/etc/passwd": Rule.UNSAFE_PATH,
    "../x": Rule.UNSAFE_PATH,
    "a/../../x": Rule.UNSAFE_PATH,
    "a/..": Rule.UNSAFE_PATH,
    "..": Rule.UNSAFE_PATH,
    "C:\\x": Rule.UNSAFE_PATH,
    "..\\x": Rule.UNSAFE_PATH,
    "a:b": Rule.UNSAFE_PATH,
    "x\ny": Rule.UNSAFE_PATH,
    "evil.py": Rule.UNEXPECTED_FILE,
    "Readme.MD": Rule.UNEXPECTED_FILE,
    "Adapter_Config.json": Rule.DUPLICATE_MEMBER,
    "a/b/adapter_config.json": Rule.UNEXPECTED_FILE,
    "__MACOSX/._adapter_config.json": Rule.UNEXPECTED_FILE,
    "adapter_model.bin": Rule.PICKLE,
    "optimizer.PT": Rule.PICKLE,
    "more.zip": Rule.NESTED_ARCHIVE,
    "more.tar.gz": Rule.NESTED_ARCHIVE,
    "adapter_model.safetensors.gz": Rule.NESTED_ARCHIVE,
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pack", [zipped, tarred], ids=["zip", "tar"])
def test_names_that_no_adapter_has_are_refused(pack: Callable[..., bytes], name: str, tmp_path: Path) -> None:
    """Before anything is written under them."""
    refused = refusal(tmp_path, pack({CONFIG: b"{}", name: b"x"}))

    assert refused.rule == NAMES[name]


@pytest.mark.parametrize("second", [CONFIG, "ADAPTER_CONFIG.JSON", f"./{CONFIG}"])
def test_two_members_of_one_name_are_refused(second: str, tmp_path: Path) -> None:
    """On a system that ignores case, the second would replace the first after it was judged."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in (CONFIG, second):
            info = tarfile.TarInfo(name)
            info.size = 2
            archive.addfile(info, io.BytesIO(b"{}"))

    assert refusal(tmp_path, out.getvalue()).rule == Rule.DUPLICATE_MEMBER


def test_zip_with_two_members_of_one_name_is_refused(tmp_path: Path) -> None:
    """The same for zip, where readers differ in which one they take."""
    data = zipped({CONFIG: b"{}", CONFIG[:-1] + "N": b"[]"})
    data = data.replace((CONFIG[:-1] + "N").encode(), CONFIG.encode())

    assert refusal(tmp_path, data).rule == Rule.DUPLICATE_MEMBER


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        (tarfile.SYMTYPE, Rule.LINK_IN_ARCHIVE),
        (tarfile.LNKTYPE, Rule.LINK_IN_ARCHIVE),
        (tarfile.CHRTYPE, Rule.DEVICE_IN_ARCHIVE),
        (tarfile.BLKTYPE, Rule.DEVICE_IN_ARCHIVE),
        (tarfile.FIFOTYPE, Rule.DEVICE_IN_ARCHIVE),
        (tarfile.CONTTYPE, Rule.BAD_ARCHIVE),
        (tarfile.GNUTYPE_SPARSE, Rule.BAD_ARCHIVE),
        (tarfile.GNUTYPE_LONGNAME, Rule.BAD_ARCHIVE),
        (b"?", Rule.BAD_ARCHIVE),
    ],
)
def test_special_tar_members_are_refused(kind: bytes, rule: Rule, tmp_path: Path) -> None:
    """Only files and folders."""

    def change(info: tarfile.TarInfo) -> None:
        info.type, info.linkname = kind, "/etc/passwd"

    assert refusal(tmp_path, tarred({CONFIG: b""}, change=change)).rule == rule


@pytest.mark.parametrize(
    ("mode", "rule"),
    [
        (stat.S_IFLNK, Rule.LINK_IN_ARCHIVE),
        (stat.S_IFCHR, Rule.DEVICE_IN_ARCHIVE),
        (stat.S_IFIFO, Rule.DEVICE_IN_ARCHIVE),
    ],
)
def test_special_zip_members_are_refused(mode: int, rule: Rule, tmp_path: Path) -> None:
    """A zip can hold them too."""

    def change(info: zipfile.ZipInfo) -> None:
        info.external_attr = (mode | 0o777) << 16

    assert refusal(tmp_path, zipped({CONFIG: b"/etc/passwd"}, change)).rule == rule


def test_extended_headers_that_rename_are_refused(tmp_path: Path) -> None:
    """Another reader would follow them."""

    def change(info: tarfile.TarInfo) -> None:
        info.pax_headers = {"path": "../../x"}

    assert refusal(tmp_path, tarred({CONFIG: b"{}"}, change=change)).rule in {Rule.BAD_ARCHIVE, Rule.UNSAFE_PATH}
    long = tarred({"a" * 150 + ".json": b"{}"})
    assert refusal(tmp_path, long).rule == Rule.BAD_ARCHIVE


def test_a_huge_extended_header_is_not_read(tmp_path: Path) -> None:
    """Python's own reader would take it into memory as a whole."""
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, 1 << 32
    data = gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + bytes(32 << 20))
    tracemalloc.start()
    try:
        assert refusal(tmp_path, data).rule == Rule.BAD_ARCHIVE
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 << 20


def test_too_many_members_are_refused(tmp_path: Path) -> None:
    """Folders count; a tar made of headers alone too."""
    many = {f"d{number}/": b"" for number in range(40)}
    assert refusal(tmp_path, zipped(many)).rule == Rule.TOO_MANY_MEMBERS
    assert refusal(tmp_path, tarred({"d/": b"", **{f"./{'x' * i}/": b"" for i in range(1, 40)}})).rule in {
        Rule.TOO_MANY_MEMBERS, Rule.UNEXPECTED_FILE
    }  # fmt: skip
    headers = tarfile.TarInfo("x")
    headers.type = tarfile.XHDTYPE
    assert refusal(tmp_path, headers.tobuf(tarfile.USTAR_FORMAT) * 200).rule == Rule.TOO_MANY_MEMBERS


@pytest.mark.parametrize("pack", ["zip", "tar", "tar.gz"])
def test_more_bytes_than_allowed_are_refused(pack: str, tmp_path: Path) -> None:
    """The budget is for all members together."""
    refused = refusal(tmp_path, GOOD[pack], Limits(total_bytes=len(FILES[WEIGHTS])))

    assert refused.rule == Rule.ARCHIVE_TOO_LARGE


@pytest.mark.parametrize("pack", [zipped, lambda files: tarred(files, mode="w:gz")], ids=["zip", "tar.gz"])
def test_short_text_may_compress_well(pack: Callable[..., bytes], tmp_path: Path) -> None:
    """The ratio counts from a megabyte on: zeros in a small adapter are no bomb."""
    assert refusal(tmp_path, pack({CONFIG: b" " * (2 << 20)})).rule == Rule.ARCHIVE_BOMB
    (tmp_path / "upload").write_bytes(pack({CONFIG: b" " * (900 << 10)}))

    unpack(tmp_path / "upload", tmp_path / "into")

    assert (tmp_path / "into" / CONFIG).stat().st_size == 900 << 10


def test_a_zip_whose_members_share_bytes_is_refused(tmp_path: Path) -> None:
    """The directory names one piece of data twice."""
    data = bytearray(zipped({CONFIG: b"{}" * 50, WEIGHTS: b"x" * 100}))
    directory = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", directory + 4)
    struct.pack_into("<L", data, second + 42, 0)

    assert refusal(tmp_path, bytes(data)).rule == Rule.ARCHIVE_BOMB


@pytest.mark.parametrize(
    "data",
    [
        b"", b"PK", b"\x1f\x8b", b"hello" * 200, GOOD["zip"][:-1], GOOD["zip"] + b"x", b"x" + GOOD["zip"],
        GOOD["tar"][:600], GOOD["tar.gz"][:-9], GOOD["tar.gz"] + b"x", GOOD["tar.gz"] * 2, GOOD["tar"] + b"x" * 512,
        GOOD["zip"][:30] + b"!" + GOOD["zip"][31:], b"BZh91AY&SY" + bytes(600),
    ],
    ids=range(14),
)  # fmt: skip
def test_damaged_archives_are_refused(data: bytes, tmp_path: Path) -> None:
    """Cut, extended, prefixed, doubled, altered, or of a kind that we do not read."""
    assert refusal(tmp_path, data).rule == Rule.BAD_ARCHIVE


FUZZ = settings(max_examples=150, suppress_health_check=list(HealthCheck))


@FUZZ
@given(st.sampled_from(["zip", "tar", "tar.gz"]), st.data())
def test_altered_archives_are_refused_or_hold_an_adapter(tmp_path: Path, name: str, data: st.DataObject) -> None:
    """Never another exception; and only allowed names ever appear."""
    packed = bytearray(GOOD[name])
    for _ in range(data.draw(st.integers(1, 3))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "upload").write_bytes(bytes(packed))
    into = tmp_path / "into"
    shutil.rmtree(into, ignore_errors=True)
    try:
        unpack(tmp_path / "upload", into)
    except Refused:
        assert not into.exists()
    else:
        assert {file.name for file in into.iterdir()} <= {CONFIG, WEIGHTS, "README.md"}
