"""How attempts end: guarded by the fence, all or nothing, tried again where that may help."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import pytest
from sqlalchemy import func, select

from ledger import adapters, audit, jobs
from ledger.audit import Action, Query
from ledger.errors import LeaseLost, UnfitResult
from ledger.jobs import Result
from ledger.results import pause_after
from ledger.tables import Artifact, JobState, Statement, Verdict
from tests.ledger.stories import (
    LASTING,
    LEASE,
    PASSING,
    QUARANTINED,
    RELEASED,
    actions,
    claimed,
    state,
)

if TYPE_CHECKING:
    from ledger.db import Database
    from tests.ledger.conftest import OpenJob


def test_close_releases_everything_at_once(database: Database, open_job: OpenJob, start: datetime) -> None:
    """Verdict, artifact, statements and events appear together."""
    job = open_job()
    claim = claimed(database, job.id, start)

    with database.begin() as tx:
        jobs.close(tx, claim, RELEASED, now=start)

    with database.read() as tx:
        closed = jobs.get(tx, job.id)
        artifact = adapters.artifact(tx, "sha256:artifact")
        statements = adapters.statements(tx, "sha256:artifact")
    assert (closed.state, closed.verdict, closed.artifact_digest) == (
        JobState.SUCCEEDED,
        Verdict.RELEASED_REPAIRED,
        "sha256:artifact",
    )
    assert (closed.finished_at, closed.lease_until, closed.error) == (start, None, None)
    assert (artifact.job_id, artifact.adapter_id, artifact.fence) == (job.id, job.adapter_id, 1)
    assert [statement.envelope for statement in statements] == [{"payload": "x"}]
    assert actions(database, job.id) == ["job.opened", "job.claimed", "job.succeeded"]
    with database.read() as tx:
        released = audit.search(tx, Query(action=Action.ARTIFACT_RELEASED)).items
        assert [(event.subject_id, event.detail["job_id"]) for event in released] == [("sha256:artifact", job.id)]
        assert audit.verify(tx).ok


def test_stale_fence_changes_nothing(database: Database, open_job: OpenJob, start: datetime) -> None:
    """A worker that comes back after its lease ran out is too late, whatever it wants to do."""
    job = open_job()
    stale = claimed(database, job.id, start, "slow")
    fresh = claimed(database, job.id, start + LEASE, "quick")
    assert (fresh.fence, fresh.attempt) == (2, 2)

    for late in (
        lambda tx: jobs.close(tx, stale, RELEASED),
        lambda tx: jobs.fail(tx, stale, LASTING),
        lambda tx: jobs.release(tx, stale),
        lambda tx: jobs.confirm_cancel(tx, stale),
        lambda tx: jobs.heartbeat(tx, stale, progress={"step": 9}),
    ):
        with pytest.raises(LeaseLost), database.begin() as tx:
            late(tx)

    with database.begin() as tx:
        jobs.close(tx, fresh, QUARANTINED)
    with pytest.raises(LeaseLost), database.begin() as tx:
        jobs.close(tx, stale, RELEASED)
    with database.begin() as tx:
        jobs.note_fenced_off(tx, stale)
    with database.read() as tx:
        closed = jobs.get(tx, job.id)
        assert (closed.verdict, closed.artifact_digest, closed.progress) == (Verdict.QUARANTINED, None, {})
        assert tx.scalar(select(func.count(Artifact.digest))) == 0
        assert tx.scalar(select(func.count(Statement.id))) == 0
    assert actions(database, job.id)[-2:] == ["job.succeeded", "job.fenced_off"]


def test_a_quarantine_is_in_the_chain_with_its_report(database: Database, open_job: OpenJob, start: datetime) -> None:
    """No artifact bears a signature then: the log holds verdict and report, for job and adapter."""
    job = open_job()
    claim = claimed(database, job.id, start)
    with database.begin() as tx:
        jobs.close(tx, claim, QUARANTINED)
    with database.read() as tx:
        events = [
            audit.search(tx, Query(action=action)).items[0] for action in ("job.succeeded", "adapter.quarantined")
        ]
        assert audit.verify(tx).ok
    assert [(event.subject_id, event.digest, event.outcome) for event in events] == [
        (job.id, QUARANTINED.report_digest, "quarantined"),
        (job.adapter_id, QUARANTINED.report_digest, "quarantined"),
    ]


def test_two_closes_race_and_one_counts(database: Database, open_job: OpenJob, start: datetime) -> None:
    """Even a worker that runs the same claim twice leaves one result."""
    claim = claimed(database, open_job().id, start)

    def close(_n: int) -> bool:
        try:
            with database.begin() as tx:
                jobs.close(tx, claim, RELEASED)
        except LeaseLost:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(close, range(4))) == [False, False, False, True]


@pytest.mark.parametrize(
    "result",
    [
        Result(verdict=Verdict.RELEASED_UNCHANGED, report_digest="sha256:r"),
        Result(verdict=Verdict.QUARANTINED, report_digest="sha256:r", artifact=RELEASED.artifact),
        Result(verdict=Verdict.REFUSED, report_digest=None, statements=RELEASED.statements),
    ],
)
def test_nothing_is_released_without_a_releasing_verdict(
    database: Database, open_job: OpenJob, start: datetime, result: Result
) -> None:
    """An artifact and a releasing verdict come together or not at all."""
    job = open_job()
    claim = claimed(database, job.id, start)

    with pytest.raises(UnfitResult), database.begin() as tx:
        jobs.close(tx, claim, result)

    assert state(database, job.id) is JobState.RUNNING


def test_same_bytes_released_twice_are_one_artifact(database: Database, open_job: OpenJob, start: datetime) -> None:
    """A second job that ends with the same files adds its statements to the same artifact."""
    for _ in range(2):
        claim = claimed(database, open_job().id, start)
        with database.begin() as tx:
            jobs.close(tx, claim, RELEASED)

    with database.read() as tx:
        assert tx.scalar(select(func.count(Artifact.digest))) == 1
        assert len(adapters.statements(tx, "sha256:artifact")) == 2


def test_passing_error_is_tried_again_until_it_is_not(database: Database, open_job: OpenJob, start: datetime) -> None:
    """Each pause is longer; the last attempt ends in the dead-letter state, with its error kept."""
    job = open_job(max_attempts=3)
    now = start
    pauses = []
    for _ in range(2):
        claim = claimed(database, job.id, now)
        with database.begin() as tx:
            failed = jobs.fail(tx, claim, PASSING, now=now)
        pauses.append(failed.not_before - now)
        now = failed.not_before
    claim = claimed(database, job.id, now)
    with database.begin() as tx:
        last = jobs.fail(tx, claim, PASSING, now=now)

    assert pauses == [timedelta(seconds=5), timedelta(seconds=10)]
    assert (last.state, (last.error or {})["code"]) == (JobState.DEAD, "out-of-memory")
    assert actions(database, job.id)[-1] == "job.died"


def test_lasting_error_ends_the_job(database: Database, open_job: OpenJob, start: datetime) -> None:
    """No retry mends a bad adapter."""
    job = open_job()
    claim = claimed(database, job.id, start)

    with database.begin() as tx:
        failed = jobs.fail(tx, claim, LASTING, now=start)

    assert (failed.state, failed.attempts) == (JobState.FAILED, 1)
    assert (failed.error or {})["message"] == "rank"
    assert actions(database, job.id)[-1] == "job.failed"


def test_pauses_are_bounded() -> None:
    """Attempts without number still wait five minutes at most."""
    assert pause_after(1) == timedelta(seconds=5)
    assert pause_after(1000) == timedelta(minutes=5)
