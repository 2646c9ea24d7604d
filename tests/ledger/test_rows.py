"""Adapters, references, batches: what they remember, and that pages of them hold still."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

import numpy as np
import pytest
from safetensors.numpy import save_file

from ledger import adapters, audit, batches, jobs, references
from ledger.adapters import AdapterFilter, NewAdapter, Refusal
from ledger.audit import Action, Query
from ledger.batches import NewBatch
from ledger.errors import BatchTooLarge, Conflict, NotFound, UnfitName
from ledger.references import NewReference
from ledger.tables import JobState, Verdict

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from ledger.db import Database
    from tests.ledger.conftest import OpenJob

NEW = NewAdapter(name="n", digest="sha256:d", size=3, files=[{"name": "f", "size": 3, "sha256": "x"}], inspection={})
MINUTE = timedelta(minutes=1)


def upload(database: Database, start: datetime, count: int) -> list[str]:
    """Adapters named 0, 1, ..., a minute apart, by two callers."""
    ids = []
    for n in range(count):
        with database.begin() as tx:
            new = replace(NEW, name=str(n), reference="demo" if n % 2 else None)
            ids.append(adapters.create(tx, new, uploaded_by=f"token:{n % 3}", now=start + n * MINUTE).id)
    return ids


def test_upload_is_remembered_and_logged(database: Database, adapter_id: str, start: datetime) -> None:
    """Row and event are one."""
    with database.read() as tx:
        adapter = adapters.get(tx, adapter_id)
        event = audit.search(tx, Query(subject_id=adapter_id)).items[0]

    assert (adapter.inspection, adapter.created_at) == ({"rank": 4}, start)
    assert (event.action, event.digest, event.actor) == (Action.ADAPTER_UPLOADED, "sha256:b", "token:up")


@pytest.mark.parametrize("kind", ["adapter", "artifact", "reference", "job", "batch"])
def test_what_is_not_there_is_named(database: Database, kind: str) -> None:
    """One exception for all kinds, with kind and key."""
    readers = {
        "adapter": adapters.get,
        "artifact": adapters.artifact,
        "reference": references.get,
        "job": jobs.get,
        "batch": batches.get,
    }
    with pytest.raises(NotFound) as missing, database.read() as tx:
        readers[kind](tx, "nope")

    assert (missing.value.kind, missing.value.key) == (kind, "nope")


def test_refusal_leaves_one_event_that_can_be_shown(database: Database) -> None:
    """The names in it come from a hostile file: cut, and without control characters."""
    hostile = Refusal(file="\x1b[2J\0" + "a" * 5000, field="__metadata__", rule="header-too-long", detail="\u202e\n")
    with database.begin() as tx:
        subject = adapters.record_refusal(tx, hostile, uploaded_by="token:up")

    with database.read() as tx:
        event = audit.search(tx, Query(action=Action.ADAPTER_REFUSED)).items[0]
        assert audit.verify(tx).ok
        assert adapters.search(tx, AdapterFilter()).items == ()
    assert (event.subject_id, event.reason, event.detail["field"]) == (
        subject,
        "header-too-long",
        "__metadata__",
    )
    assert all(str(value).isprintable() and len(value) <= 200 for value in event.detail.values())


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (AdapterFilter(), "543210"),
        (AdapterFilter(reference="demo"), "531"),
        (AdapterFilter(uploaded_by="token:1"), "41"),
        (AdapterFilter(uploaded_by="token:1", reference="demo"), "1"),
        (AdapterFilter(name="2"), "2"),
        (AdapterFilter(digest="sha256:no"), ""),
    ],
)
def test_filters(database: Database, adapter_id: str, start: datetime, wanted: AdapterFilter, expected: str) -> None:
    """All conditions hold together; newest first."""
    upload(database, start + MINUTE, 6)

    with database.read() as tx:
        found = adapters.search(tx, replace(wanted, since=start + MINUTE)).items
    assert "".join(adapter.name for adapter in found) == expected


@pytest.mark.parametrize("newest_first", [True, False])
def test_pages_hold_still_while_rows_arrive(
    database: Database, adapter_id: str, start: datetime, newest_first: bool
) -> None:
    """Whatever is uploaded meanwhile, every row that was there is seen once, in order."""
    ids = [adapter_id, *upload(database, start, 6)]
    seen: list[str] = []
    key: str | None = None
    for turn in range(4):
        with database.read() as tx:
            page = adapters.search(tx, AdapterFilter(), after=key, limit=2, newest_first=newest_first)
        seen += [adapter.id for adapter in page.items]
        key = page.next
        if turn < 3:
            upload(database, start, 1)

    old = [adapter for adapter in seen if adapter in ids]
    assert old == (ids[::-1] if newest_first else ids)
    assert len(seen) == len(set(seen))
    assert (key is None) == newest_first


def test_page_size_is_bounded(database: Database, adapter_id: str) -> None:
    """Neither nothing nor everything can be asked for."""
    with database.read() as tx:
        assert len(adapters.search(tx, AdapterFilter(), limit=0).items) == 1
        assert len(adapters.search(tx, AdapterFilter(), limit=10**9).items) == 1


def test_reference_never_changes_its_meaning(database: Database) -> None:
    """The same pair again is no error and may have moved; other models need another name."""
    new = NewReference(name="r", aligned_path="/a", aligned_digest="sha256:1", shapes={"q": (8, 4)})
    for path in ("/a", "/b"):
        with database.begin() as tx:
            references.add(tx, replace(new, aligned_path=path), actor="system:cli")
    for other in (replace(new, aligned_digest="sha256:2"), replace(new, base_digest="sha256:3")):
        with pytest.raises(Conflict, match="'r'"), database.begin() as tx:
            references.add(tx, other, actor="system:cli")

    with database.read() as tx:
        (kept,) = references.every(tx)
        added = audit.search(tx, Query(action=Action.REFERENCE_ADDED)).items
    assert (kept.aligned_path, references.shapes_of(kept)) == ("/b", {"q": (8, 4)})
    assert len(added) == 1


def test_a_reference_that_moved_is_in_the_log(database: Database) -> None:
    """Each move is one event, in the transaction that makes it; the same folders again are none."""
    new = NewReference(name="r", aligned_path="/a", aligned_digest="sha256:1", base_path="/x", base_digest="sha256:2")
    moves = (new, new, replace(new, base_path="/y"), replace(new, aligned_path="/b"))
    for move in moves:
        with database.begin() as tx:
            references.add(tx, move, actor="token:1")
    with suppress(ZeroDivisionError), database.begin() as tx:
        references.add(tx, replace(new, aligned_path="/c"), actor="token:1")
        raise ZeroDivisionError

    with database.read() as tx:
        moved = audit.search(tx, Query(action="reference.moved"), newest_first=False).items
        assert audit.verify(tx).ok
    assert [event.detail for event in moved] == [{"moved": ["base"]}, {"moved": ["aligned", "base"]}]
    assert {(event.actor, event.subject_id, event.digest) for event in moved} == {("token:1", "r", "sha256:1")}


def with_tool(
    new: NewReference, tool: str, *, path: str, digest: str, files: Mapping[str, Mapping[str, str]]
) -> NewReference:
    """The reference with a patch or a twin."""
    if tool == "patch":
        return replace(new, patch_path=path, patch_digest=digest, files=files)
    return replace(new, twin_path=path, twin_digest=digest, files=files)


@pytest.mark.parametrize(("tool", "said"), [("patch", "patched"), ("twin", "twinned")])
def test_a_tool_may_come_later_and_is_in_the_log(database: Database, tool: str, said: str) -> None:
    """It is no part of what the name means: no conflict, one event for each other patch; without one it stays."""
    new = NewReference(name="r", aligned_path="/a", aligned_digest="sha256:1", files={"aligned": {"m": "sha256:0"}})
    first, other = (
        with_tool(new, tool, path=f"/{p}", digest=f"sha256:{p}", files={tool: {"w": f"sha256:{n}"}})
        for p, n in (("p", 4), ("q", 5))
    )
    for one in (
        new,
        first,
        first,
        new,
        with_tool(first, tool, path="/p2", digest="sha256:p", files=first.files),
        other,
        new,
    ):
        with database.begin() as tx:
            references.add(tx, one, actor="token:1")

    with database.read() as tx:
        kept = references.get(tx, "r")
        events = audit.search(tx, Query(subject_id="r"), newest_first=False).items
    assert (getattr(kept, f"{tool}_path"), getattr(kept, f"{tool}_digest")) == ("/q", "sha256:q")
    assert kept.files == {"aligned": {"m": "sha256:0"}, tool: {"w": "sha256:5"}}
    without = {"base": None, "patch": None, "calibration": None, "twin": None}
    assert references.optional_parts(kept) == {**without, tool: "sha256:q"}
    assert [(event.action, event.digest, event.detail) for event in events[1:]] == [
        (f"reference.{said}", "sha256:p", {"before": None}),
        ("reference.moved", "sha256:1", {"moved": [tool]}),
        (f"reference.{said}", "sha256:q", {"before": "sha256:p"}),
    ]


def test_reference_is_described_by_its_files(database: Database, tmp_path: Path) -> None:
    """Digests of both checkpoints and the shapes of the aligned one; other bytes are another reference."""
    for part in ("aligned", "base"):
        (tmp_path / part).mkdir()
        save_file({"q.weight": np.ones((8, 4), np.float32)}, tmp_path / part / "model.safetensors")
        (tmp_path / part / "config.json").write_text(part)

    new = references.describe("pair-1", aligned=tmp_path / "aligned", base=tmp_path / "base")
    with database.begin() as tx:
        references.add(tx, new, actor="system:cli")
        assert references.names(tx) == ("pair-1",)
    (tmp_path / "aligned" / "config.json").write_text("other")

    assert new.shapes == {"q": (8, 4)}
    assert set(new.files["base"]) == {"config.json", "model.safetensors"}
    assert new.aligned_digest != new.base_digest
    with pytest.raises(Conflict), database.begin() as tx:
        references.add(tx, references.describe("pair-1", aligned=tmp_path / "aligned"), actor="system:cli")


@pytest.mark.parametrize("name", ["", "A", "a/b", "../a", "a b", "-a", "a" * 101, "ü"])
def test_reference_names_fit_queues_and_paths(tmp_path: Path, name: str) -> None:
    """Refused before a file is read."""
    with pytest.raises(UnfitName):
        references.describe(name, aligned=tmp_path / "nowhere")


@pytest.mark.parametrize("wrong", [{"adapter_id": "nope"}, {"reference": "nope"}])
def test_job_needs_what_it_names(open_job: OpenJob, wrong: dict[str, str]) -> None:
    """Found out before anything is written."""
    with pytest.raises(NotFound, match="nope"):
        open_job(**wrong)


def test_equal_specs_have_equal_digests(open_job: OpenJob) -> None:
    """Whatever the order of the keys."""
    one, same, other = ({"a": 1, "b": 0.5}, {"b": 0.5, "a": 1}, {"a": 1, "b": 0.25})

    assert open_job(spec=one).spec_digest == open_job(spec=same).spec_digest != open_job(spec=other).spec_digest


def test_batch_by_filter_counts_its_jobs(database: Database, adapter_id: str, start: datetime) -> None:
    """One job for each adapter that the filter chose then; progress names every state and verdict."""
    upload(database, start, 6)
    wish = NewBatch(reference="demo", spec={"policy": "demo"}, adapters=AdapterFilter(reference="demo", since=start))
    with database.begin() as tx:
        batch = batches.create(tx, wish, opened_by="token:b", now=start)
    upload(database, start, 2)

    with database.read() as tx:
        mine = jobs.search(tx, jobs.JobFilter(batch_id=batch.id)).items
        before = batches.progress(tx, batch.id)
    assert (batch.total, len(mine)) == (4, 4)
    assert batch.adapter_filter == {"reference": "demo", "since": "2026-11-21T12:00:00.000000Z"}
    assert (before.states[JobState.QUEUED], before.done) == (4, False)

    with database.begin() as tx:
        claim = jobs.claim(tx, mine[0].id, owner="w", now=start)
    with database.begin() as tx:
        jobs.close(tx, claim, jobs.Result(verdict=Verdict.QUARANTINED, report_digest=None))
    with database.begin() as tx:
        batches.request_cancel(tx, batch.id, actor="token:b", now=start)
    with database.read() as tx:
        after = batches.progress(tx, batch.id)
        assert audit.verify(tx).ok
    assert (after.states[JobState.SUCCEEDED], after.states[JobState.CANCELLED], after.done) == (1, 3, True)
    assert (after.verdicts[Verdict.QUARANTINED], after.verdicts[Verdict.REFUSED]) == (1, 0)


def test_batch_by_names(database: Database, adapter_id: str, start: datetime) -> None:
    """An adapter that is named twice has one job; one that does not exist opens none at all."""
    other = upload(database, start, 1)[0]
    wish = NewBatch(reference="demo", spec={}, adapters=[adapter_id, other, adapter_id], name="mine")
    with database.begin() as tx:
        assert batches.create(tx, wish, opened_by="token:b").total == 2

    with pytest.raises(NotFound, match="nope"), database.begin() as tx:
        batches.create(tx, replace(wish, adapters=[adapter_id, "nope"]), opened_by="token:b")
    with database.read() as tx:
        assert len(batches.search(tx).items) == 1
        assert len(jobs.search(tx, jobs.JobFilter()).items) == 2


def test_batch_is_bounded(database: Database, adapter_id: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One transaction opens it, so it must fit into one."""
    monkeypatch.setattr(batches, "LARGEST_BATCH", 1)
    for chosen in (["a", "b"], AdapterFilter()):
        with database.begin() as tx:
            adapters.create(tx, NEW, uploaded_by="token:x")
        with pytest.raises(BatchTooLarge), database.begin() as tx:
            batches.create(tx, NewBatch(reference="demo", spec={}, adapters=chosen), opened_by="token:b")


def test_cancelled_batch_is_cancelled_once(database: Database, adapter_id: str) -> None:
    """Asking again changes nothing and logs nothing."""
    with database.begin() as tx:
        batch = batches.create(tx, NewBatch(reference="demo", spec={}, adapters=[adapter_id]), opened_by="token:b")
    heads = []
    for _ in range(2):
        with database.begin() as tx:
            batches.request_cancel(tx, batch.id, actor="token:b")
        with database.read() as tx:
            heads.append(audit.head(tx))

    assert heads[0] == heads[1]
