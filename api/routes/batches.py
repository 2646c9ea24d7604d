"""`/v1/batches`: one order for many adapters, its progress and counts, and its end."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from sqlalchemy.orm import Session

from api.auth import READS_JOBS, MayCreateJobs
from api.errors import field_problem
from api.idempotent import Answer, Key, call_of, digest_of, once
from api.inputs import BatchWish, IdPath, NameQuery
from api.orders import require_all_possible
from api.paging import PageOut, PagingDep
from api.problems import declared
from api.schemas import BatchOut
from api.service import ServiceDep
from ledger import batches
from ledger.batches import NewBatch
from ledger.errors import NotFound

router = APIRouter(prefix="/v1/batches", tags=["batches"])

# Seconds; a batch takes longer than a job.
RETRY_AFTER = "10"
_POINTERS = {"adapter": "/adapter_ids", "reference": "/reference"}


@router.post("", status_code=202, response_model=BatchOut, responses=declared(409))
def open_batch(
    request: Request, service: ServiceDep, caller: MayCreateJobs, wish: BatchWish, key: Key = None
) -> JSONResponse:
    """Order one job for each adapter, all in one transaction: the batch exists whole or not at all."""
    call = call_of(request, caller, key, digest_of(wish), required=True)
    offered = service.offered
    offered.validate_wish(policy=wish.spec()["policy"], method=wish.method, parameters=wish.parameters)
    new = NewBatch(
        reference=wish.reference,
        spec=wish.spec(),
        adapters=wish.adapter_ids or (wish.filter.for_ledger() if wish.filter else []),
        name=wish.name,
        priority=wish.priority,
        max_attempts=service.settings.max_attempts,
    )

    def deed(tx: Session) -> Answer:
        try:
            batch = batches.create(tx, new, opened_by=caller.actor)
        except NotFound as error:
            raise field_problem(_POINTERS[error.kind], str(error)) from error
        require_all_possible(tx, offered, wish, batch)
        return _accepted(tx, batch.id)

    return once(service.database, call, deed)


@router.get("", responses=declared(), dependencies=READS_JOBS)
def list_batches(service: ServiceDep, paging: PagingDep, opened_by: NameQuery = None) -> PageOut[BatchOut]:
    """Batches, newest first, without their counts."""
    with service.database.read() as tx:
        found = batches.search(tx, opened_by=opened_by, after=paging.after, limit=paging.limit)
    return paging.page(found, BatchOut.of)


@router.get("/{batch_id}", responses=declared(404), dependencies=READS_JOBS)
def read_batch(service: ServiceDep, batch_id: IdPath) -> BatchOut:
    """One batch, with how many of its jobs are in each state and have each verdict."""
    with service.database.read() as tx:
        return BatchOut.of(batches.get(tx, batch_id), batches.progress(tx, batch_id))


@router.post("/{batch_id}/cancel", status_code=202, response_model=BatchOut, responses=declared(404, 409))
def cancel_batch(
    request: Request, service: ServiceDep, caller: MayCreateJobs, batch_id: IdPath, key: Key = None
) -> JSONResponse:
    """Stop every job of the batch that is not over. Safe to repeat."""
    call = call_of(request, caller, key, digest_of(None))

    def deed(tx: Session) -> Answer:
        batches.request_cancel(tx, batch_id, actor=caller.actor)
        return _accepted(tx, batch_id)

    return once(service.database, call, deed)


def _accepted(tx: Session, batch_id: str) -> Answer:
    tx.flush()
    body = BatchOut.of(batches.get(tx, batch_id), batches.progress(tx, batch_id))
    headers = {"Location": body.links["self"], "Retry-After": RETRY_AFTER}
    return Answer(status=202, body=body.model_dump(mode="json"), headers=headers)
