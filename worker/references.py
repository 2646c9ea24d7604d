"""The models of a reference, opened once and kept warm: the next job of the same queue meets them again.

Before first use every file is hashed and compared with what was registered, so that a statement never names a model
that was not the one measured.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from gate.model import file_digests
from ledger.packs import header_digest
from repair.adapter_file import read_adapter
from repair.basis import BasisPack
from repair.calibration import Calibration
from repair.checkpoint import Checkpoint
from repair.checks.batching import BATCH_TOKENS
from repair.checks.chat import ChatModel
from worker.errors import ReferenceChanged

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ledger.tables import Reference
    from repair.lora import LoraAdapter

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class OpenReference:
    """A reference ready for work."""

    name: str
    aligned: Checkpoint
    base: Checkpoint | None
    chat: ChatModel
    aligned_digest: str
    base_digest: str | None
    patch: LoraAdapter | None = None
    patch_digest: str | None = None
    calibration: Calibration | None = None
    calibration_digest: str | None = None
    basis: BasisPack | None = None
    basis_digest: str | None = None
    twin: LoraAdapter | None = None
    twin_digest: str | None = None


class WarmReferences:
    """Holds the last opened reference; opening another lets the first one go before it loads."""

    def __init__(self, device: str, *, batch_tokens: int = BATCH_TOKENS) -> None:
        self.device = device
        self._batch_tokens = batch_tokens
        self._held: OpenReference | None = None

    def open(self, row: Reference) -> OpenReference:
        """The models of ``row``, verified. Raises ReferenceChanged, which names the file."""
        held = self._held
        if held is None or (held.aligned_digest, held.base_digest) != (row.aligned_digest, row.base_digest):
            held = self._load(row)
        if held.patch_digest != row.patch_digest:
            held = replace(held, patch=open_tool(row, "patch"), patch_digest=row.patch_digest)
        if held.twin_digest != row.twin_digest:
            held = replace(held, twin=open_tool(row, "twin"), twin_digest=row.twin_digest)
        if held.calibration_digest != row.calibration_digest:
            held = replace(held, calibration=open_calibration(row), calibration_digest=row.calibration_digest)
        if held.basis_digest != row.basis_digest:
            held = replace(held, basis=open_basis(row), basis_digest=row.basis_digest)
        self._held = held
        return held

    def _load(self, row: Reference) -> OpenReference:
        """Both models, verified; what was held goes first, so that there is room."""
        self._held = None
        verify_files(Path(row.aligned_path), row.files["aligned"])
        if row.base_path:
            verify_files(Path(row.base_path), row.files["base"])
        log.info("reference_loading", reference=row.name)
        return OpenReference(
            name=row.name,
            aligned=Checkpoint.open(Path(row.aligned_path)),
            base=Checkpoint.open(Path(row.base_path)) if row.base_path else None,
            chat=ChatModel.load(Path(row.aligned_path), self.device, batch_tokens=self._batch_tokens),
            aligned_digest=row.aligned_digest,
            base_digest=row.base_digest,
        )


def open_tool(row: Reference, tool: str) -> LoraAdapter | None:
    """The patch or the twin of a reference, verified; small beside the models. Raises ReferenceChanged."""
    path = {"patch": row.patch_path, "twin": row.twin_path}[tool]
    if path is None:
        return None
    verify_files(Path(path), row.files[tool])
    return read_adapter(Path(path))


def open_calibration(row: Reference) -> Calibration | None:
    """The calibration pack of a reference, verified. Raises ReferenceChanged, or WrongReference when it is damaged."""
    if row.calibration_path is None:
        return None
    verify_pack("calibration", Path(row.calibration_path), row.calibration_digest, row.name)
    return Calibration.open(Path(row.calibration_path), aligned=row.aligned_digest)


def open_basis(row: Reference) -> BasisPack | None:
    """The basis pack of a reference, verified; its modules are when they are read. Raises as `open_calibration`."""
    if row.basis_path is None:
        return None
    verify_pack("basis", Path(row.basis_path), row.basis_digest, row.name)
    return BasisPack.open(Path(row.basis_path), aligned=row.aligned_digest, base=row.base_digest)


def verify_pack(kind: str, folder: Path, registered: str | None, reference: str) -> None:
    """Compare the header of a pack, which pins its other files, with what was registered."""
    try:
        found = header_digest(kind, folder)
    except OSError:
        found = "not there"
    if found != registered:
        again = f"run `lora-repair reference prepare {reference}`"
        raise ReferenceChanged(f"{folder}: the {kind} pack is {found}, registered was {registered}; {again}")


def verify_files(directory: Path, registered: Mapping[str, str]) -> None:
    """Compare a model folder with the digests that were registered."""
    if not directory.is_dir():
        raise ReferenceChanged(f"{directory} is not there; every worker must see the path that was registered")
    found = file_digests(directory)
    for name in sorted({*registered, *found}):
        now, then = found.get(name, "no such file"), registered.get(name, "no such file")
        if now != then:
            raise ReferenceChanged(f"{directory / name}: now {now}, registered was {then}")
