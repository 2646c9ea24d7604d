"""What a repair may look at besides the adapter: the reference, a patch, a chat, a device."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from repair.basis import BasisPack
from repair.basis_operator import reported_error, shortfall
from repair.calibration import Calibration
from repair.checkpoint import Checkpoint
from repair.errors import InsufficientBasis, MissingReference
from repair.layer_basis import BasisNeed, LayerBasis
from repair.lora import LayerKind, LayerReference, LoraAdapter, LoraLayer, Weight
from repair.treatment import Replacements

ACCELERATOR_TILE_ROWS = 2048  # there the launch of a kernel costs more than memory

Progress = Callable[[str, float], None]
"""Called with a short line and the share that is done, 0 to 1."""


def silent(_message: str, _share: float) -> None:
    """Tell nobody."""


@dataclass(frozen=True, kw_only=True)
class RepairContext:
    """Everything outside the adapter that a method may use.

    Attributes:
        aligned: The model the adapter is served on.
        base: The same model before alignment.
        patch: A refusal LoRA made for the aligned model; `patch` uses it when no folder is named.
        twin: A LoRA for the aligned model that obeys harmful requests; methods of the safety vector can subtract it.
        calibration: What the aligned model does on harmful and benign prompts, measured once.
        basis: What alignment changed in the linears of this pair; methods that need no more of the models read it
            instead of them.
        chat: A loaded `repair.checks.backend.ChatModel`, for methods that train or listen. Untyped on purpose: the
            maths must not import transformers.
        device: Where the maths runs.
        progress: Told after every module.
        replacements: What to do with tensors that replace something of the model as a whole.
        tile_rows: Rows of a reference weight that are read at once; None for what suits the device.
        heard: Calibrations with gradients taken on the way to an adapter, by which gradient; candidates that edit the
            same adapter share them.
        rank_limit: The largest rank of the result; None for the step that the uploaded adapter fits.
    """

    aligned: Checkpoint | None = None
    base: Checkpoint | None = None
    patch: LoraAdapter | None = None
    twin: LoraAdapter | None = None
    calibration: Calibration | None = None
    basis: BasisPack | None = None
    chat: Any = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    progress: Progress = silent
    replacements: Replacements = field(default_factory=Replacements)
    tile_rows: int | None = None
    heard: dict[Hashable, tuple[LoraAdapter, Calibration]] = field(default_factory=dict)
    rank_limit: int | None = None

    def reference_for(
        self, layer: LoraLayer, *, with_base: bool = True, need: BasisNeed | None = None
    ) -> LayerReference:
        """What is known about the weight that ``layer`` adapts; no weight is read yet.

        Out of the basis pack where there is one that answers ``need``, else handles on the weights. Raises
        MissingWeight or ShapeMismatch when the aligned model has no such weight: the adapter is for another model.
        Raises InsufficientBasis when there is nothing but a pack that does not answer. A pair that does not fit
        together is no error but says so in ``unusable``.
        """
        if self.basis is None or need is None:
            return self._on_checkpoints(layer, with_base=with_base)
        found = self.basis.for_layer(layer)
        why = found if isinstance(found, str) else shortfall(layer, found, need)
        if not isinstance(found, str) and why is None:
            note = "" if need.rank is not None or not found.norm else _precision(layer, found)
            unusable = found.unusable
            return LayerReference(name=layer.name, unusable=unusable, device=self.device, basis=found, note=note)
        if self.aligned is None or self.base is None:
            detail = f"the basis pack cannot answer: {why}; give --aligned and --base, or make another pack"
            raise InsufficientBasis(detail, field=layer.name, file=str(self.basis.folder))
        direct = self._on_checkpoints(layer, with_base=with_base)
        return replace(direct, note=f"read from the checkpoints, the basis pack cannot answer: {why}")

    def must_know(self, layer: LoraLayer) -> None:
        """Raise MissingWeight, ShapeMismatch or InsufficientBasis when the reference has no weight for this layer.

        The aligned model is asked where it is given, else the basis pack; without either there is nobody to ask.
        """
        if self.aligned is not None or self.basis is None:
            self._on_checkpoints(layer, with_base=False)
            return
        found = self.basis.for_layer(layer)
        if isinstance(found, str):
            detail = f"the basis pack does not know this module: {found}; give --aligned"
            raise InsufficientBasis(detail, field=layer.name, file=str(self.basis.folder))

    def _on_checkpoints(self, layer: LoraLayer, *, with_base: bool) -> LayerReference:
        aligned = None if self.aligned is None else self.aligned.for_layer(layer)
        base, unusable = None, None
        if with_base and self.base is not None and self.aligned is not None and aligned is not None:
            base, unusable = self._base_weight(layer, aligned, self.base, self.aligned)
        return LayerReference(
            name=layer.name,
            aligned=aligned,
            base=base,
            unusable=unusable,
            calibration=None if self.calibration is None else self.calibration.for_layer(layer),
            uncalibrated="there is no calibration" if self.calibration is None else self.calibration.why_not(layer),
            device=self.device,
            tile_rows=self.tile_rows or (None if self.device.type == "cpu" else ACCELERATOR_TILE_ROWS),
            remembered={} if self.aligned is None else self.aligned.memory(layer, self.base),
        )

    def need_aligned(self, why: str) -> Checkpoint:
        """The aligned model; raises MissingReference."""
        if self.aligned is None:
            raise MissingReference(f"{why} needs the aligned model", field="aligned")
        return self.aligned

    @staticmethod
    def _base_weight(
        layer: LoraLayer, weight: Weight, base: Checkpoint, aligned: Checkpoint
    ) -> tuple[Weight | None, str | None]:
        if aligned.borrows(layer.name) != base.borrows(layer.name):
            return None, "one model of the pair ties its head to the embedding, the other does not"
        other = base.oriented(layer, like=weight)
        if other.shape == weight.shape:
            return other, None
        if layer.kind is LayerKind.EMBEDDING and other.shape[0] == weight.shape[0]:
            return other, None  # a vocabulary that grew; the common tokens are compared
        return None, f"aligned and base differ in shape: {weight.shape} and {other.shape}"


def _precision(layer: LoraLayer, basis: LayerBasis) -> str:
    return f"from the basis pack, operator error {reported_error(layer, basis):.2g}" if bool(layer.b.any()) else ""
