"""The audit log: append in the transaction of the change itself, search, verify, export.

Each event carries the hash of the one before (`audit_chain.py`). The chain makes tampering evident, it does
not prevent it: who owns the database can rewrite all of it, so note the head (`head`) elsewhere now and then
and hand it to `verify`.

Appending locks the head row until the transaction ends. A transaction that also locks other rows must lock
those first, or two of them may wait for each other.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import rfc8785
from sqlalchemy import insert, select, update

from ledger.audit_chain import Break, ChainReport, Head, Why, content, line_of, link_hash, walk
from ledger.clock import utc_now
from ledger.errors import SchemaError, UnloggableEvent
from ledger.ids import new_id
from ledger.paging import Page, page
from ledger.tables import AuditEvent, AuditHead

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from datetime import datetime

    from sqlalchemy.orm import Session

    from ledger.columns import Json

_LONGEST = {"actor": 200, "action": 64, "subject_type": 32, "subject_id": 200, "digest": 80, "outcome": 200}
_BATCH = 1000


class Action(StrEnum):
    """What happened; dotted, past tense. Members are never renamed: old rows keep their words."""

    # The gate let an upload in.
    ADAPTER_UPLOADED = "adapter.uploaded"
    # The gate refused an upload; nothing else of it remains.
    ADAPTER_REFUSED = "adapter.refused"
    REFERENCE_ADDED = "reference.added"
    # The same models, in other folders.
    REFERENCE_MOVED = "reference.moved"
    # It got a refusal patch, or another one.
    REFERENCE_PATCHED = "reference.patched"
    # It got a harmful twin, or another one.
    REFERENCE_TWINNED = "reference.twinned"
    # It got a pack of what was measured about its models, or another one.
    REFERENCE_PREPARED = "reference.prepared"
    BATCH_OPENED = "batch.opened"
    BATCH_CANCELLED = "batch.cancelled"
    # A job was ordered.
    JOB_OPENED = "job.opened"
    # The relay gave its message to the broker.
    JOB_DISPATCHED = "job.dispatched"
    # Its message was not taken in time and will be sent again.
    JOB_REDISPATCHED = "job.redispatched"
    # A worker took the lease.
    JOB_CLAIMED = "job.claimed"
    # The lease ran out: the worker died or hung.
    JOB_LEASE_LOST = "job.lease_lost"
    # The worker gave the job back, because it is shutting down.
    JOB_RETURNED = "job.returned"
    # A passing error; the job waits for its next attempt.
    JOB_RETRIED = "job.retried"
    JOB_SUCCEEDED = "job.succeeded"
    # An error that no retry mends.
    JOB_FAILED = "job.failed"
    JOB_CANCEL_REQUESTED = "job.cancel_requested"
    JOB_CANCELLED = "job.cancelled"
    # All attempts are used up.
    JOB_DIED = "job.died"
    # Somebody gave a job that had failed or died a new set of attempts.
    JOB_REQUEUED = "job.requeued"
    # A worker came back with a result after its lease was lost; the result was thrown away.
    JOB_FENCED_OFF = "job.fenced_off"
    # Files became available as safe.
    ARTIFACT_RELEASED = "artifact.released"
    # No candidate met the policy.
    ADAPTER_QUARANTINED = "adapter.quarantined"
    ARTIFACT_DOWNLOADED = "artifact.downloaded"
    # Somebody took the bytes of an upload away, which nobody vouches for.
    UPLOAD_DOWNLOADED = "upload.downloaded"
    TOKEN_MINTED = "token.minted"  # noqa: S105 - an event, not a password
    TOKEN_REVOKED = "token.revoked"  # noqa: S105 - as above
    # Somebody took the whole log away.
    AUDIT_EXPORTED = "audit.exported"
    # A blob's bytes are not those that its digest names.
    BLOB_DAMAGED = "blob.damaged"


@dataclass(frozen=True, kw_only=True)
class Event:
    """A fact to remember. Ids and digests only: free text that a person wrote does not belong here."""

    # `token:<id>`, `worker:<name>` or `system:<part>`.
    actor: str
    action: Action
    subject_type: str
    subject_id: str
    digest: str | None = None
    outcome: str | None = None
    reason: str | None = None
    detail: Json = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Query:
    """What to search for; every condition that is given must hold. `since` is inclusive, `until` is not."""

    actor: str | None = None
    action: str | None = None
    subject_type: str | None = None
    subject_id: str | None = None
    since: datetime | None = None
    until: datetime | None = None


def append(tx: Session, *events: Event, now: datetime | None = None) -> Head:
    """Write events at the end of the chain, in the caller's transaction.

    Raises:
        UnloggableEvent: a value has no canonical form (NaN, an integer beyond 2**53, NUL) or is too long.
    """
    at = now or utc_now()
    head = _locked_head(tx)
    rows = []
    for event in events:
        row = _row(event, head, at)
        rows.append(row)
        head = Head(seq=row["seq"], hash=row["hash"])
        # One at a time: the trigger lets the head move by one link only.
        tx.execute(insert(AuditEvent).values(**row))
        tx.execute(update(AuditHead).where(AuditHead.id == 1).values(seq=head.seq, hash=head.hash))
    return head


def head(tx: Session) -> Head:
    """The last link as it stands."""
    return _head_of(tx.execute(select(AuditHead.seq, AuditHead.hash).where(AuditHead.id == 1)).one_or_none())


def search(
    tx: Session, query: Query, *, after: str | None = None, limit: int = 50, newest_first: bool = True
) -> Page[AuditEvent]:
    """Events that match, a page at a time; ``after`` is the `next` of the page before."""
    found = select(AuditEvent)
    for name in ("actor", "action", "subject_type", "subject_id"):
        if (value := getattr(query, name)) is not None:
            found = found.where(getattr(AuditEvent, name) == value)
    if query.since is not None:
        found = found.where(AuditEvent.at >= query.since)
    if query.until is not None:
        found = found.where(AuditEvent.at < query.until)
    return page(
        tx,
        found,
        by=AuditEvent.seq,
        after=int(after) if after is not None else None,
        limit=limit,
        key_of=lambda event: event.seq,
        newest_first=newest_first,
    )


def note_export(tx: Session, *, actor: str, now: datetime | None = None) -> Head:
    """Remember that somebody takes the log away. Call it before `export`, which then ends with this very event."""
    event = Event(actor=actor, action=Action.AUDIT_EXPORTED, subject_type="audit", subject_id="log")
    return append(tx, event, now=now)


def export(tx: Session, *, after: int = 0) -> Iterator[str]:
    """The log as JSON lines, oldest first, with their hashes: enough to verify without this database."""
    for row in stream(tx, after=after):
        yield line_of(row)


def verify(tx: Session, *, noted: Head | None = None) -> ChainReport:
    """Walk the chain from its first row to its head; ``noted``, a head kept elsewhere, must be in it.

    The head is read before and after, because other transactions may append while we walk.
    """
    before = head(tx)
    report = walk(stream(tx), heads=(before, noted) if noted else (before,))
    if report.ok and report.last.seq > (after := head(tx)).seq:
        return replace(report, broken=Break(seq=after.seq + 1, why=Why.HEAD_MISMATCH))
    return report


def stream(tx: Session, *, after: int = 0) -> Iterator[Mapping[str, Any]]:
    """Every row after a sequence number, oldest first, in flat memory."""
    columns = AuditEvent.__table__.columns
    query = select(*columns).where(AuditEvent.seq > after).order_by(AuditEvent.seq)
    # Closed here, because a walk may end at the first broken row.
    with tx.execute(query.execution_options(yield_per=_BATCH)) as rows:
        for row in rows:
            yield row._asdict()


def _row(event: Event, head: Head, at: datetime) -> dict[str, Any]:
    row: dict[str, Any] = {
        "seq": head.seq + 1,
        "id": new_id(),
        "at": at,
        "actor": event.actor,
        "action": event.action.value,
        "subject_type": event.subject_type,
        "subject_id": event.subject_id,
        "digest": event.digest,
        "outcome": event.outcome,
        "reason": event.reason,
        "detail": event.detail,
    }
    for name, longest in _LONGEST.items():
        if row[name] is not None and len(row[name]) > longest:
            raise UnloggableEvent(f"{name} of {event.action} is longer than {longest} characters")
    if any("\0" in value for value in row.values() if isinstance(value, str)):
        raise UnloggableEvent(f"{event.action}: a NUL character cannot be stored")
    return {**row, "prev_hash": head.hash, "hash": link_hash(head.hash, _canonical(event, content(row)))}


def _canonical(event: Event, hashed: Json) -> Json:
    """Refuse what would read back as something else, for then the chain would break by itself."""
    try:
        text = rfc8785.dumps(hashed)
        again = rfc8785.dumps(json.loads(text))
    except (rfc8785.CanonicalizationError, UnicodeError, TypeError) as error:
        raise UnloggableEvent(f"{event.action}: {error}") from error
    if again != text:
        raise UnloggableEvent(f"{event.action}: the detail does not survive being stored")
    return hashed


def _locked_head(tx: Session) -> Head:
    query = select(AuditHead.seq, AuditHead.hash).where(AuditHead.id == 1).with_for_update()
    return _head_of(tx.execute(query).one_or_none())


def _head_of(row: Any) -> Head:
    if row is None:
        raise SchemaError("the audit log has no head: its row was deleted, or the migrations did not run")
    return Head(seq=row.seq, hash=row.hash)
