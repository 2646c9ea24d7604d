"""Read an adapter folder into named layers, and write one back, in the form every serving engine agrees on.

`gate` has the first look at the bytes: what it lets through is a well-formed safetensors file and config. Here they get
their meaning. Nothing is ever written over, and a half-written folder never bears the final name.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from gate.config import AdapterConfig, read_config
from gate.header import read_header
from gate.parameters import Site, parameters_at
from repair.errors import OutputExists, UnsupportedAdapter
from repair.experts import Packed, righted, slot_name, unpacked
from repair.export import Export, folded
from repair.layout import CONFIG, WEIGHTS, refuse_config, spelling
from repair.lora import ExtraKind, ExtraTensor, LayerKind, LoraAdapter, LoraLayer, ParameterSlot

_FLOATS = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})
_ONE_DIMENSION = frozenset({"bias", "magnitude"})


def read_adapter(directory: Path) -> LoraAdapter:
    """The layers of a PEFT adapter folder, float32 or wider, with their scales.

    Raises `gate.errors.Refused` for malformed bytes and UnsupportedAdapter, naming file and field, for a layout that we
    do not repair. Ranks come from the tensors, scales from the config.
    """
    config = read_config(directory / CONFIG)
    refuse_config(config.raw)
    header = read_header(directory / WEIGHTS)
    parts: dict[Site, dict[str, str]] = {}
    kinds: dict[Site, LayerKind] = {}
    extras: list[ExtraTensor] = []
    for key, entry in header.tensors.items():
        found = spelling(key)
        if isinstance(found, ExtraKind):
            extras.append(ExtraTensor(key=key, kind=found, shape=tuple(entry.shape), source=directory / WEIGHTS))
            continue
        site = Site(module=found.module, nested=found.nested)
        if kinds.setdefault(site, found.kind) is not found.kind or found.part in parts.get(site, {}):
            raise UnsupportedAdapter("the module is spelt in two ways", field=key, file=WEIGHTS)
        parts.setdefault(site, {})[found.part] = key
    parameters = parameters_at(parts, config.target_parameters, ordinary=config.targets_module)
    layers: list[LoraLayer] = []
    with safe_open(directory / WEIGHTS, framework="pt", device="cpu") as handle:
        for site in sorted(parts):
            if site in parameters:
                layers += _parameter_layers(parameters[site], parts[site], handle, config)
            else:
                layers.append(_layer(site.module, kinds[site], parts[site], handle, config))
    if not layers:
        raise UnsupportedAdapter("no low-rank layer is in it", file=WEIGHTS)
    return LoraAdapter(
        layers=tuple(righted(layers)),
        config=MappingProxyType(dict(config.raw)),
        extras=tuple(sorted(extras, key=lambda extra: extra.key)),
        notes=tuple(f"config key kept but not understood: {key}" for key in sorted(config.unknown_keys)),
    )


def write_adapter(adapter: LoraAdapter, directory: Path, *, balanced: bool = False) -> Export:
    """Write a folder that PEFT and other engines read alike; say what the number format cost.

    The scale is folded into B, ranks are padded to one, and ``balanced`` makes both factors equally large. Raises
    OutputExists rather than overwrite, NotRepresentable when a result does not fit the format of the input.
    """
    export = folded(adapter, balanced=balanced)
    with fresh_folder(directory) as partial:
        save_file(dict(export.tensors), partial / WEIGHTS, metadata={"format": "pt"})
        text = json.dumps(export.config, indent=2, sort_keys=True, allow_nan=False) + "\n"
        (partial / CONFIG).write_text(text, encoding="utf-8")
    return export


def copy_adapter(source: Path, directory: Path) -> None:
    """The uploaded bytes under another name: what an unchanged adapter is released as."""
    with fresh_folder(directory) as partial:
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(source / name, partial / name)


@contextmanager
def fresh_folder(directory: Path) -> Iterator[Path]:
    """A folder to fill that takes the name ``directory`` only when it is whole and on the disk."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise OutputExists(file=str(directory))
    parent = directory.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".partial", dir=parent))
    try:
        partial.chmod(0o755)
        yield partial
        for path in (*sorted(partial.iterdir()), partial):
            _sync(path)
        partial.rename(directory)
        _sync(parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _layer(module: str, kind: LayerKind, keys: Mapping[str, str], handle: Any, config: AdapterConfig) -> LoraLayer:
    embedding = kind is LayerKind.EMBEDDING
    if bool(config.use_dora) != ("magnitude" in keys) or (embedding and config.use_dora):
        detail = "DoRA needs a magnitude for every linear module, and knows no embeddings here"
        raise UnsupportedAdapter(detail, field=module, file=WEIGHTS)
    found = _parts(module, keys, handle)
    a, b = found.wide["a"], found.wide["b"]
    return LoraLayer(
        name=module,
        a=a,
        b=b,
        scale=config.scale_for(module, a.shape[0]),
        dtype=found.dtype,
        kind=kind,
        transposed=embedding or bool(config.fan_in_fan_out),
        bias=found.wide.get("bias"),
        magnitude=found.wide.get("magnitude"),
    )


def _parameter_layers(path: str, keys: Mapping[str, str], handle: Any, config: AdapterConfig) -> list[LoraLayer]:
    """One layer for each expert of a bare parameter, or a single one when it is a matrix."""
    found = _parts(path, keys, handle)
    rank = config.rank_for(path)
    experts, rest = divmod(found.wide["a"].shape[0], rank)
    if rest or found.wide["b"].shape[1] != experts * rank or len(keys) > len(("a", "b")):
        raise UnsupportedAdapter(f"not the factors of experts of rank {rank}", field=path, file=WEIGHTS)
    matrix = experts == 1 and path.endswith(".weight")
    layers = []
    for expert, factors in enumerate(unpacked(Packed(a=found.wide["a"], b=found.wide["b"]), experts)):
        slot = ParameterSlot(parameter=path, expert=None if matrix else expert, experts=experts)
        scale = config.scale_for(path, rank)
        layers.append(
            LoraLayer(name=slot_name(slot), a=factors.a, b=factors.b, scale=scale, dtype=found.dtype, slot=slot)
        )
    return layers


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """The tensors of a module in float32 or wider, and the format of its factors in the file."""

    wide: Mapping[str, Tensor]
    dtype: torch.dtype


def _parts(module: str, keys: Mapping[str, str], handle: Any) -> _Parts:
    for part in ("a", "b"):
        if part not in keys:
            raise UnsupportedAdapter(f"factor {part.upper()} is missing", field=module, file=WEIGHTS)
    tensors = {part: _tensor(handle, key, part) for part, key in keys.items()}
    wide = {part: tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for part, tensor in tensors.items()}
    common = torch.promote_types(wide["a"].dtype, wide["b"].dtype)
    wide |= {part: wide[part].to(common) for part in ("a", "b")}
    return _Parts(wide=wide, dtype=torch.promote_types(tensors["a"].dtype, tensors["b"].dtype))


def _tensor(handle: Any, key: str, part: str) -> Tensor:
    tensor: Tensor = handle.get_tensor(key)
    if tensor.dtype not in _FLOATS:
        raise UnsupportedAdapter(f"{tensor.dtype} is quantised", field=key, file=WEIGHTS)
    if tensor.ndim != (1 if part in _ONE_DIMENSION else 2):
        raise UnsupportedAdapter(f"shape {tuple(tensor.shape)}: convolutions are not repaired", field=key, file=WEIGHTS)
    return tensor
