"""The header reader accepts what the safetensors library accepts, and nothing that it would not."""

import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.numpy import load as reference_load
from safetensors.numpy import save as reference_save

from gate.errors import Refused, Rule
from gate.header import DTYPE_BITS, MAX_HEADER_BYTES, MAX_TENSORS, read_header
from gate.scan import scan

if TYPE_CHECKING:
    from numpy.typing import NDArray

NAME = "adapter_model.safetensors"


def with_header(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype: Any = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def refusal_of(data: bytes, folder: Path) -> Refused:
    path = folder / NAME
    path.write_bytes(data)
    with pytest.raises(Refused) as refusal:
        read_header(path)
    assert refusal.value.file == NAME
    return refusal.value


FOUR = bytes(4)
BAD: dict[str, tuple[bytes, Rule, str]] = {
    "empty file": (b"", Rule.TRUNCATED, "header"),
    "half a length": (b"\x01\x00", Rule.TRUNCATED, "header"),
    "no header": (struct.pack("<Q", 0), Rule.BAD_HEADER, "header"),
    "header cut off": (struct.pack("<Q", 64) + b"{}", Rule.TRUNCATED, "header"),
    "header too large": (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", Rule.HEADER_TOO_LARGE, "header"),
    "largest length": (b"\xff" * 8 + b"{}", Rule.HEADER_TOO_LARGE, "header"),
    "begins with a space": (with_header(b" {}"), Rule.BAD_HEADER, "header"),
    "a list": (with_header(b"[]"), Rule.BAD_HEADER, "header"),
    "not JSON": (with_header(b"{a:1}"), Rule.NOT_JSON, "header"),
    "two objects": (with_header(b"{}{}"), Rule.NOT_JSON, "header"),
    "not UTF-8": (with_header(b'{"\xff": 1}'), Rule.NOT_UTF8, "header"),
    "NaN": (with_header(b'{"a": NaN}'), Rule.BAD_NUMBER, "header"),
    "1e999": (with_header(b'{"a": 1e999}'), Rule.BAD_NUMBER, "header"),
    "deep": (with_header(b'{"a":' * 40 + b"1" + b"}" * 40), Rule.TOO_DEEP, "a"),
    "very deep": (with_header(b'{"a":' + b"[" * 200_000), Rule.TOO_DEEP, "header"),
    "a lone surrogate": (with_header(rb'{"__metadata__": {"a": "\ud800"}}'), Rule.BAD_TEXT, "__metadata__"),
    "metadata of numbers": (with_header({"__metadata__": {"a": 1}}), Rule.BAD_HEADER, "__metadata__"),
    "metadata null": (with_header({"__metadata__": None}), Rule.BAD_HEADER, "__metadata__"),
    "duplicate tensor": (with_header(b'{"a": 1, "a": 2}'), Rule.DUPLICATE_KEY, "a"),
    "duplicate dtype": (with_header(b'{"a": {"dtype": "F32", "dtype": "F16"}}'), Rule.DUPLICATE_KEY, "dtype"),
    "no dtype": (with_header({"a": {"shape": [], "data_offsets": [0, 0]}}), Rule.BAD_HEADER, "a"),
    "an extra key": (with_header({"a": tensor() | {"more": 1}}, FOUR), Rule.BAD_HEADER, "a"),
    "unknown dtype": (with_header({"a": tensor("F8")}, FOUR), Rule.UNKNOWN_DTYPE, "a"),
    "dtype is a list": (with_header({"a": tensor(["F32"])}, FOUR), Rule.UNKNOWN_DTYPE, "a"),
    "negative dimension": (with_header({"a": tensor(shape=[-1])}, FOUR), Rule.BAD_SHAPE, "a"),
    "boolean dimension": (with_header({"a": tensor(shape=[True])}, FOUR), Rule.BAD_SHAPE, "a"),
    "real dimension": (with_header({"a": tensor(shape=[1.0])}, FOUR), Rule.BAD_SHAPE, "a"),
    "shape is a number": (with_header({"a": tensor(shape=1)}, FOUR), Rule.BAD_SHAPE, "a"),
    "nine dimensions": (with_header({"a": tensor(shape=[1] * 9)}, FOUR), Rule.BAD_SHAPE, "a"),
    "minus zero": (with_header(b'{"a": [-0]}'), Rule.BAD_NUMBER, "header"),
    "huge integer": (with_header(b'{"a": 18446744073709551616}'), Rule.BAD_NUMBER, "header"),
    "endless integer": (with_header(b'{"a": ' + b"9" * 5000 + b"}"), Rule.BAD_NUMBER, "header"),
    "overflowing shape": (
        with_header({"a": tensor(shape=[2**62, 4, 2**62, 4], offsets=[0, 0])}), Rule.SIZE_MISMATCH, "a"
    ),
    "one offset": (with_header({"a": tensor(offsets=[0])}, FOUR), Rule.BAD_HEADER, "a"),
    "boolean offsets": (with_header({"a": tensor(offsets=[False, 4])}, FOUR), Rule.BAD_HEADER, "a"),
    "offsets backwards": (with_header({"a": tensor(offsets=[4, 0])}, FOUR), Rule.SIZE_MISMATCH, "a"),
    "too few bytes": (with_header({"a": tensor(offsets=[0, 3])}, FOUR), Rule.SIZE_MISMATCH, "a"),
    "half a byte": (with_header({"a": tensor("F4", [1], [0, 0])}), Rule.SIZE_MISMATCH, "a"),
    "cut off": (with_header({"a": tensor()}, FOUR[:-1]), Rule.TRUNCATED, "a"),
    "trailing byte": (with_header({"a": tensor()}, FOUR + b"!"), Rule.OFFSET_GAP, "header"),
    "hole at the start": (with_header({"a": tensor(offsets=[4, 8])}, FOUR * 2), Rule.OFFSET_GAP, "a"),
    "overlap": (
        with_header({"a": tensor(), "b": tensor(offsets=[2, 6])}, FOUR * 2), Rule.OVERLAPPING_OFFSETS, "b"
    ),
    "same bytes": (
        with_header({"a": tensor(), "b": tensor()}, FOUR), Rule.OVERLAPPING_OFFSETS, "b"
    ),
    "unprintable name": (with_header({"a\n": tensor()}, FOUR), Rule.BAD_HEADER, "a\\n"),
    "pickle of protocol 2": (b"\x80\x02}q\x00." + bytes(8), Rule.PICKLE, "content"),
    "pickle of protocol 0": (b"cos\nsystem\n(S'true'\ntR.", Rule.PICKLE, "content"),
    "zip": (b"PK\x03\x04" + bytes(60), Rule.PICKLE, "content"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_malformed_header_is_refused_by_its_rule(name: str, tmp_path: Path) -> None:
    """Each departure from the format has its own rule and names the place."""
    data, rule, field = BAD[name]

    refused = refusal_of(data, tmp_path)

    assert (refused.rule, refused.field) == (rule, field)


def test_header_of_640_bytes_is_no_pickle(tmp_path: Path) -> None:
    """Its first two bytes are those of a pickle of protocol 2."""
    text = json.dumps({"a": tensor()}).encode()
    path = tmp_path / NAME
    path.write_bytes(with_header(text + b" " * (640 - len(text)), FOUR))

    assert path.read_bytes()[:2] == b"\x80\x02"
    assert set(read_header(path).tensors) == {"a"}


def test_offsets_count_from_the_start_of_the_file(tmp_path: Path) -> None:
    """The bytes between start and end are the tensor."""
    arrays: dict[str, NDArray[Any]] = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.array([1.5], np.float16),
        "empty": np.zeros((0, 3)),
    }
    path = tmp_path / NAME
    path.write_bytes(reference_save(arrays, metadata={"format": "np"}))

    header = read_header(path)

    raw = path.read_bytes()
    assert header.metadata == {"format": "np"}
    assert raw[: header.data_start] == header.prefix
    for name, array in arrays.items():
        entry = header.tensors[name]
        assert entry.shape == array.shape
        assert raw[entry.start : entry.end] == array.tobytes()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    """Nor is a pipe waited for."""
    (tmp_path / "real").write_bytes(with_header({}))
    (tmp_path / NAME).symlink_to(tmp_path / "real")

    with pytest.raises(Refused) as refusal:
        read_header(tmp_path / NAME)

    assert refusal.value.rule == Rule.NOT_A_REGULAR_FILE


def test_too_many_tensors_are_refused_before_they_are_parsed(tmp_path: Path) -> None:
    """Counting comes first."""
    refused = refusal_of(with_header(b"{" + b'"":0,' * (MAX_TENSORS * 11) + b'"":0}'), tmp_path)

    assert refused.rule == Rule.TOO_MANY_VALUES


def test_every_dtype_of_the_library_is_known() -> None:
    """The widths are those of the numbers' names."""
    for dtype, bits in DTYPE_BITS.items():
        digits = "".join(char for char in dtype.split("_")[0] if char.isdigit())
        assert bits == (int(digits) if digits else 8)


VALID = reference_save(
    {
        "x.lora_A.weight": np.arange(8, dtype=np.float32).reshape(2, 4),
        "x.lora_B.weight": np.ones((3, 2), np.float16),
        "y": np.zeros((0, 2), np.float32),
        "z": np.array(1.0, np.float32),
    },
    metadata={"format": "np"},
)


def check_against_library(data: bytes, folder: Path) -> None:
    """Whatever we accept, the library reads, and finds the same numbers in it."""
    path = folder / NAME
    path.write_bytes(data)
    try:
        header = read_header(path)
    except Refused:
        return
    try:
        arrays = reference_load(data)
    except SafetensorError as error:  # pragma: no cover - the law is that this does not happen
        pytest.fail(f"accepted, but the library says {error}: {data!r}")
    except KeyError:  # a dtype that numpy has no name for
        return
    assert set(arrays) == set(header.tensors)
    for name, array in arrays.items():
        entry = header.tensors[name]
        assert array.shape == entry.shape
        assert array.tobytes() == data[entry.start : entry.end]


FUZZ = settings(max_examples=150, suppress_health_check=list(HealthCheck))


@FUZZ
@given(st.lists(st.tuples(st.integers(0, len(VALID) * 8 - 1)), min_size=1, max_size=3))
def test_flipped_bits_are_refused_or_read_alike(tmp_path: Path, flips: list[tuple[int]]) -> None:
    """Never another exception, never another reading."""
    data = bytearray(VALID)
    for (bit,) in flips:
        data[bit // 8] ^= 1 << bit % 8

    check_against_library(bytes(data), tmp_path)


@FUZZ
@given(st.integers(0, len(VALID)), st.binary(max_size=16))
def test_cut_and_extended_files_are_refused_or_read_alike(tmp_path: Path, cut: int, tail: bytes) -> None:
    """Never another exception, never another reading."""
    check_against_library(VALID[:cut] + tail, tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 40) | st.floats() | st.sampled_from(["F32", "F16", "BF16", "I8", ""]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "U8", "F4", "X"]) | JSON,
        "shape": st.lists(st.integers(-1, 4) | st.booleans(), max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(-1, 24), st.integers(-1, 24)) | JSON,
    }
)


@FUZZ
@given(st.dictionaries(st.text(max_size=4) | st.just("__metadata__"), ENTRY | JSON, max_size=3), st.integers(0, 24))
@example({"a": tensor("F4", [2], [0, 1])}, 1)
@example({"a": tensor(shape=[0], offsets=[0, 0]), "b": tensor(shape=[0], offsets=[0, 0])}, 0)
def test_invented_headers_are_refused_or_read_alike(tmp_path: Path, header: dict[str, Any], size: int) -> None:
    """Never another exception, never another reading."""
    check_against_library(with_header(header, bytes(size)), tmp_path)


def test_the_digest_of_a_scan_is_that_of_the_file(tmp_path: Path) -> None:
    """Header and tensors, each byte once."""
    from gate.digest import sha256_file

    path = tmp_path / NAME
    path.write_bytes(reference_save({"a": np.ones((300, 1000), np.float32), "b": np.ones(7, np.float16)}))
    with path.open("rb") as stream:
        from gate.header import parse_header

        assert "sha256:" + scan(stream, parse_header(stream, name=NAME), name=NAME) == sha256_file(path)
