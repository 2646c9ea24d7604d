"""Fold a LoRA into the weights of a model folder: how the aligned member is made from its base and the refusal patch.

Works on files, one tensor file at a time, and needs no model class; whatever is not adapted is copied as it is.
"""

import shutil
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from repair.adapter_file import fresh_folder, read_adapter
from repair.errors import MissingWeight, ShapeMismatch, UnsupportedAdapter
from repair.lora import LayerKind, LoraLayer

_WEIGHT = ".weight"


def merge_adapter(model_dir: Path, adapter_dir: Path, out_dir: Path) -> None:
    """Write ``out_dir``: the model with the adapter added, in the number format of the model.

    The sum is made in float32 and rounded once, so that equal inputs give equal bytes. Raises MissingWeight for a
    module that the model does not have, UnsupportedAdapter for DoRA, biases and replaced tensors, OutputExists rather
    than overwrite.
    """
    layers = _mergeable(adapter_dir)
    with fresh_folder(out_dir) as partial:
        for path in sorted(model_dir.iterdir()):
            if path.suffix == ".safetensors":
                _merge_file(path, partial / path.name, layers)
            elif path.is_file():
                shutil.copyfile(path, partial / path.name)
        if layers:
            raise MissingWeight("the model has no weight of this name", field=min(layers))


def _mergeable(adapter_dir: Path) -> dict[str, LoraLayer]:
    adapter = read_adapter(adapter_dir)
    if adapter.extras:
        raise UnsupportedAdapter("replaced tensors cannot be merged", field=adapter.extras[0].key)
    for layer in adapter.layers:
        if layer.magnitude is not None or layer.bias is not None:
            raise UnsupportedAdapter("only a plain LoRA can be merged", field=layer.name)
        if layer.slot is not None and layer.slot.expert is not None:
            raise UnsupportedAdapter("fused experts are not merged into files: PEFT can", field=layer.name)
    return adapter.by_name


def _merge_file(source: Path, target: Path, layers: dict[str, LoraLayer]) -> None:
    """Copy one weights file; a layer that found its weight is taken out of ``layers``."""
    tensors: dict[str, Tensor] = {}
    with safe_open(source, framework="pt") as handle:
        metadata = handle.metadata()
        for key in handle.keys():  # noqa: SIM118 - not a dict
            tensor = handle.get_tensor(key)
            layer = layers.pop(key.removesuffix(_WEIGHT), None) if key.endswith(_WEIGHT) else None
            tensors[key] = tensor if layer is None else _merged(tensor, layer)
    save_file(tensors, target, metadata=metadata)
    target.chmod(0o644)


def _merged(weight: Tensor, layer: LoraLayer) -> Tensor:
    delta = layer.scale * (layer.b @ layer.a)
    if layer.transposed or layer.kind is LayerKind.EMBEDDING:
        delta = delta.T
    if delta.shape != weight.shape:
        raise ShapeMismatch(f"{tuple(delta.shape)} does not fit {tuple(weight.shape)}", field=layer.name)
    merged: Tensor = (weight.float() + delta.float()).to(weight.dtype).contiguous()
    return merged
