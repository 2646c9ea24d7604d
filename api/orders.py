"""What is known of an order only once its rows are read: does the adapter fit the reference, and the parameters it.

Refused here instead of an hour later by the worker, which asks the same functions again of the bytes themselves.
"""

from collections.abc import Iterable
from typing import Final

from sqlalchemy.orm import Session

from api.catalogue import Catalogue
from api.errors import refusal_problem
from api.inputs import BatchWish, Wish
from api.problems import FieldError, Problem
from gate.errors import Refused
from gate.fit import require_fit
from gate.of_modules import names_of
from ledger import adapters, references
from ledger.tables import Adapter, Batch, Job, Reference

MOST_NAMED: Final = 20
"""Adapters of a batch that are named in one refusal."""


def require_possible(tx: Session, offered: Catalogue, wish: Wish, job: Job) -> None:
    """Hold one job against its rows; raises a 422 problem, with which nothing stays opened."""
    reference = references.get(tx, job.reference)
    offered.validate_needs(wish.method, wish.parameters, references.optional_parts(reference), reference=reference.name)
    _hold(offered, wish, reference, [(adapters.get(tx, job.adapter_id), "/reference")])


def require_all_possible(tx: Session, offered: Catalogue, wish: BatchWish, batch: Batch) -> None:
    """The same for each job of a batch, which is opened whole or not at all."""
    reference = references.get(tx, batch.reference)
    offered.validate_needs(wish.method, wish.parameters, references.optional_parts(reference), reference=reference.name)
    places = {name: f"/adapter_ids/{place}" for place, name in enumerate(wish.adapter_ids or ())}
    rows = adapters.of_batch(tx, batch.id)
    _hold(offered, wish, reference, ((row, places.get(row.id, "/filter")) for row in rows))


def _hold(offered: Catalogue, wish: Wish, reference: Reference, rows: Iterable[tuple[Adapter, str]]) -> None:
    """Raise for what does not fit; adapters are named while there are few of them."""
    found: list[FieldError] = []
    first: Refused | None = None
    shapes = references.shapes_of(reference)
    for row, pointer in rows:
        offered.validate_whole(wish.spec()["policy"], row.inspection)
        if (modules := names_of(row.inspection)) is None:
            continue
        offered.validate_modules(wish.method, wish.parameters, modules, adapter=row.id)
        if row.reference == reference.name:  # its bytes were held against it when they came in
            continue
        try:
            require_fit(row.inspection, shapes)
        except Refused as refused:
            first = first or refused
            found.append(FieldError(pointer=pointer, detail=f"adapter {row.id}: {refused.field}: {refused.detail}"))
        if len(found) == MOST_NAMED:
            break
    if first is not None:
        told = refusal_problem(first)
        detail = f"The adapter does not fit the reference {reference.name}: {first.detail}"
        raise Problem(told.status_code, told.kind, detail, errors=found, extra=told.extra)
