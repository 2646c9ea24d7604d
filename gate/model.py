"""What a base checkpoint contains, from its headers alone: shapes for the gate, digests for the record.

A checkpoint is the operator's own; it is read with the same strict reader all the same. No weight is loaded.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from gate.digest import sha256_file
from gate.errors import Refused, Rule
from gate.files import read_small
from gate.header import TensorEntry, read_header
from gate.scan import FORMATS
from gate.strict_json import JsonText, parse_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
CONFIG: Final = "config.json"
MAX_CONFIG_BYTES = 4 << 20
MAX_INDEX_BYTES = 32 << 20
MAX_INDEX_VALUES = 1 << 20
_SUFFIX = ".weight"
_MATRIX = 2
_EXPERTS = 3
_FLOATS = frozenset({*FORMATS, "F64"})
# Whoever writes rounded weights says so under one of these; where nobody does, the tensors themselves tell.
_ROUNDING = ("quantization_config", "compression_config")
_ORIGINAL: Final = (
    "what rounding changed is as large as what alignment changed. Give the 16 bit original that it was made from; "
    "adapters that were trained on the rounded copy are repaired against that original"
)


def model_shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    """Every matrix of the checkpoint: module path (without ``.weight``) to its two dimensions as stored.

    For a linear that is (out, in); for GPT-2's Conv1D (in, out); for an embedding (vocabulary, dim). Parameters with
    three dimensions, which hold one matrix for each expert, stand there with all three.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for shard, named in _shards(directory).items():
        header = read_header(directory / shard, name=shard)
        for missing in (name for name in named if name not in header.tensors):
            raise Refused(Rule.MISSING_TENSOR, f"the index says it is in {shard}", file=shard, field=missing)
        for key, entry in header.tensors.items():
            module = key.removesuffix(_SUFFIX)
            if len(entry.shape) != _EXPERTS and (module == key or len(entry.shape) != _MATRIX):
                continue
            if module in shapes:
                raise Refused(Rule.DUPLICATE_KEY, "the tensor is in two shards", file=shard, field=key)
            shapes[module] = tuple(entry.shape)
    return shapes


def require_unrounded(directory: Path) -> None:
    """Raise Refused, with what to give instead, for a model whose weights are rounded to a few bits.

    Asks the config and the header of each file.
    """
    require_none_said(directory)
    for shard in _shards(directory):
        for key, entry in read_header(directory / shard, name=shard).tensors.items():
            if _is_rounded(key, entry):
                raise Refused(Rule.QUANTISED, f"{entry.dtype} is quantised: {_ORIGINAL}", file=shard, field=key)


def require_none_said(directory: Path) -> None:
    """The same of the config alone, without opening a file of weights.

    A config that is no JSON is left to whoever loads the model.
    """
    for field, how in _said_rounded(directory):
        method = how.get("quant_method") if isinstance(how, dict) else None
        detail = f"the weights are quantised ({method or 'it says'}): {_ORIGINAL}"
        raise Refused(Rule.QUANTISED, detail, file=CONFIG, field=field)


def _said_rounded(directory: Path) -> Iterator[tuple[str, object]]:
    if not (directory / CONFIG).is_file():
        return
    try:
        config = json.loads(read_small(directory / CONFIG, limit=MAX_CONFIG_BYTES))
    except ValueError:
        return
    if isinstance(config, dict):
        yield from ((field, config[field]) for field in _ROUNDING if config.get(field))


def _is_rounded(key: str, entry: TensorEntry) -> bool:
    """A weight in whole numbers or 8 bit floats; masks and positions are no weights."""
    holds = key.endswith((_SUFFIX, "qweight", "_blocks")) or len(entry.shape) == _EXPERTS
    return holds and len(entry.shape) >= _MATRIX and entry.dtype not in _FLOATS


def file_digests(directory: Path) -> dict[str, str]:
    """``sha256:<hex>`` of every file of the checkpoint, by its path below `directory`, in the order of names.

    Hidden files and folders are caches of download tools, not the model.
    """
    found: dict[str, str] = {}
    for path in sorted(directory.rglob("*")):
        relative = path.relative_to(directory)
        if path.is_file() and not any(part.startswith(".") for part in relative.parts):
            found[relative.as_posix()] = sha256_file(path)
    if not found:
        raise Refused(Rule.MISSING_FILE, "no file in this folder", file=directory.name, field="name")
    return dict(sorted(found.items()))


def _shards(directory: Path) -> Mapping[str, list[str]]:
    """The weight files, each with the tensors that the index expects in it."""
    if not (directory / INDEX).exists():
        return {SINGLE: []}
    data = read_small(directory / INDEX, limit=MAX_INDEX_BYTES)
    index = parse_object(JsonText(data=data, file=INDEX, max_values=MAX_INDEX_VALUES)).get("weight_map")
    if not isinstance(index, dict) or not index:
        raise Refused(Rule.MISSING_KEY, "no map of tensors to files", file=INDEX, field="weight_map")
    shards: dict[str, list[str]] = {}
    for tensor, shard in index.items():
        if not isinstance(shard, str) or not shard or Path(shard).name != shard or shard.startswith("."):
            raise Refused(Rule.UNSAFE_PATH, "a shard lies beside its index", file=INDEX, field=tensor)
        shards.setdefault(shard, []).append(tensor)
    return shards
