"""What an adapter is: named low-rank layers, and the weights of the reference they sit on.

Values only. How files spell these layers is `adapter_file.py`; the algebra is `linalg.py`. Every layer is held in
one orientation, ``delta = scale * b @ a`` of shape out x in, whatever the file or the base model do.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from repair.errors import ShapeMismatch, UnsupportedAdapter
from repair.layer_basis import LayerBasis
from repair.moments import LayerCalibration

TILE_NUMBERS = 1 << 20
"""Numbers of a weight that are worked on at once: 4 MiB in float32. Fewer, and the calls cost more than the work; more,
and they leave the cache between two operations."""
READ_TILES = 8
"""Tiles that a reader is asked for at once: of a mapped file it hands out a view, but asking has its price too."""


class LayerKind(StrEnum):
    """Which kind of module a layer adapts; it decides how the file spells the factors."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    """Held as out = dim, in = vocabulary: the transpose of what the base model stores."""


@dataclass(frozen=True, kw_only=True)
class ParameterSlot:
    """Where a layer sits that adapts a bare parameter of the model instead of a module (`target_parameters`).

    Attributes:
        parameter: Path of the parameter in the model.
        expert: Which matrix of a parameter that holds one for each expert; None when it is a matrix itself.
        experts: How many there are.
        exchanged: The file has A on the output side and B on the input side; here they are the right way round.
    """

    parameter: str
    expert: int | None = None
    experts: int = 1
    exchanged: bool = False


@dataclass(frozen=True, kw_only=True)
class LoraLayer:
    """One adapted module: ``scale * b @ a`` is added to its weight.

    Attributes:
        name: Path of the module in the base model, without ``.weight``.
        a: Input-side factor, float32 or wider.
        b: Output-side factor, float32 or wider.
        scale: What the serving engine multiplies ``b @ a`` with.
        dtype: Number format in the file; an export returns to it.
        kind: Linear or embedding.
        transposed: The base model stores this weight as in x out.
        bias: ``lora_B.bias``: ``scale * bias`` is added to the output.
        magnitude: DoRA's length for each output row.
        slot: Which parameter, and which expert of it, when no module is adapted but a bare parameter.
    """

    name: str
    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]
    scale: float
    dtype: torch.dtype = torch.float32
    kind: LayerKind = LayerKind.LINEAR
    transposed: bool = False
    bias: Float[Tensor, " out"] | None = None
    magnitude: Float[Tensor, " out"] | None = None
    slot: ParameterSlot | None = None

    def __post_init__(self) -> None:
        """Shapes must agree; a type check alone would let a mismatch through in production."""
        if self.a.ndim != 2 or self.b.ndim != 2 or self.a.shape[0] != self.b.shape[1]:  # noqa: PLR2004 - matrices
            shapes = f"A {tuple(self.a.shape)}, B {tuple(self.b.shape)}"
            raise ShapeMismatch(f"the factors do not multiply: {shapes}", field=self.name)

    @property
    def rank(self) -> int:
        """Inner dimension, as the tensors have it."""
        return int(self.a.shape[0])

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the update."""
        return int(self.b.shape[0]), int(self.a.shape[1])

    def zeroed(self) -> "LoraLayer":
        """The module as the aligned model has it: nothing is added any more."""
        bias = None if self.bias is None else torch.zeros_like(self.bias)
        return replace(self, b=torch.zeros_like(self.b), bias=bias)

    def scaled(self, strength: float) -> "LoraLayer":
        """The same update, ``strength`` times as strong; exactly this layer for 1."""
        if strength == 1.0:
            return self
        if strength == 0.0:  # not a product: 0 * negative would leave signs of the upload behind
            return self.zeroed()
        return replace(self, b=self.b * strength, bias=None if self.bias is None else self.bias * strength)


class ExtraKind(StrEnum):
    """What a tensor that is no low-rank factor does to the model."""

    MODULE = "module"
    """Replaces a whole weight (``modules_to_save``, resized embeddings)."""
    BIAS = "bias"
    """Replaces a bias of the base model (``bias = all | lora_only``)."""
    TOKENS = "tokens"
    """Replaces rows of the embedding (``trainable_token_indices``)."""


@dataclass(frozen=True, kw_only=True)
class ExtraTensor:
    """A full replacement that travels with the adapter; it bypasses every low-rank repair.

    Attributes:
        key: Its name in the file.
        kind: What it replaces.
        shape: As stored.
        source: The file that has its values; they are large, so they are read when they are asked for.
        value: What is written in its place; None while nobody has said what to do with it.
    """

    key: str
    kind: ExtraKind
    shape: tuple[int, ...]
    source: Path | None = None
    value: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LoraAdapter:
    """An adapter: its layers in the order of their names, and the config it came with.

    Attributes:
        layers: Sorted by name, whatever order the file had.
        config: The whole ``adapter_config.json``; keys we do not know are kept.
        extras: Full replacement tensors. They are listed, not loaded: `replacements.py` says what becomes of them.
        notes: What a reader should know: unknown config keys, assumptions.
    """

    layers: tuple[LoraLayer, ...]
    config: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    extras: tuple[ExtraTensor, ...] = ()
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Names are the only key we pair by, so each may stand once."""
        ordered = tuple(sorted(self.layers, key=lambda layer: layer.name))
        names = [layer.name for layer in ordered]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UnsupportedAdapter("the module is adapted twice", field=twice)
        object.__setattr__(self, "layers", ordered)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the adapted modules, sorted."""
        return tuple(layer.name for layer in self.layers)

    @property
    def by_name(self) -> dict[str, LoraLayer]:
        """The layers under their names."""
        return {layer.name: layer for layer in self.layers}

    @property
    def uses_dora(self) -> bool:
        """Whether any module carries a DoRA magnitude."""
        return any(layer.magnitude is not None for layer in self.layers)

    def scaled(self, strength: float) -> "LoraAdapter":
        """Every module ``strength`` times as strong."""
        return replace(self, layers=tuple(layer.scaled(strength) for layer in self.layers))


def concatenate(first: LoraAdapter, second: LoraAdapter) -> LoraAdapter:
    """Add a plain LoRA to an adapter, exactly: ``D = D1 + D2`` with ranks r1 + r2 (identity I11).

    Modules that only one of them adapts are copied. Config, extras and notes are those of ``first``. A module with DoRA
    keeps the magnitude of ``first``: whoever concatenates has to measure it again (`run.py` does).
    """
    if second.uses_dora or second.extras:
        raise UnsupportedAdapter("only a plain LoRA can be concatenated", field="use_dora")
    mine, other = first.by_name, second.by_name
    layers = [_joined(mine[name], other[name]) if name in other else mine[name] for name in mine]
    layers += [layer for name, layer in other.items() if name not in mine]
    return replace(first, layers=tuple(layers))


def _joined(one: LoraLayer, two: LoraLayer) -> LoraLayer:
    if one.shape != two.shape or one.kind != two.kind:
        raise ShapeMismatch(f"{one.shape} cannot be joined with {two.shape}", field=one.name)
    if one.slot != two.slot:
        raise UnsupportedAdapter("one adapts a module, the other a parameter, or another side of it", field=one.name)
    bias = one.bias
    if one.bias is not None or two.bias is not None:
        parts = [layer.scale * layer.bias for layer in (one, two) if layer.bias is not None]
        bias = torch.stack(parts).sum(0)
    b = torch.cat([one.scale * one.b, two.scale * two.b], dim=1)
    a = torch.cat([one.a, two.a], dim=0)
    return replace(one, a=a, b=b, bias=bias, scale=1.0)


@runtime_checkable
class Weight(Protocol):
    """A weight of the reference, read a few output rows at a time, always out x in."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` in the format of the file."""

    def fetch(self) -> None:
        """Have all rows in the system's memory, where that can be had."""


def nothing() -> None:
    """Nobody has to be waited for."""


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A few rows of a matrix, in float32 or wider."""

    start: int
    stop: int
    values: Float[Tensor, "rows in"]


@dataclass(frozen=True, kw_only=True)
class LayerReference:
    """What the reference knows about the weight that one layer adapts; nothing is read before it is asked for.

    Attributes:
        name: The module, for messages.
        aligned: The weight the adapter is served on.
        base: The same weight before alignment.
        unusable: Why the pair says nothing about alignment here; None when it does.
        calibration: What the aligned model does here on harmful and benign prompts, where that is known.
        uncalibrated: Why it is not known.
        device: Where the maths runs.
        tile_rows: How many rows are read at once; None for as many as hold `TILE_NUMBERS`.
        remembered: Numbers that depend on this pair of weights alone, kept for the next adapter. Never part of a
            result's bits: what is found here only saves the work of finding it again.
        basis: What is known in advance about ``aligned - base``; then there are no weights to read.
        note: What the verdict must say about where the numbers come from.
        wait: Called before the weights are read; returns when they may be.
    """

    name: str
    aligned: Weight | None = None
    base: Weight | None = None
    unusable: str | None = None
    calibration: LayerCalibration | None = None
    uncalibrated: str = "there is no calibration"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    tile_rows: int | None = None
    remembered: dict[str, Any] = field(default_factory=dict)
    basis: LayerBasis | None = None
    note: str = ""
    wait: Callable[[], object] = nothing

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        if self.basis is not None:
            return self.basis.shape
        if self.aligned is None:
            raise ShapeMismatch("no aligned weight was given", field=self.name)
        return self.aligned.shape

    @property
    def rows_at_once(self) -> int:
        """How many rows one tile has; the last one may have fewer."""
        out_features, in_features = self.shape
        return min(out_features, self.tile_rows or max(1, TILE_NUMBERS // in_features))

    def fetch(self) -> None:
        """Have the weights in the system's memory, where that can be had."""
        for weight in (self.aligned, self.base):
            if weight is not None:
                weight.fetch()

    def aligned_tiles(self) -> Iterator[Tile]:
        """The aligned weight, a few rows at a time."""
        if self.aligned is None:
            raise ShapeMismatch("no aligned weight was given", field=self.name)
        self.wait()
        for start, stop in _steps(self.aligned.shape[0], self.rows_at_once):
            rows = self.aligned.rows(start, stop).to(self.device)
            yield Tile(start=start, stop=stop, values=rows.to(_wide(rows.dtype)))

    def alignment_tiles(self, *, backwards: bool = False) -> Iterator[Tile]:
        """What alignment changed, ``aligned - base``, a few rows at a time; from the last to the first if asked.

        Both sides are widened before the subtraction: a difference that survived bfloat16 must not be rounded again.
        A tile is good until the next one is asked for: its memory is used again.
        """
        after, before = self._both()
        width = after.shape[1]
        known = min(width, before.shape[1])
        step = self.rows_at_once
        ours, theirs = torch.empty(2, step, width, dtype=self.alignment_dtype(), device=self.device)
        for start, new, old in _read_together(after, before, step, backwards=backwards):
            rows = len(new)
            one, two = ours[:rows], theirs[:rows]
            one.copy_(new)
            if known == width:
                two.copy_(old)
            else:  # a vocabulary that grew: no evidence for the new tokens
                two.copy_(one)
                two[:, :known].copy_(old[:, :known])
            yield Tile(start=start, stop=start + rows, values=one.sub_(two))

    def alignment_dtype(self) -> torch.dtype:
        """Wide enough for both weights, float32 at least."""
        self.wait()
        after, before = self._both()
        return torch.promote_types(_wide(after.rows(0, 1).dtype), before.rows(0, 1).dtype)

    def _both(self) -> tuple[Weight, Weight]:
        if self.aligned is None or self.base is None:
            raise ShapeMismatch("alignment needs the aligned weight and the base weight", field=self.name)
        return self.aligned, self.base


def _steps(total: int, step: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + step, total)) for start in range(0, total, step))


def _read_together(
    after: Weight, before: Weight, step: int, *, backwards: bool
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Tiles of two weights as they are stored, and where they start."""
    order = reversed if backwards else iter
    for start, stop in order(list(_steps(after.shape[0], step * READ_TILES))):
        new, old = torch.split(after.rows(start, stop), step), torch.split(before.rows(start, stop), step)
        for at in order(range(len(new))):
            yield start + at * step, new[at], old[at]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
