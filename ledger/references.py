"""References: named pairs of models that adapters are measured against. A name never changes its meaning.

A reference may carry a *patch*, a refusal LoRA for its aligned model that the method `patch` adds to an adapter, and a
*twin*, a LoRA for the same model that obeys harmful requests, which methods of the safety vector subtract. They are
tools: what a verdict means does not depend on them, so they may be given later or replaced. So are its packs
(`packs.py`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from sqlalchemy import select

from gate.admission import admit
from gate.digest import root_digest
from gate.measurable import require_plain
from gate.model import file_digests, model_shapes, require_unrounded
from ledger import audit
from ledger.audit import Action, Event
from ledger.clock import utc_now
from ledger.errors import Conflict, NotFound, UnfitName
from ledger.tables import Reference

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime
    from pathlib import Path

    from sqlalchemy.orm import Session


# It names a queue of the broker and a path of the API.
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}")


# What a reference may be given later, and the event of that.
TOOLS: Final = {"patch": Action.REFERENCE_PATCHED, "twin": Action.REFERENCE_TWINNED}


@dataclass(frozen=True, kw_only=True)
class NewReference:
    """A pair of checkpoints on disk, with what was read from them."""

    name: str
    aligned_path: str
    aligned_digest: str
    base_path: str | None = None
    base_digest: str | None = None
    patch_path: str | None = None
    patch_digest: str | None = None
    twin_path: str | None = None
    twin_digest: str | None = None
    # {"aligned": {file: digest}, "base": {file: digest}, "patch": {file: digest}, "twin": {file: digest}}
    files: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    # {module: (out_features, in_features)}
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def add(tx: Session, new: NewReference, *, actor: str, now: datetime | None = None) -> Reference:
    """Add a reference. The same pair again is no error: it may have moved, or bring a patch or a twin.

    Without a patch or a twin the one that is known stays.

    Raises:
        Conflict: the name stands for other models already; verdicts given under it must keep their meaning.
    """
    now = now or utc_now()
    known = tx.get(Reference, new.name, with_for_update={"key_share": True})
    if known is not None:
        if (known.aligned_digest, known.base_digest) != (new.aligned_digest, new.base_digest):
            raise Conflict("reference", new.name, "stands for other models; choose another name")
        if events := [*_moved(known, new, actor), *_equipped(known, new, actor)]:
            tx.flush()
            audit.append(tx, *events, now=now)
        return known
    reference = Reference(
        name=new.name,
        aligned_path=new.aligned_path,
        base_path=new.base_path,
        aligned_digest=new.aligned_digest,
        base_digest=new.base_digest,
        files={part: dict(files) for part, files in new.files.items()},
        shapes={module: list(shape) for module, shape in new.shapes.items()},
        created_at=now,
        patch_path=new.patch_path,
        patch_digest=new.patch_digest,
        twin_path=new.twin_path,
        twin_digest=new.twin_digest,
    )
    tx.add(reference)
    tx.flush()
    others = {"base_digest": new.base_digest, "patch_digest": new.patch_digest}
    if new.twin_digest is not None:
        others["twin_digest"] = new.twin_digest
    audit.append(tx, _event(reference, Action.REFERENCE_ADDED, actor, digest=new.aligned_digest, **others), now=now)
    return reference


def _moved(known: Reference, new: NewReference, actor: str) -> list[Event]:
    """Take over other folders of the same models. Which parts moved is logged; paths are an operator's own words."""
    paths = {"aligned": (known.aligned_path, new.aligned_path), "base": (known.base_path, new.base_path)}
    for tool in TOOLS:
        digest = getattr(new, f"{tool}_digest")
        if digest is not None and digest == getattr(known, f"{tool}_digest"):
            paths[tool] = (getattr(known, f"{tool}_path"), getattr(new, f"{tool}_path"))
    moved = [part for part, (before, after) in paths.items() if before != after]
    if not moved:
        return []
    for part in moved:
        setattr(known, f"{part}_path", paths[part][1])
    return [_event(known, Action.REFERENCE_MOVED, actor, digest=known.aligned_digest, moved=moved)]


def _equipped(known: Reference, new: NewReference, actor: str) -> list[Event]:
    """Take over another patch or twin, where one is given."""
    events = []
    for tool, action in TOOLS.items():
        digest, before = getattr(new, f"{tool}_digest"), getattr(known, f"{tool}_digest")
        if digest in {None, before}:
            continue
        setattr(known, f"{tool}_path", getattr(new, f"{tool}_path"))
        setattr(known, f"{tool}_digest", digest)
        known.files = {**known.files, tool: dict(new.files[tool])}
        events.append(_event(known, action, actor, digest=digest, before=before))
    return events


def _event(reference: Reference, action: Action, actor: str, *, digest: str | None, **detail: object) -> Event:
    return Event(
        actor=actor,
        action=action,
        subject_type="reference",
        subject_id=reference.name,
        digest=digest,
        detail=detail,
    )


def get(tx: Session, name: str) -> Reference:
    """The reference. Raises `NotFound`."""
    reference = tx.get(Reference, name)
    if reference is None:
        raise NotFound("reference", name)
    return reference


def describe(
    name: str, *, aligned: Path, base: Path | None = None, patch: Path | None = None, twin: Path | None = None
) -> NewReference:
    """Read a pair of checkpoints for `add`: every file is hashed, so do it before the transaction begins.

    Raises:
        UnfitName: the name cannot be a queue and a path of the API.
        Refused: a folder holds no checkpoint that the gate can read, or a quantised one, or a patch that is no adapter
            of this model, or a twin that is not a plain one.
    """
    if _NAME.fullmatch(name) is None:
        raise UnfitName("reference", name)
    given = {"aligned": aligned, "base": base, "patch": patch, "twin": twin}
    folders = {part: folder.absolute() for part, folder in given.items() if folder is not None}
    for part in folders.keys() - {"patch", "twin"}:
        require_unrounded(folders[part])
    shapes = model_shapes(folders["aligned"])
    if patch is not None:
        admit(folders["patch"], shapes=shapes)
    if twin is not None:
        require_plain(admit(folders["twin"], shapes=shapes))
    files = {part: file_digests(folder) for part, folder in folders.items()}
    return NewReference(
        name=name,
        aligned_path=str(folders["aligned"]),
        aligned_digest=root_digest(files["aligned"]),
        base_path=str(folders["base"]) if base else None,
        base_digest=root_digest(files["base"]) if base else None,
        patch_path=str(folders["patch"]) if patch else None,
        patch_digest=root_digest(files["patch"]) if patch else None,
        twin_path=str(folders["twin"]) if twin else None,
        twin_digest=root_digest(files["twin"]) if twin else None,
        files=files,
        shapes=shapes,
    )


def names(tx: Session) -> tuple[str, ...]:
    """The name of each reference, sorted."""
    return tuple(tx.scalars(select(Reference.name).order_by(Reference.name)))


def every(tx: Session) -> Sequence[Reference]:
    """All references, by name."""
    return tx.scalars(select(Reference).order_by(Reference.name)).all()


def optional_parts(reference: Reference) -> dict[str, str | None]:
    """The digest of each part that a reference may be without."""
    return {
        "base": reference.base_digest,
        "patch": reference.patch_digest,
        "calibration": reference.calibration_digest,
        "twin": reference.twin_digest,
    }


def shapes_of(reference: Reference) -> dict[str, tuple[int, ...]]:
    """Each module's (out_features, in_features), as the gate wants them."""
    return {module: tuple(int(side) for side in shape) for module, shape in reference.shapes.items()}
