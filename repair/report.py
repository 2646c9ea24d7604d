"""Reports as JSON: what went in, what was done to each module, what came out, and on what machine.

Every file is named with its digest, every parameter is written out, defaults included.
"""

import platform
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gate.digest import root_digest, sha256_file
from gate.model import file_digests
from repair.diagnostics.spectra import spectrum_of
from repair.export import Export
from repair.layout import CONFIG, WEIGHTS
from repair.lora import LoraAdapter, LoraLayer
from repair.method import RepairMethod
from repair.run import LayerVerdict, Repaired


def digests(directory: Path) -> dict[str, Any]:
    """Every file of a model or adapter folder, and one digest for all of them."""
    files = file_digests(directory)
    return {"path": directory.name, "digest": root_digest(files), "files": files}


def adapter_digests(directory: Path) -> dict[str, Any]:
    """The files that make an adapter; a README beside them does not change what it is."""
    files = {name: sha256_file(directory / name) for name in (CONFIG, WEIGHTS)}
    return {"path": directory.name, "digest": root_digest(files), "files": files}


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on besides the inputs."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def method_report(
    method: RepairMethod,
    repaired: Repaired,
    *,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    diagnostics: Mapping[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """The account of one plain method; ``diagnostics`` are those of the upload, see `repair.diagnostics.account`."""
    return {
        "verdict": "repaired",
        "method": method.name,
        "version": method.version,
        "paper": method.paper,
        "parameters": method.model_dump(mode="json"),
        "summary": dict(sorted(Counter(verdict.decision.value for verdict in repaired.verdicts).items())),
        "modules": modules(repaired.verdicts),
        "inputs": dict(inputs),
        "outputs": dict(outputs),
        "notes": list(repaired.notes),
        "diagnostics": dict(diagnostics),
        "environment": environment(device),
    }


def modules(verdicts: tuple[LayerVerdict, ...]) -> list[dict[str, Any]]:
    """One object for each module."""
    return [verdict.as_dict() for verdict in verdicts]


def output_entry(directory: Path, export: Export | None) -> dict[str, Any]:
    """The written folder; without an export the uploaded bytes were kept."""
    entry = adapter_digests(directory) | {"unchanged": export is None}
    if export is not None:
        worst = max(export.rounding, key=lambda name: export.rounding[name])
        entry |= {"rank": export.rank, "rounding": {"module": worst, "relative": export.rounding[worst]}}
    return entry


def inspection(adapter: LoraAdapter, directory: Path) -> dict[str, Any]:
    """What is inside an adapter: nothing of it depends on a reference."""
    layers = [_layer(layer) for layer in adapter.layers]
    return {
        "adapter": adapter_digests(directory),
        "base_model": adapter.config.get("base_model_name_or_path"),
        "ranks": sorted({layer.rank for layer in adapter.layers}),
        "scales": sorted({layer.scale for layer in adapter.layers}),
        "dora": adapter.uses_dora,
        "rslora": bool(adapter.config.get("use_rslora")),
        "parameters": sum(layer.a.numel() + layer.b.numel() for layer in adapter.layers),
        "modules": layers,
        "replacements": [{"key": e.key, "kind": e.kind.value, "shape": list(e.shape)} for e in adapter.extras],
        "notes": list(adapter.notes),
    }


def _layer(layer: LoraLayer) -> dict[str, Any]:
    return {
        "name": layer.name,
        "kind": layer.kind.value,
        "rank": layer.rank,
        "out_features": layer.shape[0],
        "in_features": layer.shape[1],
        "dtype": str(layer.dtype).removeprefix("torch."),
        "scale": layer.scale,
        **spectrum_of(layer),
        "bias": layer.bias is not None,
        "dora": layer.magnitude is not None,
    }
