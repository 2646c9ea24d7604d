"""A calibration pack on disk: what one aligned model does on harmful and on benign prompts, linear by linear.

Made once for a reference (`calibrate.py`), then read for every adapter. A pack is a folder named by the digest of all
that decides it: the aligned model, the rows, the settings. It appears whole or not at all, and is refused by name when
it is damaged, of another version, or made for another model.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from gate.digest import sha256_file
from repair.adapter_file import fresh_folder
from repair.errors import BadParameters, ShapeMismatch, WrongReference
from repair.expert_parts import Apart, apart_of, names_of, part_of
from repair.linalg import delta_energy
from repair.lora import LayerKind, LayerReference, LoraLayer
from repair.moments import Gradient, LayerCalibration

HEADER: Final = "calibration.json"
TENSORS: Final = "calibration.safetensors"
FORMAT: Final = "lora-repair/calibration"
VERSION: Final = 2  # 1 knew no experts, and fewer units


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """How much is looked at. Part of the pack's identity.

    Attributes:
        prompts: How many harmful prompts, and how many benign ones, moments are taken on.
        question_tokens: Tokens at the end of each question that count.
        answer_tokens: Tokens at the start of each answer that count.
        gradient_prompts: How many of the harmful prompts the refusal gradient is taken on.
        directions: Eigenpairs and singular triplets that are kept of each moment and gradient.
        seed: Of the order in which rows are taken from their pack.
    """

    prompts: int = 64
    question_tokens: int = 8
    answer_tokens: int = 4
    gradient_prompts: int = 8
    directions: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse by name what could not be looked at."""
        for name, least in (("prompts", 1), ("question_tokens", 1), ("gradient_prompts", 1), ("directions", 1)):
            if getattr(self, name) < least:
                raise BadParameters(f"at least {least}", field=name)
        if self.answer_tokens < 0 or self.seed < 0:
            raise BadParameters("not below zero", field="answer_tokens" if self.answer_tokens < 0 else "seed")
        if self.gradient_prompts > self.prompts:
            raise BadParameters("the gradient is taken on some of the prompts", field="gradient_prompts")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """All that decides a pack's numbers, up to the rounding of another machine.

    Attributes:
        aligned: Digest of the aligned model's folder.
        rows: Digest of the prompts and answers that were used, in their order.
        dtype: What the model computed in.
        settings: See there.
    """

    aligned: str
    rows: str
    dtype: str
    settings: CalibrationSettings

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` of it all; the pack's name."""
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, sort_keys=True)
        return f"sha256:{sha256(text.encode()).hexdigest()}"

    def folder(self, store: Path) -> Path:
        """Where the pack lies among others."""
        return store / self.digest.removeprefix("sha256:")


@dataclass(frozen=True, kw_only=True)
class MeasuredModule:
    """One module on its way into a pack.

    Attributes:
        shape: (out, in).
        tensors: Parts by name, as `LayerCalibration` asks for them.
        numbers: Scalars by name.
        inputs: The module whose ``inputs.*`` parts are this one's as well, when they read the same thing.
        left_out: Why nothing is known about it after all; then it has no tensors.
    """

    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, float]
    inputs: str | None = None
    left_out: str = ""


class Calibration:
    """An opened pack."""

    def __init__(self, header: Mapping[str, Any], handle: Any) -> None:
        """Use `open`."""
        self.header = header
        self._handle = handle

    @classmethod
    def open(cls, directory: Path, *, aligned: str) -> "Calibration":
        """The pack in ``directory``, or the only one among its folders that is for the model with this digest.

        Raises WrongReference when the pack is damaged, of another version, or for another model.
        """
        folder = directory if (directory / HEADER).is_file() else _only_fitting(directory, aligned)
        header = _header(folder)
        if header.get("aligned") != aligned:
            detail = f"made for another aligned model: {header.get('aligned')}, this one is {aligned}"
            raise WrongReference(detail, field="calibration", file=str(folder))
        if sha256_file(folder / TENSORS) != header.get("tensors"):
            raise WrongReference(f"{TENSORS} is not what the header says", field="calibration", file=str(folder))
        try:
            return cls(header, safe_open(folder / TENSORS, framework="pt", device="cpu"))
        except (SafetensorError, OSError) as error:
            raise WrongReference(f"cannot be read: {error}", field="calibration", file=str(folder)) from error

    @property
    def digest(self) -> str:
        """Of the pack's identity and of its bytes."""
        text = json.dumps([self.header["identity"], self.header["tensors"]])
        return f"sha256:{sha256(text.encode()).hexdigest()}"

    @property
    def settings(self) -> CalibrationSettings:
        """What it was made with."""
        return CalibrationSettings(**self.header["settings"])

    @property
    def names(self) -> tuple[str, ...]:
        """The modules that were looked at, sorted."""
        return tuple(sorted(self.header["modules"]))

    def for_layer(self, layer: LoraLayer) -> LayerCalibration | None:
        """What is known about the module of ``layer``; None when it was not looked at. Raises ShapeMismatch."""
        name, apart = self.entry_of(layer)
        if name is None:
            return None
        whole = self._module(layer.name, name)
        if apart is not None and apart.parts > 1 and whole.numbers.get("unit_parts") != apart.parts:
            return None  # its rows do not stand one part below the other
        found = whole if apart is None else part_of(whole, apart.part, apart.parts)
        if found.shape != layer.shape:
            detail = f"the adapter has {layer.shape}, the calibration {found.shape} (out, in)"
            raise ShapeMismatch(detail, field=layer.name)
        return found

    def entry_of(self, layer: LoraLayer) -> tuple[str | None, Apart | None]:
        """What the module of ``layer`` is called here, and which part of it the layer is; None for neither."""
        apart = None if layer.name in self.header["modules"] else apart_of(layer)
        names = names_of(layer) if apart is None else apart.names
        return next((name for name in names if name in self.header["modules"]), None), apart

    def with_gradients(self, found: Mapping[str, Gradient], left_out: Mapping[str, str]) -> "Calibration":
        """The same with gradients that were taken elsewhere; nothing is known any more about what is ``left_out``."""
        parts = {
            f"{name}/gradient.{part}": getattr(gradient, part).float()
            for name, gradient in found.items()
            for part in ("u", "values", "v", "bias")
        }
        modules = {name: entry for name, entry in self.header["modules"].items() if name not in left_out}
        for name, gradient in found.items():
            numbers = {**modules[name]["numbers"], "gradient_total": gradient.total}
            modules[name] = {**modules[name], "numbers": numbers}
        header = {**self.header, "modules": modules, "left_out": {**self.header["left_out"], **left_out}}
        return Calibration(header, _Above(parts, self._handle))

    def _module(self, called: str, name: str) -> LayerCalibration:
        entry = self.header["modules"][name]
        shape = (int(entry["shape"][0]), int(entry["shape"][1]))

        def read(part: str) -> Tensor:
            owner = entry["inputs"] if part.startswith("inputs.") else name
            tensor: Tensor = self._handle.get_tensor(f"{owner}/{part}")
            return tensor

        return LayerCalibration(name=called, shape=shape, numbers=entry["numbers"], read=read)

    def why_not(self, layer: LoraLayer) -> str:
        """Why nothing is known about a module that `for_layer` has nothing for."""
        known: Mapping[str, str] = self.header["left_out"]
        apart = apart_of(layer)
        names = names_of(layer) if apart is None else apart.names
        left_out = next((known[name] for name in names if name in known), None)
        if left_out is not None:
            return left_out
        if layer.kind is LayerKind.EMBEDDING:
            why = ": it listens to linears, and this is an embedding"
        elif layer.slot is not None and layer.slot.expert is None:
            why = ": it listens to linears and experts, and this is a bare parameter"
        else:
            why = ""
        return f"the calibration did not look at this module{why}"


class _Above:
    """Some tensors in the place of those that a file has under the same names."""

    def __init__(self, tensors: Mapping[str, Tensor], below: Any) -> None:
        self._tensors, self._below = tensors, below

    def get_tensor(self, name: str) -> Tensor:
        found: Tensor = self._tensors[name] if name in self._tensors else self._below.get_tensor(name)
        return found


def write_calibration(
    identity: Identity, modules: Mapping[str, MeasuredModule], directory: Path, *, about: Mapping[str, Any]
) -> None:
    """Write a pack; the folder takes its name only when everything is in it. Raises OutputExists.

    ``about`` goes into the header for people to read: the machine, the number of rows, what was left out.
    """
    tensors = {
        f"{name}/{part}": tensor.to(torch.float32, copy=True).contiguous()  # safetensors refuses shared memory
        for name, module in sorted(modules.items())
        for part, tensor in module.tensors.items()
    }
    entries = {
        name: {"shape": list(module.shape), "numbers": dict(module.numbers), "inputs": module.inputs or name}
        for name, module in sorted(modules.items())
        if not module.left_out
    }
    with fresh_folder(directory) as partial:
        save_file(tensors, partial / TENSORS, metadata={"format": "pt"})
        header = {
            "format": FORMAT,
            "version": VERSION,
            "identity": identity.digest,
            **asdict(identity),
            "tensors": sha256_file(partial / TENSORS),
            "about": dict(about),
            "left_out": {name: module.left_out for name, module in sorted(modules.items()) if module.left_out},
            "modules": entries,
        }
        text = json.dumps(header, indent=1, sort_keys=True, allow_nan=False) + "\n"
        (partial / HEADER).write_text(text, encoding="utf-8")


def known_about(layer: LoraLayer, reference: LayerReference) -> LayerCalibration | str:
    """What was measured at the module of ``layer``, or why a calibrated method can say nothing about it."""
    if reference.calibration is None:
        return reference.uncalibrated
    if delta_energy(layer) == 0:
        return "zero adapter: nothing is added here"
    return reference.calibration


def _only_fitting(store: Path, aligned: str) -> Path:
    folders = sorted(path.parent for path in store.glob(f"*/{HEADER}") if not path.parent.name.startswith("."))
    fitting = [folder for folder in folders if _header(folder).get("aligned") == aligned]
    if len(fitting) == 1:
        return fitting[0]
    what = f"{len(fitting)} packs are for it, name one" if fitting else f"none of {len(folders)} packs is for it"
    raise WrongReference(f"the aligned model is {aligned}: {what}", field="calibration", file=str(store))


def _header(folder: Path) -> dict[str, Any]:
    """The header of a pack of this version; raises WrongReference."""
    try:
        header: Any = json.loads((folder / HEADER).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WrongReference(f"{HEADER} cannot be read: {error}", field="calibration", file=str(folder)) from error
    known = isinstance(header, dict) and (header.get("format"), header.get("version")) == (FORMAT, VERSION)
    if not known or not isinstance(header.get("modules"), dict):
        detail = f"not a calibration of version {VERSION}: make it again with this program"
        raise WrongReference(detail, field="calibration", file=str(folder))
    found: dict[str, Any] = header
    return found
