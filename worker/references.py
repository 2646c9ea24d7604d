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
from repair.adapter_file import read_adapter
from repair.checkpoint import Checkpoint
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


class WarmReferences:
    """Holds the last opened reference; opening another lets the first one go before it loads."""

    def __init__(self, device: str) -> None:
        self.device = device
        self._held: OpenReference | None = None

    def open(self, row: Reference) -> OpenReference:
        """The models of ``row``, verified. Raises ReferenceChanged, which names the file."""
        held = self._held
        if held is None or (held.aligned_digest, held.base_digest) != (row.aligned_digest, row.base_digest):
            held = self._load(row)
        if held.patch_digest != row.patch_digest:
            held = replace(held, patch=open_patch(row), patch_digest=row.patch_digest)
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
            chat=ChatModel.load(Path(row.aligned_path), self.device),
            aligned_digest=row.aligned_digest,
            base_digest=row.base_digest,
        )


def open_patch(row: Reference) -> LoraAdapter | None:
    """The patch of a reference, verified; small beside the models. Raises ReferenceChanged."""
    if row.patch_path is None:
        return None
    verify_files(Path(row.patch_path), row.files["patch"])
    return read_adapter(Path(row.patch_path))


def verify_files(directory: Path, registered: Mapping[str, str]) -> None:
    """Compare a model folder with the digests that were registered."""
    if not directory.is_dir():
        raise ReferenceChanged(f"{directory} is not there; every worker must see the path that was registered")
    found = file_digests(directory)
    for name in sorted({*registered, *found}):
        now, then = found.get(name, "no such file"), registered.get(name, "no such file")
        if now != then:
            raise ReferenceChanged(f"{directory / name}: now {now}, registered was {then}")
