"""One job, straight down: claim, fetch, gate, measure and repair, publish, close.

Reads aloud in `run_job`. No transaction is open while a model runs; the closing one counts only while the fence is
still ours.
"""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import structlog
import torch
import transformers
from celery.exceptions import SoftTimeLimitExceeded

from gate.admission import admit
from gate.errors import Refused
from gate.measurable import require_measurable
from ledger import adapters, leases, references, results
from ledger.blobs import BlobStore
from ledger.clock import utc_now
from ledger.db import Database
from ledger.errors import BlobDamaged, BlobError, BlobStoreError, LeaseLost
from ledger.logs import configure
from ledger.results import Failure, Result, Retry
from ledger.signing import Signer
from repair.adapter_file import read_adapter
from repair.checks import planner
from repair.checks.errors import ArmUnsupported
from repair.checks.packs import HOME
from repair.checks.policy import Candidate, load_policy
from repair.context import RepairContext
from repair.determinism import ask_determinism
from repair.diagnostics.account import diagnose
from repair.errors import RepairError, UnsupportedAdapter
from worker import publish
from worker.errors import CancelRequested, ReferenceChanged
from worker.heartbeat import Heartbeat
from worker.intake import fetch_adapter, read_samples
from worker.references import WarmReferences
from worker.scratch import attempt_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from sqlalchemy.orm import Session

    from ledger.leases import Claim
    from ledger.settings import Settings
    from repair.checks.backend import Sample
    from repair.checks.policy import Policy
    from repair.checks.standing import Standing
    from worker.references import OpenReference

log = structlog.get_logger()


@dataclass(frozen=True, kw_only=True)
class Tools:
    """What the jobs of one process share."""

    settings: Settings
    database: Database
    blobs: BlobStore
    signer: Signer
    references: WarmReferences

    @classmethod
    def open(cls, settings: Settings) -> Self:
        """Connect to everything the settings name. The model is loaded by the first job that needs it."""
        configure(level=settings.log_level)
        transformers.logging.disable_progress_bar()
        ask_determinism()
        HOME.path = settings.prompts_dir
        device = settings.device
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(
            settings=settings,
            database=Database(settings.database),
            blobs=BlobStore.open(settings.blobs),
            signer=Signer.load_or_create(settings.data_dir / "keys"),
            references=WarmReferences(device, batch_tokens=settings.batch_tokens),
        )

    @property
    def lease(self) -> timedelta:
        """How long a claim lives without a heartbeat."""
        return timedelta(seconds=self.settings.lease_seconds)


def run_job(job_id: str, tools: Tools, *, owner: str) -> None:
    """Carry one queued job to its verdict. Raises AlreadyClaimed when somebody else has it."""
    with tools.database.begin() as tx:
        claim = leases.claim(tx, job_id, owner=owner, lease=tools.lease)
    log.info("job_claimed", fence=claim.fence, attempt=claim.attempt)
    try:
        with (
            attempt_folder(tools.settings.data_dir, claim) as folder,
            Heartbeat(tools.database, claim, tools.settings) as beat,
        ):
            result = work(claim, tools, beat, folder)
            beat.step()
        with tools.database.begin() as tx:
            results.close(tx, claim, result)
        log.info("job_closed", verdict=result.verdict)
    except LeaseLost:
        fenced_off(tools, claim)
    except CancelRequested:
        settle(tools, claim, lambda tx: leases.confirm_cancel(tx, claim))
    except Exception as error:  # noqa: BLE001 - whatever it was, the ledger must learn that this attempt is over
        close_as_failed(tools, claim, error)


def work(claim: Claim, tools: Tools, beat: Heartbeat, folder: Path) -> Result:
    """From stored bytes to a result that only has to be written down."""
    started = utc_now()
    beat.step({"stage": "opening"})
    with tools.database.read() as tx:
        adapter_row = adapters.get(tx, claim.adapter_id)
        reference_row = references.get(tx, claim.reference)
    source = fetch_adapter(tools.blobs, adapter_row, folder / "input")
    try:
        admission = admit(source, shapes=references.shapes_of(reference_row))
        policy = policy_of(claim.spec, tools.settings.policies_dir)
        require_measurable(admission, settles=not policy.settling.refuses)
    except Refused as refusal:
        return publish.refused(tools.blobs, adapter_row, refusal)
    beat.step({"stage": "loading the reference"})
    reference = tools.references.open(reference_row)
    wish = Wish(
        spec=claim.spec,
        source=source,
        samples=read_samples(tools.blobs, adapter_row),
        work_dir=folder / "candidates",
        cache=tools.settings.data_dir / "cache",
        policy=policy,
    )
    try:
        found = decide(wish, reference, beat)
        beat.step({"stage": "diagnosing"})
        seen = diagnosed(wish, reference, beat)
    except (UnsupportedAdapter, ArmUnsupported) as refusal:
        # What only the loaded model can tell: a fact about the adapter like those of the gate.
        return publish.refused(tools.blobs, adapter_row, refusal)
    beat.step({"stage": "publishing"})
    account = publish.Account(
        claim=claim,
        adapter=adapter_row,
        reference=reference_row,
        admission=admission,
        plan=found,
        diagnostics=seen,
        device=tools.references.device,
        started_at=started,
        finished_at=utc_now(),
    )
    return publish.publish(account, tools.blobs, tools.signer, source=source, folder=folder / "artifact")


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What one job asks of the planner."""

    spec: Mapping[str, Any]
    source: Path
    samples: tuple[Sample, ...]
    work_dir: Path
    cache: Path
    policy: Policy


def policy_of(spec: Mapping[str, Any], folder: Path) -> Policy:
    """The policy that a job names: the operator's own before a bundled one. Raises PolicyInvalid."""
    name = str(spec["policy"])
    return load_policy(own if (own := folder / f"{name}.toml").is_file() else name)


def decide(wish: Wish, reference: OpenReference, beat: Heartbeat) -> planner.Plan:
    """Measure, repair where needed, and measure again."""
    fields: dict[str, Any] = {}

    def watch(standing: Standing) -> None:
        fields.clear()
        fields.update(standing.as_dict())

    def progress(line: str, share: float) -> None:
        told = {"stage": "measuring and repairing", "detail": line, "done": round(100 * share), "total": 100}
        beat.step({**told, **fields})

    method = wish.spec.get("method")
    named = [Candidate(method=method, parameters=dict(wish.spec.get("parameters") or {}))] if method else None
    return planner.plan(
        read_adapter(wish.source),
        reference=planner.Reference(
            aligned=reference.aligned,
            base=reference.base,
            chat=reference.chat,
            patch=reference.patch,
            calibration=reference.calibration,
            basis=reference.basis,
            twin=reference.twin,
            digest=reference.aligned_digest,
        ),
        policy=wish.policy,
        work_dir=wish.work_dir,
        samples=wish.samples,
        candidates=named,
        device=reference.chat.device,
        aligned_cache=wish.cache,
        progress=progress,
        watch=watch,
    )


def diagnosed(wish: Wish, reference: OpenReference, beat: Heartbeat) -> dict[str, Any]:
    """What else there is to know about the upload; the verdict does not depend on it."""

    def progress(line: str, share: float) -> None:
        beat.step({"stage": "diagnosing", "detail": line, "done": round(100 * share), "total": 100})

    context = RepairContext(
        aligned=reference.aligned,
        base=reference.base,
        calibration=reference.calibration,
        basis=reference.basis,
        chat=reference.chat,
        device=reference.chat.device,
        progress=progress,
    )
    return diagnose(read_adapter(wish.source), context, weights=True)


def close_as_failed(tools: Tools, claim: Claim, error: Exception) -> None:
    """End the attempt: a fact about the adapter is final, a fact about the machine may pass."""
    failure = describe(error)
    log.error("job_attempt_failed", code=failure.code, retry=failure.retry, where=last_lines(error))

    def ending(tx: Session) -> None:
        results.fail(tx, claim, failure)
        if isinstance(error, BlobDamaged):
            leases.note_damage(tx, claim, error.digest)

    settle(tools, claim, ending)


def settle(tools: Tools, claim: Claim, ending: Callable[[Session], object]) -> None:
    """Write down that the attempt ended without a verdict, unless the job has become somebody else's."""
    try:
        with tools.database.begin() as tx:
            ending(tx)
    except LeaseLost:
        fenced_off(tools, claim)


def fenced_off(tools: Tools, claim: Claim) -> None:
    """What this worker did no longer counts; only that it tried is written down."""
    log.warning("job_fenced_off", fence=claim.fence)
    with tools.database.begin() as tx:
        leases.note_fenced_off(tx, claim)


def describe(error: Exception) -> Failure:
    """What the ledger says about an error. A model's words never reach an error message of ours."""
    if isinstance(error, RepairError):
        return Failure(code=error.rule, message=str(error), retry=Retry.PERMANENT, detail=error.as_dict())
    if isinstance(error, SoftTimeLimitExceeded):
        return Failure(code="time-limit", message="the job took longer than a job may", retry=Retry.PERMANENT)
    if isinstance(error, ReferenceChanged):
        return Failure(code="reference-changed", message=str(error), retry=Retry.PERMANENT)
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return Failure(code="out-of-memory", message="the device ran out of memory", retry=Retry.TRANSIENT)
    if isinstance(error, BlobError | BlobStoreError | OSError):
        return Failure(code="storage", message=str(error), retry=Retry.TRANSIENT)
    # The text of an unknown error may quote anything, so only its kind is kept.
    return Failure(code="unexpected", message=type(error).__name__, retry=Retry.TRANSIENT)


def last_lines(error: Exception) -> list[str]:
    """Where it happened: files and lines, without values."""
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    return [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
