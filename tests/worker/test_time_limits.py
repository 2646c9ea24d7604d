"""A job cannot take for ever: neither one that is slow, nor one whose model hangs while the heartbeat goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from cli.settings import environment
from ledger import jobs, leases
from ledger.clock import utc_now
from ledger.settings import Settings
from ledger.tables import JobState
from tests.worker.test_run_job import Eventful
from worker.app import configuration, make_app
from worker.control import Publisher

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.worker.house import House

ROOT = Path(__file__).parents[2]


def test_the_limits_are_those_of_the_settings(tmp_path: Path) -> None:
    """Time, memory and the pause before a stop; without a wish there is no limit of memory."""
    settings = Settings(data_dir=tmp_path, job_seconds=100, job_kill_seconds=7, stop_seconds=33)
    found = configuration(settings, ())
    assert (found["task_soft_time_limit"], found["task_time_limit"]) == (100, 107)
    assert found["worker_soft_shutdown_timeout"] == 33
    assert found["worker_max_memory_per_child"] is None
    wished = settings.model_copy(update={"worker_max_memory_bytes": 3 << 30})
    assert configuration(wished, ())["worker_max_memory_per_child"] == 3 << 20
    usual = configuration(Settings(data_dir=tmp_path), ())
    assert 0 < usual["task_soft_time_limit"] < usual["task_time_limit"]


def test_a_job_that_takes_too_long_fails_for_good(house: House, poisoned: str) -> None:
    """The limit is an exception in the middle of the work; it would take as long another time."""

    def limit() -> None:
        raise SoftTimeLimitExceeded

    house.install(Eventful(limit))
    job = house.run(house.order(poisoned))

    assert (job.state, job.attempts) == (JobState.FAILED, 1)
    assert job.error is not None
    assert (job.error["code"], job.error["retry"]) == ("time-limit", "permanent")
    assert house.scratch == []


@pytest.mark.parametrize(
    "database_url", ["postgres"], indirect=True
)  # leases are tested on both; this is about the process
def test_a_model_that_hangs_loses_its_lease(house: House, poisoned: str, broker_url: str, tmp_path: Path) -> None:
    """The real `celery worker`: the heartbeat keeps the claim of the hanging job until its process is killed."""
    settings = house.settings.model_copy(
        update={"broker_url": broker_url, "lease_seconds": 2.0, "job_seconds": 3.0, "job_kill_seconds": 1.0}
    )
    job_id = house.order(poisoned)
    command = [sys.executable, "-m", "celery", "-A", "tests.worker.hanging:app", "worker", "-P", "prefork", "-c", "1"]
    with (tmp_path / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            [*command, "-n", "cpu@here", "-l", "WARNING", "--without-gossip", "--without-mingle"],
            env=environment(settings),
            cwd=ROOT,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        app = make_app(settings)
        Publisher(app)("repair.tiny", {"job_id": job_id})
        app.close()
        wait_for(lambda: house.job(job_id).state is JobState.RUNNING)
        # Longer than a lease: the heartbeat of a job that hangs goes on.
        time.sleep(2.5)
        assert lease_runs(house, job_id)
        wait_for(lambda: not lease_runs(house, job_id))
    finally:
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()

    assert "hard" in (tmp_path / "worker.log").read_text().lower()
    with house.database.begin() as tx:
        assert jobs.reap(tx).requeued == 1
    with house.database.begin() as tx:
        assert leases.claim(tx, job_id, owner="another").attempt == 2


def lease_runs(house: House, job_id: str) -> bool:
    until = house.job(job_id).lease_until
    return until is not None and until > utc_now()


def wait_for(holds: Callable[[], object], within_s: float = 90.0) -> None:
    deadline = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline:
            pytest.fail("it did not come to that")
        time.sleep(0.1)
