"""What a base checkpoint contains, from its headers alone: shapes for the gate, digests for the record.

A checkpoint is the operator's own; it is read with the same strict reader all the same. No weight is loaded.
"""

from collections.abc import Mapping
from pathlib import Path

from gate.digest import sha256_file
from gate.errors import Refused, Rule
from gate.files import read_small
from gate.header import read_header
from gate.strict_json import JsonText, parse_object

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_INDEX_BYTES = 32 << 20
MAX_INDEX_VALUES = 1 << 20
_SUFFIX = ".weight"
_MATRIX = 2
_EXPERTS = 3


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
