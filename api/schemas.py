"""What goes over the wire: one model for each noun, with the conversion from its row.

Times are RFC 3339 in UTC, sizes bytes, digests carry their algorithm. States and verdicts are open-ended: a client must
expect words that it does not know.
"""

from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from ledger.audit_chain import ChainReport
from ledger.batches import BatchProgress
from ledger.digests import bare_hex
from ledger.tables import (
    Adapter,
    Artifact,
    AuditEvent,
    Batch,
    Job,
    JobState,
    Reference,
    Statement,
    Token,
    Verdict,
)
from ledger.transitions import REQUEUEABLE

Links = dict[str, str]

# What a worker tells while it works; every field may be missing, and others may come. Also in the event `progress`.
_PROGRESS = {
    "type": "object",
    "additionalProperties": True,
    "properties": {
        "stage": {"type": "string", "description": "What the worker does, in words"},
        "detail": {"type": "string", "description": "The latest line of it, in words"},
        "done": {"type": "integer", "description": "Of `total`, within this step"},
        "total": {"type": "integer"},
        "phase": {"type": "string", "description": "What is measured: aligned, upload, choosing or certifying"},
        "alive": {"type": "integer", "description": "Candidates in the race"},
        "best": {"type": "number", "description": "Share of the task kept by the best that has passed so far"},
        "seconds_left": {"type": "integer", "description": "Of choosing, at most"},
    },
}
Progress = Annotated[dict[str, Any], WithJsonSchema(_PROGRESS)]


class Out(BaseModel):
    """Read from a row by its attributes."""

    model_config = ConfigDict(from_attributes=True, frozen=True)


class FileOut(Out):
    """A file and the digest of its bytes."""

    name: str
    size: int
    sha256: str

    @classmethod
    def of(cls, file: Mapping[str, Any]) -> Self:
        """From an entry of a row's file list."""
        digest = f"sha256:{bare_hex(str(file['sha256']))}"
        return cls(name=str(file["name"]), size=int(file["size"]), sha256=digest)


class AdapterOut(Out):
    """An uploaded adapter that the gate let in. Admitted means well-formed, not safe."""

    id: str
    name: str
    digest: str
    size: int
    files: list[FileOut]
    inspection: dict[str, Any]
    reference: str | None
    samples_digest: str | None
    uploaded_by: str
    created_at: datetime
    links: Links

    @classmethod
    def of(cls, row: Adapter) -> Self:
        """From its row."""
        at = f"/v1/adapters/{row.id}"
        fields = {name: getattr(row, name) for name in cls.model_fields if name not in {"files", "links"}}
        return cls(
            **fields,
            files=[FileOut.of(file) for file in row.files],
            links={"self": at, "jobs": f"/v1/jobs?adapter_id={row.id}"},
        )


class JobOut(Out):
    """One adapter through the pipeline, as it stands."""

    id: str
    batch_id: str | None
    adapter_id: str
    reference: str
    policy: str | None
    method: str | None
    parameters: dict[str, Any]
    spec_digest: str
    state: JobState
    verdict: Verdict | None
    priority: int
    attempts: int
    max_attempts: int
    progress: Progress
    error: dict[str, Any] | None
    checks: dict[str, list[dict[str, Any]]] | None = None
    report_digest: str | None
    artifact_digest: str | None
    opened_by: str
    created_at: datetime
    updated_at: datetime
    finished_at: datetime | None
    cancel_requested_at: datetime | None
    version: int
    links: Links

    @classmethod
    def of(cls, row: Job, *, checks: dict[str, list[dict[str, Any]]] | None = None) -> Self:
        """From its row, and for one job with the summary of its checks."""
        computed = {"policy", "method", "parameters", "links", "checks"}
        return cls(
            **{name: getattr(row, name) for name in cls.model_fields if name not in computed},
            policy=row.spec.get("policy"),
            method=row.spec.get("method"),
            parameters=row.spec.get("parameters") or {},
            checks=checks,
            links=_job_links(row),
        )


class BatchOut(Out):
    """Many jobs that were ordered as one."""

    id: str
    name: str | None
    reference: str
    policy: str | None
    method: str | None
    parameters: dict[str, Any]
    filter: dict[str, Any] | None
    total: int
    opened_by: str
    created_at: datetime
    cancel_requested_at: datetime | None
    links: Links
    done: bool | None = None
    states: dict[str, int] | None = None
    verdicts: dict[str, int] | None = None

    @classmethod
    def of(cls, row: Batch, progress: BatchProgress | None = None) -> Self:
        """From its row, and for one batch with the counts of its jobs."""
        at = f"/v1/batches/{row.id}"
        return cls(
            **{name: getattr(row, name) for name in ("id", "name", "reference", "total", "opened_by", "created_at")},
            cancel_requested_at=row.cancel_requested_at,
            policy=row.spec.get("policy"),
            method=row.spec.get("method"),
            parameters=row.spec.get("parameters") or {},
            filter=row.adapter_filter,
            links={"self": at, "cancel": f"{at}/cancel", "jobs": f"/v1/jobs?batch_id={row.id}"},
            done=progress.done if progress else None,
            states={state.value: count for state, count in progress.states.items()} if progress else None,
            verdicts={verdict.value: count for verdict, count in progress.verdicts.items()} if progress else None,
        )


class ArtifactOut(Out):
    """Released files: measured as safe, on exactly these bytes."""

    digest: str
    job_id: str
    adapter_id: str
    verdict: Verdict
    files: list[FileOut]
    created_at: datetime
    links: Links

    @classmethod
    def of(cls, row: Artifact) -> Self:
        """From its row."""
        links = {
            "self": f"/v1/artifacts/{row.digest}",
            "statements": f"/v1/statements?artifact={row.digest}",
            "job": f"/v1/jobs/{row.job_id}",
        }
        fields = {name: getattr(row, name) for name in cls.model_fields if name not in {"files", "links"}}
        return cls(**fields, files=[FileOut.of(file) for file in row.files], links=links)


class StatementOut(Out):
    """A signed attestation: a DSSE envelope about an artifact."""

    id: str
    artifact_digest: str
    predicate_type: str
    digest: str
    envelope: dict[str, Any]
    created_at: datetime

    @classmethod
    def of(cls, row: Statement) -> Self:
        """From its row."""
        return cls.model_validate(row)


class ReferenceOut(Out):
    """A named pair of models. Where they lie on disk is nobody's business."""

    name: str
    aligned_digest: str
    base_digest: str | None
    patch_digest: str | None = Field(description="Of a refusal LoRA for the aligned model; the method `patch` adds it")
    calibration_digest: str | None = Field(description="Of the pack that methods with the need `calibration` read")
    basis_digest: str | None = Field(description="Of the pack that is read instead of both models")
    twin_digest: str | None = Field(description="Of a LoRA that obeys harmful requests, which methods can subtract")
    modules: int
    created_at: datetime

    @classmethod
    def of(cls, row: Reference) -> Self:
        """From its row."""
        fields = {name: getattr(row, name) for name in cls.model_fields if name != "modules"}
        return cls(**fields, modules=len(row.shapes))


class TokenOut(Out):
    """A token without its secret."""

    id: str
    name: str
    last4: str
    scopes: list[str]
    created_by: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None

    @classmethod
    def of(cls, row: Token) -> Self:
        """From its row."""
        return cls.model_validate(row)


class MintedOut(TokenOut):
    """A token that was just made; its secret is shown here and never again, not even to the same idempotency key."""

    secret: str | None = None


class AuditEventOut(Out):
    """One fact of the audit log, with its link in the chain."""

    seq: int
    id: str
    at: datetime
    actor: str
    action: str
    subject_type: str
    subject_id: str
    digest: str | None
    outcome: str | None
    reason: str | None
    detail: dict[str, Any]
    prev_hash: str
    hash: str

    @classmethod
    def of(cls, row: AuditEvent) -> Self:
        """From its row."""
        return cls.model_validate(row)


class ChainOut(Out):
    """What a walk along the whole chain found."""

    ok: bool
    checked: int
    head_seq: int
    head_hash: str
    broken_seq: int | None
    broken_why: str | None

    @classmethod
    def of(cls, report: ChainReport) -> Self:
        """From the walk's report."""
        return cls(
            ok=report.ok,
            checked=report.checked,
            head_seq=report.last.seq,
            head_hash=report.last.hash,
            broken_seq=report.broken.seq if report.broken else None,
            broken_why=report.broken.why.value if report.broken else None,
        )


def _job_links(row: Job) -> Links:
    at = f"/v1/jobs/{row.id}"
    links = {
        "self": at,
        "events": f"{at}/events",
        "cancel": f"{at}/cancel",
        "adapter": f"/v1/adapters/{row.adapter_id}",
    }
    if row.state in REQUEUEABLE:
        links["requeue"] = f"{at}/requeue"
    if row.report_digest:
        links["report"] = f"{at}/report"
        links["page"] = f"{at}/report.html"
    if row.artifact_digest:
        links["artifact"] = f"/v1/artifacts/{row.artifact_digest}"
    return links
