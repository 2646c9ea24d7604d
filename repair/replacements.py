"""Tensors that replace something of the model as a whole, and what a repair does with them.

`modules_to_save`, biases, trained tokens: no low-rank method sees them, so what they do to the refusals stays done.
They are refused unless the caller says what to do: leave them out, put the aligned model's values in their place, or go
part of the way back. One that holds the aligned model's own values replaces nothing and is left out without asking.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import torch
from safetensors import safe_open
from torch import Tensor

from repair.errors import MissingReference, RepairError, ShapeMismatch, UnsupportedAdapter
from repair.layout import CONFIG, PREFIX, WEIGHTS
from repair.lora import ExtraKind, ExtraTensor, LoraAdapter
from repair.treatment import Replacements, Treatment

_ROWS: Final = 1024
_TOKENS: Final = ".token_adapter.trainable_tokens_delta"
_BASE: Final = ".base_layer."
_WORDS: Final[Mapping[Treatment, str]] = {
    Treatment.DROP: "dropped",
    Treatment.REVERT: "reverted",
    Treatment.INTERPOLATE: "interpolated, {:g} of the upload",
}


@runtime_checkable
class Model(Protocol):
    """Where the tensors of the aligned model are."""

    def tensor(self, key: str) -> Tensor:
        """By its full name; raises MissingWeight."""


def settled(adapter: LoraAdapter, how: Replacements, aligned: Model | None) -> LoraAdapter:
    """The adapter with its replacements treated, each with a note; one that has a value was settled before.

    The very adapter that was handed in when nothing was left to settle. Raises UnsupportedAdapter when they are to be
    refused, MissingReference, MissingWeight or ShapeMismatch when the aligned model is needed and does not have them.
    """
    open_ones = [extra for extra in adapter.extras if extra.value is None]
    if not open_ones:
        return adapter
    idle = _idle(adapter, aligned)
    kept = [extra for extra in adapter.extras if extra.value is not None]
    notes: list[str] = []
    for extra in open_ones:
        if extra.key in idle:
            notes.append(f"left out, it is the aligned model's own: {extra.key} ({extra.kind})")
            continue
        treated = _treated(extra, how, adapter, aligned)
        notes.append(f"{_WORDS[how.treatment].format(how.strength)}: {extra.key} ({extra.kind})")
        kept += [] if treated is None else [treated]
    return replace(adapter, extras=tuple(kept), notes=(*adapter.notes, *notes))


def with_values(adapter: LoraAdapter, known: LoraAdapter) -> LoraAdapter:
    """An adapter that was read back, its replacements as they stand in the file: settled, for what was written was.

    Values that ``known`` has as well are not held twice.
    """
    if not adapter.extras:
        return adapter
    at_hand = {extra.key: extra.value for extra in known.extras}
    return replace(adapter, extras=tuple(_with_value(extra, at_hand.get(extra.key)) for extra in adapter.extras))


def _with_value(extra: ExtraTensor, known: Tensor | None) -> ExtraTensor:
    found = _uploaded(extra)
    same = known is not None and known.dtype == found.dtype and torch.equal(known, found)
    return replace(extra, value=known if same else found)


def _treated(extra: ExtraTensor, how: Replacements, adapter: LoraAdapter, aligned: Model | None) -> ExtraTensor | None:
    if how.treatment is Treatment.REFUSE:
        detail = f"replaces a whole tensor of the model ({extra.kind}): say whether to drop, revert or interpolate it"
        raise UnsupportedAdapter(detail, field=extra.key, file=WEIGHTS)
    if how.treatment is Treatment.DROP:
        return None
    own = _own(extra, adapter, aligned)
    if tuple(own.shape) != extra.shape:
        detail = f"replaces a tensor of {tuple(own.shape)} by one of {extra.shape}: it can only be dropped"
        raise ShapeMismatch(detail, field=extra.key, file=WEIGHTS)
    uploaded = _uploaded(extra)
    share = 0.0 if how.treatment is Treatment.REVERT else how.strength
    return replace(extra, value=_mixed(own, uploaded, share))


def _mixed(own: Tensor, uploaded: Tensor, share: float) -> Tensor:
    """A few rows at a time, so that no second copy in float32 is needed."""
    if share == 0:
        return own.to(uploaded.dtype).contiguous()
    result = torch.empty_like(uploaded)
    for start in range(0, len(uploaded), _ROWS):
        rows = slice(start, start + _ROWS)
        result[rows] = torch.lerp(own[rows].float(), uploaded[rows].float(), share).to(uploaded.dtype)
    return result


def _idle(adapter: LoraAdapter, aligned: Model | None) -> frozenset[str]:
    """Replacements that change nothing, where that holds for all that one key of the config announces."""
    if aligned is None:
        return frozenset()
    same = {extra.key: _is_same(extra, adapter, aligned) for extra in adapter.extras}
    groups: dict[tuple[ExtraKind, bool], list[str]] = {}
    for extra in adapter.extras:
        groups.setdefault((extra.kind, _BASE in extra.key), []).append(extra.key)
    return frozenset(key for keys in groups.values() if all(same[key] for key in keys) for key in keys)


def _is_same(extra: ExtraTensor, adapter: LoraAdapter, aligned: Model) -> bool:
    try:
        own = _own(extra, adapter, aligned)
    except RepairError:  # something that the model does not have is not the model's own
        return False
    if extra.source is None or tuple(own.shape) != extra.shape:
        return False
    uploaded = _uploaded(extra)
    return torch.equal(own.to(uploaded.dtype), uploaded)


def _own(extra: ExtraTensor, adapter: LoraAdapter, aligned: Model | None) -> Tensor:
    """What the aligned model has in this place."""
    if aligned is None:
        raise MissingReference("reverting a replacement needs the aligned model", field="aligned")
    module, leaf = place_of_extra(extra)
    whole = aligned.tensor(f"{module}.{leaf}")
    return whole[trained_rows(module, adapter)] if extra.kind is ExtraKind.TOKENS else whole


def place_of_extra(extra: ExtraTensor) -> tuple[str, str]:
    """Which module of the model it belongs to, and the name of the parameter there."""
    name = extra.key.removeprefix(PREFIX)
    if extra.kind is ExtraKind.TOKENS:
        return name.removesuffix(_TOKENS), "weight"
    module, _, leaf = name.replace(_BASE, ".").rpartition(".")
    return module, leaf


def is_base(extra: ExtraTensor) -> bool:
    """Whether it overwrites the parameter under a LoRA, rather than a module that was saved as a whole."""
    return _BASE in extra.key


def trained_rows(module: str, adapter: LoraAdapter) -> list[int]:
    """The rows of an embedding that ``trainable_token_indices`` tell; raises UnsupportedAdapter."""
    return _indices(module, adapter.config.get("trainable_token_indices"))


def _indices(module: str, given: Any) -> list[int]:
    """The rows that were trained: one list for the embedding, or one for each module by how its path ends."""
    if isinstance(given, dict):
        found = [rows for ending, rows in given.items() if module == ending or module.endswith(f".{ending}")]
        given = found[0] if len(found) == 1 else None
    if not isinstance(given, list):
        raise UnsupportedAdapter("does not tell the rows", field="trainable_token_indices", file=CONFIG)
    return [int(row) for row in given]


def _uploaded(extra: ExtraTensor) -> Tensor:
    if extra.source is None:
        raise UnsupportedAdapter("its values were not read from a file", field=extra.key)
    with safe_open(Path(extra.source), framework="pt", device="cpu") as handle:
        tensor: Tensor = handle.get_tensor(extra.key)
    return tensor
