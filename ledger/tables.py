"""Every row that outlives a process, typed; states and their meaning. Knows no query and no rule.

Identifiers are UUIDv7 text, so the primary key is also the order of making. Digests carry their algorithm.
Times are aware and UTC. JSON columns keep their text as written (`json`, not `jsonb`): audit events are
hashed over it.
"""

from __future__ import annotations

from datetime import datetime  # noqa: TC003 - SQLAlchemy reads the annotations at run time
from enum import StrEnum

from sqlalchemy import BigInteger, CheckConstraint, ForeignKey, Index, Integer, String, Text, text
from sqlalchemy.orm import Mapped, mapped_column

from ledger.columns import Base, Digest, Hex64, Ident, Json, Sequence, enum_column


class JobState(StrEnum):
    """Where a job stands; `jobs.TRANSITIONS` says what may follow what."""

    # Waiting for the relay to publish it, perhaps until `not_before`.
    QUEUED = "queued"
    # Its message was handed to the broker; no worker has claimed it.
    DISPATCHED = "dispatched"
    # A worker holds the lease.
    RUNNING = "running"
    # It ended with a verdict, whichever one.
    SUCCEEDED = "succeeded"
    # It ended with an error that no retry mends.
    FAILED = "failed"
    CANCELLED = "cancelled"
    # Attempts used up: every one lost its lease or met a passing error. Our dead-letter queue.
    DEAD = "dead"


FINAL_STATES = frozenset({JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED, JobState.DEAD})


class Verdict(StrEnum):
    """The answer to an upload."""

    # It met the policy untouched; its bytes are unchanged.
    RELEASED_UNCHANGED = "released_unchanged"
    # A repaired candidate met the policy.
    RELEASED_REPAIRED = "released_repaired"
    # No candidate met the policy; nothing can be downloaded as safe.
    QUARANTINED = "quarantined"
    # Malformed or hostile.
    REFUSED = "refused"


RELEASING = frozenset({Verdict.RELEASED_UNCHANGED, Verdict.RELEASED_REPAIRED})


class Token(Base):
    """A bearer token; only its hash is kept."""

    __tablename__ = "token"

    id: Mapped[str] = mapped_column(Ident, primary_key=True)
    name: Mapped[str]
    secret_hash: Mapped[str] = mapped_column(Hex64, unique=True)
    last4: Mapped[str] = mapped_column(String(4))
    scopes: Mapped[list[str]]
    created_by: Mapped[str]
    created_at: Mapped[datetime]
    expires_at: Mapped[datetime | None]
    revoked_at: Mapped[datetime | None]
    last_used_at: Mapped[datetime | None]


class Reference(Base):
    """A named pair of models: the aligned one and, where known, its unaligned base; with a patch or a harmful twin."""

    __tablename__ = "reference"

    name: Mapped[str] = mapped_column(String(100), primary_key=True)
    aligned_path: Mapped[str] = mapped_column(Text)
    base_path: Mapped[str | None] = mapped_column(Text)
    aligned_digest: Mapped[str] = mapped_column(Digest)
    base_digest: Mapped[str | None] = mapped_column(Digest)
    # {"aligned": {file: digest}, "base": {file: digest}, "patch": {file: digest}, "twin": {file: digest}}
    files: Mapped[Json]
    # {module: [out_features, in_features]}
    shapes: Mapped[Json]
    created_at: Mapped[datetime]
    # A refusal LoRA that was trained for the aligned model: a tool, no part of what the name stands for.
    patch_path: Mapped[str | None] = mapped_column(Text)
    patch_digest: Mapped[str | None] = mapped_column(Digest)
    # What was measured about the models once (`packs.py`): tools as well. Digests are those of their headers.
    calibration_path: Mapped[str | None] = mapped_column(Text)
    calibration_digest: Mapped[str | None] = mapped_column(Digest)
    basis_path: Mapped[str | None] = mapped_column(Text)
    basis_digest: Mapped[str | None] = mapped_column(Digest)
    # A LoRA for the aligned model that obeys harmful requests, to be subtracted: a tool like the patch.
    twin_path: Mapped[str | None] = mapped_column(Text)
    twin_digest: Mapped[str | None] = mapped_column(Digest)


class Adapter(Base):
    """An uploaded LoRA that the gate let in. Its bytes are blobs, named in `files`."""

    __tablename__ = "adapter"
    __table_args__ = (Index(None, "digest"), Index(None, "reference", "id"), Index(None, "uploaded_by", "id"))

    id: Mapped[str] = mapped_column(Ident, primary_key=True)
    name: Mapped[str]
    # Root digest over the files.
    digest: Mapped[str] = mapped_column(Digest)
    size: Mapped[int] = mapped_column(BigInteger)
    # [{"name", "size", "sha256"}]
    files: Mapped[list[Json]]
    inspection: Mapped[Json]
    reference: Mapped[str | None] = mapped_column(ForeignKey("reference.name"))
    # A blob of JSON lines {"prompt", "answer"} that the uploader gave to measure utility with.
    samples_digest: Mapped[str | None] = mapped_column(Digest)
    uploaded_by: Mapped[str]
    created_at: Mapped[datetime]


class Batch(Base):
    """Many jobs that were ordered as one."""

    __tablename__ = "batch"

    id: Mapped[str] = mapped_column(Ident, primary_key=True)
    name: Mapped[str | None]
    reference: Mapped[str] = mapped_column(ForeignKey("reference.name"))
    spec: Mapped[Json]
    # The filter that chose the adapters; empty when they were named one by one.
    adapter_filter: Mapped[Json | None]
    total: Mapped[int]
    opened_by: Mapped[str]
    created_at: Mapped[datetime]
    cancel_requested_at: Mapped[datetime | None]


class Job(Base):
    """One adapter through the pipeline."""

    __tablename__ = "job"
    __table_args__ = (
        CheckConstraint("attempts >= 0 AND max_attempts > 0 AND fence >= 0", name="counts"),
        Index(None, "state", "reference"),
        Index(None, "state", "lease_until"),
        Index(None, "state", "dispatched_at"),
        Index(None, "batch_id", "state"),
        Index(None, "adapter_id", "id"),
    )

    id: Mapped[str] = mapped_column(Ident, primary_key=True)
    batch_id: Mapped[str | None] = mapped_column(ForeignKey("batch.id"))
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapter.id"))
    reference: Mapped[str] = mapped_column(ForeignKey("reference.name"))
    # {"policy": name, "method": name | absent, "parameters": {...}}
    spec: Mapped[Json]
    spec_digest: Mapped[str] = mapped_column(Digest)
    state: Mapped[JobState] = mapped_column(enum_column(JobState, "state"))
    verdict: Mapped[Verdict | None] = mapped_column(enum_column(Verdict, "verdict"))
    # Higher goes first.
    priority: Mapped[int]
    not_before: Mapped[datetime]
    attempts: Mapped[int]
    max_attempts: Mapped[int]
    lease_owner: Mapped[str | None]
    lease_until: Mapped[datetime | None]
    heartbeat_at: Mapped[datetime | None]
    # Rises with each claim; whoever writes with an older one is too late.
    fence: Mapped[int]
    dispatched_at: Mapped[datetime | None]
    cancel_requested_at: Mapped[datetime | None]
    progress: Mapped[Json]
    error: Mapped[Json | None]
    report_digest: Mapped[str | None] = mapped_column(Digest)
    artifact_digest: Mapped[str | None] = mapped_column(Digest)
    opened_by: Mapped[str]
    created_at: Mapped[datetime]
    updated_at: Mapped[datetime]
    finished_at: Mapped[datetime | None]
    # Rises with each change that a reader can see; the weak ETag.
    version: Mapped[int]


class Outbox(Base):
    """A message that must leave, written in the transaction that makes it true."""

    __tablename__ = "outbox"
    __table_args__ = (
        # The relay only ever looks for what is unsent; sent rows must not slow it down.
        Index(
            "ix_outbox_unsent",
            "topic",
            "priority",
            "id",
            sqlite_where=text("sent_at IS NULL"),
            postgresql_where=text("sent_at IS NULL"),
        ),
        Index(None, "job_id"),
        Index(None, "sent_at"),
    )

    id: Mapped[str] = mapped_column(Ident, primary_key=True)
    # The queue, `repair.<reference>`.
    topic: Mapped[str]
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"))
    payload: Mapped[Json]
    priority: Mapped[int]
    not_before: Mapped[datetime]
    created_at: Mapped[datetime]
    # A relay is publishing it and has until then; a relay that died leaves it to the next.
    taken_until: Mapped[datetime | None]
    sent_at: Mapped[datetime | None]
    attempts: Mapped[int]


class Artifact(Base):
    """Released files, by their root digest."""

    __tablename__ = "artifact"
    __table_args__ = (Index(None, "job_id"), Index(None, "adapter_id"))

    digest: Mapped[str] = mapped_column(Digest, primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("job.id"))
    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapter.id"))
    verdict: Mapped[Verdict] = mapped_column(enum_column(Verdict, "verdict"))
    # [{"name", "size", "sha256"}]
    files: Mapped[list[Json]]
    # The fence under which it was made.
    fence: Mapped[int]
    created_at: Mapped[datetime]


class Statement(Base):
    """A signed attestation about an artifact."""

    __tablename__ = "statement"
    __table_args__ = (Index(None, "artifact_digest", "id"), Index(None, "predicate_type", "id"))

    id: Mapped[str] = mapped_column(Ident, primary_key=True)
    artifact_digest: Mapped[str] = mapped_column(ForeignKey("artifact.digest"))
    predicate_type: Mapped[str]
    # Of the payload that was signed.
    digest: Mapped[str] = mapped_column(Digest)
    envelope: Mapped[Json]
    created_at: Mapped[datetime]


class AuditEvent(Base):
    """One fact, chained to the one before; triggers refuse to change or delete it."""

    __tablename__ = "audit_event"
    __table_args__ = (
        Index(None, "actor", "seq"),
        Index(None, "action", "seq"),
        Index(None, "subject_type", "subject_id", "seq"),
        Index(None, "at"),
    )

    # No second unique column: `INSERT OR REPLACE` could name an old row by it (see the migration).
    seq: Mapped[int] = mapped_column(Sequence, primary_key=True, autoincrement=False)
    id: Mapped[str] = mapped_column(Ident)
    at: Mapped[datetime]
    actor: Mapped[str]
    action: Mapped[str] = mapped_column(String(64))
    subject_type: Mapped[str] = mapped_column(String(32))
    subject_id: Mapped[str]
    digest: Mapped[str | None] = mapped_column(Digest)
    outcome: Mapped[str | None]
    reason: Mapped[str | None] = mapped_column(Text)
    detail: Mapped[Json]
    prev_hash: Mapped[str] = mapped_column(Hex64)
    hash: Mapped[str] = mapped_column(Hex64)


class AuditHead(Base):
    """The last link of the chain; its row lock puts concurrent appends in line."""

    __tablename__ = "audit_head"
    __table_args__ = (CheckConstraint("id = 1", name="single"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    seq: Mapped[int] = mapped_column(BigInteger)
    hash: Mapped[str] = mapped_column(Hex64)


class IdempotencyKey(Base):
    """What a POST with this key was answered."""

    __tablename__ = "idempotency_key"
    __table_args__ = (Index(None, "created_at"),)

    token_id: Mapped[str] = mapped_column(Ident, primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    # Method and path.
    request: Mapped[str] = mapped_column(Text)
    body_digest: Mapped[str] = mapped_column(Digest)
    # Empty while the first request runs.
    status: Mapped[int | None]
    response: Mapped[Json | None]
    created_at: Mapped[datetime]
