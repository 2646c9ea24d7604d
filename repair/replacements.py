"""Tensors that replace something of the model as a whole, and what a repair does with them.

`modules_to_save`, biases, trained tokens: no low-rank method sees them, so what they do to the refusals stays done.
They are refused unless the caller says what to do: leave them out, put the aligned model's values in their place, or go
part of the way back. One that holds the aligned model's own values replaces nothing and is left out without asking.
"""

from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import torch
from safetensors import safe_open
from torch import Tensor

from repair.errors import BadParameters, MissingReference, RepairError, ShapeMismatch, UnsupportedAdapter
from repair.layout import CONFIG, PREFIX, WEIGHTS
from repair.lora import ExtraKind, ExtraTensor, LoraAdapter

_ROWS: Final = 1024
_TOKENS: Final = ".token_adapter.trainable_tokens_delta"
_BASE: Final = ".base_layer."


class Treatment(StrEnum):
    """What becomes of a replacement."""

    REFUSE = "refuse"
    """The adapter is not repaired."""
    DROP = "drop"
    """It is left out: the served model keeps its own tensor."""
    REVERT = "revert"
    """It stays in the file with the values of the aligned model, for loaders that expect it there."""
    INTERPOLATE = "interpolate"
    """``(1 - strength) * aligned + strength * uploaded``."""


@dataclass(frozen=True, kw_only=True)
class Replacements:
    """How replacements are treated; ``strength`` is the uploaded share of an interpolation."""

    treatment: Treatment = Treatment.REFUSE
    strength: float = 0.5

    @classmethod
    def parse(cls, text: str) -> "Replacements":
        """``drop``, ``revert``, ``interpolate`` or ``interpolate=0.3``; raises BadParameters."""
        name, _, share = text.partition("=")
        try:
            found = cls(treatment=Treatment(name), strength=float(share) if share else 0.5)
        except ValueError as error:
            there = ", ".join(one.value for one in Treatment)
            raise BadParameters(f"one of {there}, the last with =SHARE: {text!r}", field="replacements") from error
        if not 0 <= found.strength <= 1 or (share and found.treatment is not Treatment.INTERPOLATE):
            raise BadParameters("only interpolate takes a share, from 0 to 1", field="replacements")
        return found


@runtime_checkable
class Model(Protocol):
    """Where the tensors of the aligned model are."""

    def tensor(self, key: str) -> Tensor:
        """By its full name; raises MissingWeight."""


def settled(adapter: LoraAdapter, how: Replacements, aligned: Model | None) -> LoraAdapter:
    """The adapter with its replacements treated, each with a note.

    Raises UnsupportedAdapter when they are to be refused, MissingReference or ShapeMismatch when the aligned model is
    needed and does not have them.
    """
    idle = _idle(adapter, aligned)
    kept: list[ExtraTensor] = []
    notes: list[str] = []
    for extra in adapter.extras:
        if extra.key in idle:
            notes.append(f"left out, it is the aligned model's own: {extra.key} ({extra.kind})")
            continue
        treated = _treated(extra, how, adapter, aligned)
        shown = {Treatment.DROP: "dropped", Treatment.REVERT: "reverted"}
        done = shown.get(how.treatment, f"interpolated, {how.strength:g} of the upload")
        notes.append(f"{done}: {extra.key} ({extra.kind})")
        kept += [] if treated is None else [treated]
    return replace(adapter, extras=tuple(kept), notes=(*adapter.notes, *notes))


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
    name = extra.key.removeprefix(PREFIX)
    if extra.kind is not ExtraKind.TOKENS:
        return aligned.tensor(name.replace(_BASE, "."))
    module = name.removesuffix(_TOKENS)
    return aligned.tensor(f"{module}.weight")[_indices(module, adapter.config.get("trainable_token_indices"))]


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
