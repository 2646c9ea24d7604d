"""Uploaded adapters and released artifacts: their rows; their bytes are blobs, named by digest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sqlalchemy import select

from ledger import audit
from ledger.audit import Action, Event
from ledger.clock import utc_now
from ledger.errors import NotFound
from ledger.ids import new_id
from ledger.paging import Page, page
from ledger.tables import Adapter, Artifact, Job, Reference, Statement

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from datetime import datetime

    from sqlalchemy import Select
    from sqlalchemy.orm import Session

    from ledger.columns import Json

LONGEST_NAME = 200
_ROWS_AT_A_TIME = 100


@dataclass(frozen=True, kw_only=True)
class NewAdapter:
    """What the gate found in an upload whose files are in the blob store."""

    name: str
    # Root digest over the files.
    digest: str
    size: int
    # [{"name", "size", "sha256"}]
    files: list[Json]
    inspection: Json
    reference: str | None = None
    samples_digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why the gate refused an upload: which file, which field, which rule."""

    file: str | None
    field: str | None
    rule: str
    detail: str
    digest: str | None = None


@dataclass(frozen=True, kw_only=True)
class AdapterFilter:
    """Which adapters; every condition that is given must hold. `since` is inclusive, `until` is not."""

    reference: str | None = None
    name: str | None = None
    digest: str | None = None
    uploaded_by: str | None = None
    since: datetime | None = None
    until: datetime | None = None


def create(tx: Session, new: NewAdapter, *, uploaded_by: str, now: datetime | None = None) -> Adapter:
    """Remember an upload that the gate let in, with its audit event.

    Raises:
        NotFound: it names a reference that does not exist.
    """
    now = now or utc_now()
    if new.reference is not None and tx.get(Reference, new.reference) is None:
        raise NotFound("reference", new.reference)
    adapter = Adapter(
        id=new_id(),
        name=new.name[:LONGEST_NAME],
        digest=new.digest,
        size=new.size,
        files=new.files,
        inspection=new.inspection,
        reference=new.reference,
        samples_digest=new.samples_digest,
        uploaded_by=uploaded_by,
        created_at=now,
    )
    tx.add(adapter)
    tx.flush()
    event = Event(
        actor=uploaded_by,
        action=Action.ADAPTER_UPLOADED,
        subject_type="adapter",
        subject_id=adapter.id,
        digest=adapter.digest,
        detail={"size": adapter.size},
    )
    audit.append(tx, event, now=now)
    return adapter


def record_refusal(tx: Session, refusal: Refusal, *, uploaded_by: str, now: datetime | None = None) -> str:
    """All that remains of a refused upload: one audit event. Returns the id that it is filed under."""
    subject = new_id()
    event = Event(
        actor=uploaded_by,
        action=Action.ADAPTER_REFUSED,
        subject_type="upload",
        subject_id=subject,
        digest=refusal.digest,
        outcome="refused",
        reason=_harmless(refusal.rule),
        # The names come from a hostile file; they are cut and cleaned so that they can be stored and shown.
        detail={
            "file": _harmless(refusal.file),
            "field": _harmless(refusal.field),
            "rule": _harmless(refusal.rule),
            "detail": _harmless(refusal.detail),
        },
    )
    audit.append(tx, event, now=now)
    return subject


def get(tx: Session, adapter_id: str) -> Adapter:
    """The adapter. Raises `NotFound`."""
    adapter = tx.get(Adapter, adapter_id)
    if adapter is None:
        raise NotFound("adapter", adapter_id)
    return adapter


def search(
    tx: Session,
    wanted: AdapterFilter,
    *,
    after: str | None = None,
    limit: int = 50,
    newest_first: bool = True,
) -> Page[Adapter]:
    """Adapters that match, a page at a time; ``after`` is the `next` of the page before."""
    query = filtered(wanted)
    return page(
        tx,
        query,
        by=Adapter.id,
        after=after,
        limit=limit,
        key_of=lambda row: row.id,
        newest_first=newest_first,
    )


def filtered(wanted: AdapterFilter) -> Select[Adapter]:
    """The query behind a filter."""
    query = select(Adapter)
    for name in ("reference", "name", "digest", "uploaded_by"):
        if (value := getattr(wanted, name)) is not None:
            query = query.where(getattr(Adapter, name) == value)
    if wanted.since is not None:
        query = query.where(Adapter.created_at >= wanted.since)
    if wanted.until is not None:
        query = query.where(Adapter.created_at < wanted.until)
    return query


def of_batch(tx: Session, batch_id: str) -> Iterator[Adapter]:
    """The adapter of each job of a batch, in the order of ids; a part of them at a time."""
    chosen = select(Job.adapter_id).where(Job.batch_id == batch_id)
    query = select(Adapter).where(Adapter.id.in_(chosen)).order_by(Adapter.id)
    return iter(tx.scalars(query.execution_options(yield_per=_ROWS_AT_A_TIME)))


def artifact(tx: Session, digest: str) -> Artifact:
    """The released files with this root digest. Raises `NotFound`: what was not released has no row."""
    found = tx.get(Artifact, digest)
    if found is None:
        raise NotFound("artifact", digest)
    return found


def statements(tx: Session, artifact_digest: str) -> Sequence[Statement]:
    """Every attestation about an artifact, oldest first."""
    query = select(Statement).where(Statement.artifact_digest == artifact_digest).order_by(Statement.id)
    return tx.scalars(query).all()


def search_statements(
    tx: Session,
    *,
    artifact_digest: str | None = None,
    predicate_type: str | None = None,
    after: str | None = None,
    limit: int = 50,
) -> Page[Statement]:
    """Attestations that match, newest first."""
    query = select(Statement)
    if artifact_digest is not None:
        query = query.where(Statement.artifact_digest == artifact_digest)
    if predicate_type is not None:
        query = query.where(Statement.predicate_type == predicate_type)
    return page(tx, query, by=Statement.id, after=after, limit=limit, key_of=lambda row: row.id)


def _harmless(text: str | None) -> str | None:
    if text is None:
        return None
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in text[:LONGEST_NAME])
