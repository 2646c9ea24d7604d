"""Packs of a reference: what was measured about its models once, so that no job has to measure it again.

A pack is a folder with a header that holds the digest of everything else in it, so the SHA-256 of the header names the
whole. Like a patch it is a tool: what a verdict means does not depend on it. What is inside is `repair`'s business.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from gate.digest import sha256_file
from ledger import audit, references
from ledger.audit import Action, Event
from ledger.clock import utc_now
from ledger.errors import Conflict

if TYPE_CHECKING:
    from datetime import datetime
    from pathlib import Path

    from sqlalchemy.orm import Session

    from ledger.tables import Reference

HEADERS: Final = MappingProxyType({"calibration": "calibration.json", "basis": "basis.json"})
"""Each kind of pack and the file in its folder that pins all others."""


@dataclass(frozen=True, kw_only=True)
class Pack:
    """A pack on disk.

    Attributes:
        kind: One of `HEADERS`.
        path: Its folder, absolute; every worker must see it.
        digest: ``sha256:<hex>`` of its header.
    """

    kind: str
    path: str
    digest: str


def describe(kind: str, folder: Path) -> Pack:
    """Hash the header of a pack for `attach`. Raises OSError when there is none."""
    return Pack(kind=kind, path=str(folder.absolute()), digest=header_digest(kind, folder))


def header_digest(kind: str, folder: Path) -> str:
    """The digest that names the pack in ``folder``. Raises OSError when it has no header."""
    return sha256_file(folder / HEADERS[kind])


def attach(
    tx: Session, name: str, *packs: Pack, aligned_digest: str, actor: str, now: datetime | None = None
) -> Reference:
    """Give a reference packs that were made for its aligned model; one of each kind, in the place of an older one.

    Raises:
        NotFound: there is no such reference.
        Conflict: the packs were made for another aligned model.
    """
    row = references.get(tx, name)
    if row.aligned_digest != aligned_digest:
        raise Conflict("reference", name, "stands for another model than the packs were made for")
    before = {pack.kind: getattr(row, f"{pack.kind}_digest") for pack in packs}
    for pack in packs:
        setattr(row, f"{pack.kind}_path", pack.path)
        setattr(row, f"{pack.kind}_digest", pack.digest)
    changed = [pack for pack in packs if before[pack.kind] != pack.digest]
    tx.flush()
    events = [_event(name, pack, actor, before[pack.kind]) for pack in changed]
    if events:
        audit.append(tx, *events, now=now or utc_now())
    return row


def _event(name: str, pack: Pack, actor: str, before: str | None) -> Event:
    return Event(
        actor=actor,
        action=Action.REFERENCE_PREPARED,
        subject_type="reference",
        subject_id=name,
        digest=pack.digest,
        detail={"pack": pack.kind, "before": before},
    )
