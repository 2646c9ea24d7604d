"""A basis pack on disk: the leading singular triplets of what alignment changed in every linear of one model pair.

Made once for a pair (`measure_basis.py`), then read instead of both checkpoints. A pack is a folder named by the digest
of all that decides it: both models and the settings. One file for each module, so that a repair reads only the modules
its adapter has and making a pack holds one module at a time. It appears whole or not at all, and is refused by name
when it is damaged, of another version, or made for another pair.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from safetensors import SafetensorError, safe_open
from torch import Tensor

from gate.digest import sha256_file
from repair.checkpoint import short_name
from repair.errors import BadParameters, ShapeMismatch, WrongReference
from repair.layer_basis import LayerBasis
from repair.lora import LoraLayer

HEADER: Final = "basis.json"
FORMAT: Final = "lora-repair/basis"
VERSION: Final = 1
TOLERANCE: Final = 0.01
"""Relative error up to which the truncated operator stands for the whole one, unless another is asked for."""


@dataclass(frozen=True, kw_only=True)
class BasisSettings:
    """How closely a pair is looked at. Part of the pack's identity.

    Attributes:
        rank: Singular triplets kept of each module.
        oversample: Directions carried along while looking for them.
        power: Rounds of subspace iteration; each reads v twice.
        inputs: Keep the input side too: twice the size, needed to add directions back (`resta`, `lox`, `lssf`).
    """

    rank: int = 64
    oversample: int = 16
    power: int = 2
    inputs: bool = True

    def __post_init__(self) -> None:
        """Refuse by name what could not be looked for."""
        for name, least in (("rank", 1), ("oversample", 1), ("power", 0)):
            if getattr(self, name) < least:
                raise BadParameters(f"at least {least}", field=name)


@dataclass(frozen=True, kw_only=True)
class BasisIdentity:
    """All that decides a pack's numbers, up to the rounding of another machine.

    Attributes:
        aligned: Digest of the aligned model's folder.
        base: Digest of the folder of the same model before alignment.
        settings: See there.
    """

    aligned: str
    base: str
    settings: BasisSettings

    @property
    def digest(self) -> str:
        """``sha256:<hex>`` of it all; the pack's name."""
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, sort_keys=True)
        return f"sha256:{sha256(text.encode()).hexdigest()}"

    def folder(self, store: Path) -> Path:
        """Where the pack lies among others."""
        return store / self.digest.removeprefix("sha256:")


class BasisPack:
    """An opened pack."""

    def __init__(self, folder: Path, header: Mapping[str, Any], tolerance: float) -> None:
        """Use `open`."""
        self.folder = folder
        self.header = header
        self.tolerance = tolerance
        self._verified: set[str] = set()
        self._latest: tuple[str, Any] = "", None  # a pack of a large model has more files than a process may open

    @classmethod
    def open(
        cls, directory: Path, *, aligned: str | None = None, base: str | None = None, tolerance: float = TOLERANCE
    ) -> "BasisPack":
        """The pack in ``directory``, or the only one among its folders that is for the models with these digests.

        A digest that is not given is not compared. Raises WrongReference when the pack is damaged, of another version,
        or for another pair. The file of a module is compared with its digest when it is first read.
        """
        wanted = {"aligned": aligned, "base": base}
        folder = directory if (directory / HEADER).is_file() else _only_fitting(directory, wanted)
        header = _header(folder)
        for name, digest in wanted.items():
            if digest is not None and header.get(name) != digest:
                detail = f"made for another {name} model: {header.get(name)}, this one is {digest}"
                raise WrongReference(detail, field="basis", file=str(folder))
        return cls(folder, header, tolerance)

    @property
    def digest(self) -> str:
        """Of the pack's identity and of its modules, numbers and bytes."""
        text = json.dumps([self.header["identity"], self.header["modules"]], sort_keys=True)
        return f"sha256:{sha256(text.encode()).hexdigest()}"

    @property
    def names(self) -> tuple[str, ...]:
        """The modules that were looked at, sorted."""
        return tuple(sorted(self.header["modules"]))

    def for_layer(self, layer: LoraLayer) -> LayerBasis | str:
        """What is known about the module of ``layer``, or why nothing is. Raises ShapeMismatch."""
        name = self._named(layer.name)
        if name is None:
            why: str = self.header["left_out"].get(layer.name, "it has no such module")
            return why
        if layer.transposed:
            return "it holds weights that are stored as out x in"
        entry = self.header["modules"][name]
        shape = (int(entry["shape"][0]), int(entry["shape"][1]))
        if shape != layer.shape:
            detail = f"the adapter has {layer.shape}, the basis pack {shape} (out, in)"
            raise ShapeMismatch(detail, field=layer.name, file=str(self.folder))
        settings = self.header["settings"]
        return LayerBasis(
            name=layer.name,
            shape=shape,
            asked=settings["rank"],
            kept=entry["kept"],
            inputs=settings["inputs"],
            **entry["numbers"],
            blank=entry["blank"],
            tolerance=self.tolerance,
            unusable=entry["unusable"],
            read=lambda part: self._read(name, part),
        )

    def _named(self, module: str) -> str | None:
        """This module's name in the pack: the full one, else the one that differs in the prefix only."""
        if module in self.header["modules"]:
            return module
        alike = self._by_short_name.get(short_name(module), [])
        return alike[0] if len(alike) == 1 else None

    @cached_property
    def _by_short_name(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name in self.names:
            found.setdefault(short_name(name), []).append(name)
        return found

    def _read(self, name: str, part: str) -> Tensor:
        entry = self.header["modules"][name]
        path = self.folder / str(entry["file"])
        try:
            self._verify(name, path)
            latest = self._latest  # held, for other threads read other modules meanwhile
            if latest[0] != name:
                self._latest = latest = name, safe_open(path, framework="pt", device="cpu")
            tensor: Tensor = latest[1].get_tensor(part)
        except (SafetensorError, OSError) as error:
            raise WrongReference(f"cannot be read: {error}", field=name, file=str(path)) from error
        return tensor

    def _verify(self, name: str, path: Path) -> None:
        """A file is compared with its digest before anything is taken from it, once."""
        if name in self._verified:
            return
        if path.parent != self.folder or sha256_file(path) != self.header["modules"][name]["digest"]:
            raise WrongReference("the file is not what the header says", field=name, file=str(path))
        self._verified.add(name)


def _only_fitting(store: Path, wanted: Mapping[str, str | None]) -> Path:
    folders = sorted(path.parent for path in store.glob(f"*/{HEADER}") if not path.parent.name.startswith("."))
    given = {name: digest for name, digest in wanted.items() if digest is not None}
    fitting = [folder for folder in folders if given.items() <= _header(folder).items()]
    if len(fitting) == 1:
        return fitting[0]
    what = f"{len(fitting)} packs are for them, name one" if fitting else f"none of {len(folders)} packs is for them"
    whose = ", ".join(f"{name} {digest}" for name, digest in given.items()) or "any pair"
    raise WrongReference(f"the models are {whose}: {what}", field="basis", file=str(store))


def _header(folder: Path) -> dict[str, Any]:
    """The header of a pack of this version; raises WrongReference."""
    try:
        header: Any = json.loads((folder / HEADER).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise WrongReference(f"{HEADER} cannot be read: {error}", field="basis", file=str(folder)) from error
    known = isinstance(header, dict) and (header.get("format"), header.get("version")) == (FORMAT, VERSION)
    if not known or not all(isinstance(header.get(key), dict) for key in ("modules", "left_out")):
        detail = f"not a basis pack of version {VERSION}: make it again with this program"
        raise WrongReference(detail, field="basis", file=str(folder))
    found: dict[str, Any] = header
    if _identity(found) != found.get("identity"):
        detail = "its identity is not that of the models and settings that it names"
        raise WrongReference(detail, field="basis", file=str(folder))
    return found


def _identity(header: Mapping[str, Any]) -> str | None:
    """The digest of what a header says about itself; None when it says too little."""
    try:
        settings = BasisSettings(**header["settings"])
        return BasisIdentity(aligned=header["aligned"], base=header["base"], settings=settings).digest
    except (KeyError, TypeError, BadParameters):
        return None
