"""`/v1/jobs`: order, list, read, watch, cancel, and the report of one that ended."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Request, Response
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from api import events
from api.auth import READS_JOBS, MayCreateJobs
from api.conditional import none_match, strong_etag, weak_etag
from api.downloads import FOREVER
from api.errors import field_problem
from api.idempotent import Answer, Key, call_of, digest_of, once
from api.inputs import IdPath, IdQuery, JobWish, NameQuery
from api.orders import require_possible
from api.paging import PageOut, PagingDep
from api.problems import Kind, Problem, declared
from api.reports import Checks, checks_of, page_headers, page_of
from api.schemas import JobOut
from api.service import Service, ServiceDep
from ledger import adapters, jobs
from ledger.errors import NotFound
from ledger.jobs import JobFilter, NewJob
from ledger.tables import FINAL_STATES, Job, JobState, Verdict

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

# Seconds between two looks at a job; a repair takes minutes, its progress changes every few seconds.
RETRY_AFTER = "2"


@router.post("", status_code=202, response_model=JobOut, responses=declared(409))
def open_job(
    request: Request, service: ServiceDep, caller: MayCreateJobs, wish: JobWish, key: Key = None
) -> JSONResponse:
    """Order a job. It is checked against the catalogue now, and runs when a worker is free."""
    call = call_of(request, caller, key, digest_of(wish), required=True)
    offered = service.offered
    offered.validate_wish(policy=wish.spec()["policy"], method=wish.method, parameters=wish.parameters)

    def deed(tx: Session) -> Answer:
        new = NewJob(
            adapter_id=wish.adapter_id,
            reference=_reference(tx, wish),
            spec=wish.spec(),
            priority=wish.priority,
            max_attempts=service.settings.max_attempts,
        )
        try:
            job = jobs.create(tx, new, opened_by=caller.actor)
        except NotFound as error:
            raise field_problem(f"/{'adapter_id' if error.kind == 'adapter' else error.kind}", str(error)) from error
        require_possible(tx, offered, wish, job)
        return _accepted(job)

    return once(service.database, call, deed)


@router.get("", responses=declared(), dependencies=READS_JOBS)
def list_jobs(
    *,
    service: ServiceDep,
    paging: PagingDep,
    state: JobState | None = None,
    verdict: Verdict | None = None,
    reference: NameQuery = None,
    adapter_id: IdQuery = None,
    batch_id: IdQuery = None,
    opened_by: NameQuery = None,
) -> PageOut[JobOut]:
    """Jobs, newest first."""
    wanted = JobFilter(
        state=state,
        verdict=verdict,
        reference=reference,
        adapter_id=adapter_id,
        batch_id=batch_id,
        opened_by=opened_by,
    )
    with service.database.read() as tx:
        found = jobs.search(tx, wanted, after=paging.after, limit=paging.limit)
    return paging.page(found, JobOut.of)


@router.get(
    "/{job_id}",
    response_model=JobOut,
    responses={**declared(404), 304: {"description": "Not Modified"}},
    dependencies=READS_JOBS,
)
def read_job(request: Request, service: ServiceDep, job_id: IdPath) -> Response:
    """The job as it stands. Ask again with `If-None-Match`: while nothing changed, the answer is 304."""
    with service.database.read() as tx:
        job = jobs.get(tx, job_id)
    headers = {"ETag": weak_etag(job.id, job.version), "Cache-Control": "private, no-cache"}
    if none_match(request.headers.get("if-none-match"), headers["ETag"]):
        return Response(status_code=304, headers=headers)
    if job.state not in FINAL_STATES:
        headers["Retry-After"] = RETRY_AFTER
    body = JobOut.of(job, checks=_checks(service, job))
    return JSONResponse(body.model_dump(mode="json"), headers=headers)


@router.post("/{job_id}/cancel", status_code=202, response_model=JobOut, responses=declared(404, 409))
def cancel_job(
    request: Request, service: ServiceDep, caller: MayCreateJobs, job_id: IdPath, key: Key = None
) -> JSONResponse:
    """Stop a job: at once when no worker has it, else at the worker's next step. Safe to repeat."""
    call = call_of(request, caller, key, digest_of(None))
    return once(service.database, call, lambda tx: _accepted(jobs.request_cancel(tx, job_id, actor=caller.actor)))


@router.post("/{job_id}/requeue", status_code=202, response_model=JobOut, responses=declared(404, 409))
def requeue_job(
    request: Request, service: ServiceDep, caller: MayCreateJobs, job_id: IdPath, key: Key = None
) -> JSONResponse:
    """Give a job that failed or died a new set of attempts. Any other job is answered with 409."""
    call = call_of(request, caller, key, digest_of(None))
    return once(service.database, call, lambda tx: _accepted(jobs.requeue(tx, job_id, actor=caller.actor)))


@router.get(
    "/{job_id}/events",
    response_class=events.EventStream,
    responses={**declared(404), 204: {"description": "The client has seen everything there will ever be"}},
    dependencies=READS_JOBS,
)
async def watch_job(
    service: ServiceDep,
    job_id: IdPath,
    last_event_id: Annotated[str | None, Header(max_length=64)] = None,
) -> Response:
    """Server-Sent Events `state` and `progress`; ends at a final state and resumes after `Last-Event-ID`."""
    seen = events.Seen.parse(last_event_id)
    first = await run_in_threadpool(events.news, service.database, job_id, seen)
    if last_event_id is not None and first.over and not first.events:
        # 204 is how a server tells an EventSource not to connect again.
        return Response(status_code=204)
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return events.EventStream(events.follow(service.database, job_id, first), headers=headers)


@router.get("/{job_id}/report", responses=declared(404), response_model=dict[str, Any], dependencies=READS_JOBS)
def read_report(request: Request, service: ServiceDep, job_id: IdPath) -> Response:
    """Every measurement behind the verdict; also of a quarantined or refused adapter."""
    with service.database.read() as tx:
        digest = jobs.get(tx, job_id).report_digest
    if digest is None:
        raise Problem(404, Kind.NOT_FOUND, "This job has no report, or none yet.")
    headers = {"ETag": strong_etag(digest), "Cache-Control": FOREVER}
    if none_match(request.headers.get("if-none-match"), headers["ETag"]):
        return Response(status_code=304, headers=headers)
    return Response(service.blobs.read(digest), media_type="application/json", headers=headers)


@router.get(
    "/{job_id}/report.html",
    responses={**declared(404), 200: {"content": {"text/html": {}}, "description": "A page that loads nothing"}},
    response_class=Response,
    dependencies=READS_JOBS,
)
def read_page(request: Request, service: ServiceDep, job_id: IdPath) -> Response:
    """The report as one self-contained page for people; made from the report whenever it is asked for."""
    with service.database.read() as tx:
        digest = jobs.get(tx, job_id).report_digest
    if digest is None:
        raise Problem(404, Kind.NOT_FOUND, "This job has no report, or none yet.")
    headers = page_headers(digest, save_as=f"report-{job_id}.html")
    if none_match(request.headers.get("if-none-match"), headers["ETag"]):
        return Response(status_code=304, headers=headers)
    page = page_of(service.blobs, digest)
    if page is None:
        raise Problem(404, Kind.NOT_FOUND, "The report was written by another version; ask for it as JSON.")
    return Response(page, media_type="text/html; charset=utf-8", headers=headers)


def _reference(tx: Session, wish: JobWish) -> str:
    if wish.reference is not None:
        return wish.reference
    try:
        reference = adapters.get(tx, wish.adapter_id).reference
    except NotFound as error:
        raise field_problem("/adapter_id", str(error)) from error
    if reference is None:
        raise field_problem("/reference", "Name a reference: the upload did not.")
    return reference


def _accepted(job: Job) -> Answer:
    body = JobOut.of(job)
    headers = {"Location": body.links["self"], "Retry-After": RETRY_AFTER}
    return Answer(status=202, body=body.model_dump(mode="json"), headers=headers)


def _checks(service: Service, job: Job) -> Checks | None:
    return checks_of(service.blobs, job.report_digest) if job.report_digest else None
