"""Judge the folder of an uploaded adapter: `admit` either describes it completely or refuses it.

Every byte of every file is read once; nothing is kept in memory beyond headers and one chunk.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from gate.config import MAX_CONFIG_BYTES, AdapterConfig, read_config
from gate.digest import root_digest
from gate.errors import Refused, Rule
from gate.files import open_regular, read_small, size_of
from gate.header import looks_pickled, parse_header
from gate.names import CONFIG_FILE, README_FILE, REQUIRED_FILES, WEIGHTS_FILE, check_name
from gate.records import ExtraKind, ExtraRecord, ModuleKind, ModuleRecord, Shapes, Weights
from gate.scan import scan
from gate.tying import check_tied
from gate.weights import read_weights

MAX_README_BYTES = 1 << 20
# How people call copies of a model whose weights are rounded to a few bits.
_QUANTISED = re.compile(r"(?i)(^|[-_/.])(bnb|[248]-?bit|int[48]|fp8|nf4|gptq|awq|gguf|hqq|aqlm|eetq|exl2)([-_/.]|$)")


class Need(StrEnum):
    """What an engine must be able to do to serve the adapter as it is."""

    RSLORA = "rslora"
    DORA = "dora"
    RANK_PATTERN = "rank-pattern"
    ALPHA_PATTERN = "alpha-pattern"
    LORA_BIAS = "lora-bias"
    EMBEDDINGS = "embeddings"
    FULL_WEIGHTS = "full-weights"
    BIASES = "biases"
    TOKENS = "tokens"
    PARAMETERS = "parameters"


NOTES: Mapping[Need, str] = {
    Need.RSLORA: "uses rsLoRA: the scale is alpha / sqrt(rank)",
    Need.DORA: "uses DoRA: each module carries a magnitude",
    Need.RANK_PATTERN: "has rank_pattern: ranks differ between modules",
    Need.ALPHA_PATTERN: "has alpha_pattern: an engine that reads only lora_alpha serves another scale",
    Need.LORA_BIAS: "has lora_bias: each module shifts its output",
    Need.EMBEDDINGS: "adapts embeddings",
    Need.FULL_WEIGHTS: "replaces whole weights of the base model (modules_to_save)",
    Need.BIASES: "replaces biases of the base model",
    Need.PARAMETERS: "adapts bare parameters, as fused experts are (target_parameters)",
    Need.TOKENS: "replaces rows of an embedding (trainable_token_indices)",
}


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """A file of the upload; `sha256` is bare hexadecimal."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Admission:
    """An adapter that was let in.

    Attributes:
        config: What the adapter says it is.
        files: Its files, in the order of names.
        modules: Its low-rank modules, in the order of names.
        extras: Its full replacements, in the order of names.
        needs: What an engine must support to serve it.
        notes: What a person should know about it.
    """

    config: AdapterConfig
    files: tuple[FileRecord, ...]
    modules: tuple[ModuleRecord, ...]
    extras: tuple[ExtraRecord, ...]
    needs: tuple[Need, ...]
    notes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """The root digest over the files, ``sha256:<hex>``."""
        return root_digest({file.name: file.sha256 for file in self.files})

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    def as_dict(self) -> dict[str, Any]:
        """The inspection as plain JSON values."""
        config = self.config
        ranks = [module.rank for module in self.modules]
        return {
            "peft_type": config.peft_type,
            "base_model_name_or_path": config.base_model_name_or_path,
            "revision": config.revision,
            "rank": config.r,
            "alpha": config.alpha,
            "fan_in_fan_out": config.fan_in_fan_out,
            "ranks": {"min": min(ranks), "max": max(ranks)},
            "dtypes": sorted({module.dtype for module in self.modules} | {extra.dtype for extra in self.extras}),
            "kinds": sorted({module.kind.value for module in self.modules}),
            "parameters": sum(m.rank * (m.out_features + m.in_features) * (m.experts or 1) for m in self.modules),
            "modules": [asdict(module) | {"kind": module.kind.value} for module in self.modules],
            "extras": [asdict(e) | {"kind": e.kind.value, "shape": list(e.shape)} for e in self.extras],
            "needs": [need.value for need in self.needs],
            "notes": list(self.notes),
            "unknown_keys": list(config.unknown_keys),
        }


def admit(directory: Path, *, shapes: Shapes | None = None) -> Admission:
    """Read a whole adapter folder; raises Refused for whatever is malformed, hostile or not handled.

    Args:
        directory: The folder that holds the files, and nothing else.
        shapes: Modules of the base model with the two dimensions of their weight as stored; None when the
            base is not known yet.
    """
    names = check_names(directory)
    config_bytes = read_small(directory / CONFIG_FILE, limit=MAX_CONFIG_BYTES)
    config = read_config(config_bytes)
    files = [_record(CONFIG_FILE, config_bytes)]
    if README_FILE in names:
        files.append(_readme(directory / README_FILE))
    with open_regular(directory / WEIGHTS_FILE) as stream:
        header = parse_header(stream, name=WEIGHTS_FILE)
        weights = read_weights(header, config, shapes)
        digest = scan(stream, header, name=WEIGHTS_FILE)
        check_tied(stream, header, config, weights)
        files.append(FileRecord(name=WEIGHTS_FILE, size=size_of(stream), sha256=digest))
    needs = _needs(config, weights)
    return Admission(
        config=config,
        files=tuple(sorted(files, key=lambda file: file.name)),
        modules=weights.modules,
        extras=weights.extras,
        needs=needs,
        notes=tuple(_notes(config, needs)),
    )


def check_names(directory: Path) -> frozenset[str]:
    """The names in a folder, all of which an adapter may have."""
    names: set[str] = set()
    with os.scandir(directory) as entries:
        for entry in entries:
            check_name(entry.name)
            if not entry.is_file(follow_symlinks=False):
                raise Refused(Rule.NOT_A_REGULAR_FILE, "not a regular file", file=entry.name, field="type")
            names.add(entry.name)
    for missing in (name for name in REQUIRED_FILES if name not in names):
        raise Refused(Rule.MISSING_FILE, "every adapter has this file", file=missing, field="name")
    return frozenset(names)


def _readme(path: Path) -> FileRecord:
    data = read_small(path, limit=MAX_README_BYTES)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        rule = Rule.PICKLE if looks_pickled(data[:64]) else Rule.NOT_UTF8
        raise Refused(rule, f"not UTF-8 at byte {error.start}", file=README_FILE) from error
    return _record(README_FILE, data)


def _record(name: str, data: bytes) -> FileRecord:
    return FileRecord(name=name, size=len(data), sha256=hashlib.sha256(data).hexdigest())


def _needs(config: AdapterConfig, weights: Weights) -> tuple[Need, ...]:
    extras = {extra.kind for extra in weights.extras}
    embeddings = any(module.kind == ModuleKind.EMBEDDING for module in weights.modules)
    found = {
        Need.RSLORA: config.use_rslora,
        Need.DORA: config.use_dora,
        Need.RANK_PATTERN: any(module.rank != config.r for module in weights.modules),
        Need.ALPHA_PATTERN: any(config.alpha_for(module.name) != config.alpha for module in weights.modules),
        Need.LORA_BIAS: config.lora_bias,
        Need.EMBEDDINGS: embeddings,
        Need.FULL_WEIGHTS: ExtraKind.MODULE in extras,
        Need.BIASES: ExtraKind.BIAS in extras,
        Need.TOKENS: ExtraKind.TOKENS in extras,
        Need.PARAMETERS: bool(config.target_parameters),
    }
    return tuple(need for need, present in found.items() if present)


def _notes(config: AdapterConfig, needs: tuple[Need, ...]) -> list[str]:
    notes = [NOTES[need] for need in needs]
    if config.fan_in_fan_out:
        notes.append("fan_in_fan_out: the base model is said to store its weights as (in, out)")
    if config.init_lora_weights is False:
        notes.append("init_lora_weights is false: PEFT fills a targeted module that the file lacks at random")
    if config.target_modules is None:
        notes.append("target_modules is null: which modules are adapted is taken from the file alone")
    if not config.base_model_name_or_path:
        notes.append("base_model_name_or_path is empty: the uploader does not say what it was trained on")
    if _QUANTISED.search(config.base_model_name_or_path or ""):
        notes.append("trained on a quantised base, says its name: repair it with the 16 bit originals of that base")
    if config.unknown_keys:
        shown = ", ".join(config.unknown_keys[:20])
        more = len(config.unknown_keys) - 20
        notes.append(f"unknown config keys, kept as they are: {shown}" + (f" and {more} more" if more > 0 else ""))
    return notes
