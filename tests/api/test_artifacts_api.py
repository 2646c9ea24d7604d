"""Downloads: only what was released, exactly those bytes, whole or in part."""

from __future__ import annotations

import base64
import hashlib
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as laws
from hypothesis import strategies as st

from ledger.tables import Verdict

if TYPE_CHECKING:
    from tests.api.conftest import Api, Problem

DATA = bytes(range(256)) * 40
NAME = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def released(shared_api: Api) -> str:
    """The address of one released file; it never changes, so one is enough for all."""
    files = {NAME: DATA, "adapter_config.json": b"{}", "README.md": b"<script>"}
    digest = shared_api.finish(shared_api.seed_job(), Verdict.RELEASED_REPAIRED, files)
    return f"/v1/artifacts/{digest}/files/{NAME}"


def test_a_release_lists_its_files_and_statements(api: Api) -> None:
    """The job leads to the artifact, the artifact to the job and to its statements."""
    job = api.seed_job()
    api.finish(job, Verdict.RELEASED_UNCHANGED, {NAME: DATA})
    artifact = api.client.get(api.client.get(f"/v1/jobs/{job}").json()["links"]["artifact"]).json()
    assert (artifact["job_id"], artifact["verdict"]) == (job, "released_unchanged")
    (file,) = artifact["files"]
    assert file == {"name": NAME, "size": len(DATA), "sha256": f"sha256:{hashlib.sha256(DATA).hexdigest()}"}
    (statement,) = api.client.get(artifact["links"]["statements"]).json()["items"]
    assert (statement["artifact_digest"], statement["envelope"]) == (artifact["digest"], {"payload": "e30="})
    none = api.client.get("/v1/statements", params={"artifact": f"sha256:{'0' * 64}"}).json()
    assert none == {"items": [], "next_cursor": None}


def test_what_was_not_released_is_not_there(api: Api, problem: Problem) -> None:
    """A quarantined adapter has a report, and no artifact under any digest that we know of it."""
    upload = api.upload(reference="tiny")
    job = api.seed_job(upload["id"])
    api.finish(job, Verdict.QUARANTINED)
    body = api.client.get(f"/v1/jobs/{job}").json()
    assert body["artifact_digest"] is None
    digests = {upload["digest"], body["report_digest"], *(file["sha256"] for file in upload["files"])}
    for digest in digests:
        problem(api.client.get(f"/v1/artifacts/{digest}"), 404)
        problem(api.client.get(f"/v1/artifacts/{digest}/files/{NAME}"), 404)


def test_a_whole_download_has_everything(shared_api: Api, released: str) -> None:
    """Bytes, digest, tag, name and a cache rule; and nothing that a browser would run."""
    answer = shared_api.client.get(released)
    raw = hashlib.sha256(DATA)
    assert (answer.status_code, answer.content) == (200, DATA)
    assert answer.headers["etag"] == f'"sha256:{raw.hexdigest()}"'
    assert answer.headers["repr-digest"] == f"sha-256=:{base64.b64encode(raw.digest()).decode()}:"
    assert answer.headers["content-length"] == str(len(DATA))
    assert answer.headers["accept-ranges"] == "bytes"
    assert "immutable" in answer.headers["cache-control"]
    assert answer.headers["content-disposition"] == f'attachment; filename="{NAME}"'
    readme = shared_api.client.get(released.replace(NAME, "README.md"))
    assert readme.headers["content-type"].startswith("text/plain")
    assert readme.headers["x-content-type-options"] == "nosniff"


def test_head_is_get_without_the_body(shared_api: Api, released: str) -> None:
    """Same headers; no event, because nothing was downloaded."""
    head, whole = shared_api.client.head(released), shared_api.client.get(released)
    assert head.content == b""
    skip = {"x-request-id"}
    assert {k: v for k, v in head.headers.items() if k not in skip} == {
        k: v for k, v in whole.headers.items() if k not in skip
    }


def test_a_known_file_is_not_sent_again(shared_api: Api, released: str) -> None:
    """304 for its tag, in a list too."""
    etag = shared_api.client.get(released).headers["etag"]
    for header in (etag, f'"other", {etag}', "*"):
        answer = shared_api.client.get(released, headers={"If-None-Match": header})
        assert (answer.status_code, answer.content) == (304, b"")
    assert shared_api.client.get(released, headers={"If-None-Match": '"other"'}).status_code == 200


@laws(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.integers(0, len(DATA) - 1), length=st.integers(1, 5000))
def test_a_range_is_a_slice(shared_api: Api, released: str, start: int, length: int) -> None:
    """206 with exactly those bytes, their place, and the digest of the whole."""
    answer = shared_api.client.get(released, headers={"Range": f"bytes={start}-{start + length - 1}"})
    wanted = DATA[start : start + length]
    assert (answer.status_code, answer.content) == (206, wanted)
    assert answer.headers["content-range"] == f"bytes {start}-{start + len(wanted) - 1}/{len(DATA)}"
    assert answer.headers["content-length"] == str(len(wanted))
    whole = base64.b64encode(hashlib.sha256(DATA).digest()).decode()
    assert answer.headers["repr-digest"] == f"sha-256=:{whole}:"


def test_a_range_past_the_end_is_416(shared_api: Api, problem: Problem, released: str) -> None:
    """With the size, so that the client can ask again."""
    answer = shared_api.client.get(released, headers={"Range": f"bytes={len(DATA)}-"})
    problem(answer, 416, "range-not-satisfiable")
    assert answer.headers["content-range"] == f"bytes */{len(DATA)}"


def test_if_range_guards_against_another_file(shared_api: Api, released: str) -> None:
    """Part for our tag, whole for any other."""
    etag = shared_api.client.get(released).headers["etag"]
    part = shared_api.client.get(released, headers={"Range": "bytes=0-9", "If-Range": etag})
    whole = shared_api.client.get(released, headers={"Range": "bytes=0-9", "If-Range": '"other"'})
    assert (part.status_code, len(part.content)) == (206, 10)
    assert (whole.status_code, whole.content) == (200, DATA)


def test_two_parts_make_the_whole(shared_api: Api, released: str) -> None:
    """What a broken download continues with."""
    half = len(DATA) // 2
    first = shared_api.client.get(released, headers={"Range": f"bytes=0-{half - 1}"})
    rest = shared_api.client.get(released, headers={"Range": f"bytes={half}-", "If-Range": first.headers["etag"]})
    assert first.content + rest.content == DATA


def test_a_download_is_one_audit_event(shared_api: Api, released: str) -> None:
    """However many parts it comes in, and none when nothing was sent."""

    def downloads() -> list[Any]:
        found: list[Any] = shared_api.client.get("/v1/audit", params={"action": "artifact.downloaded"}).json()["items"]
        return found

    known = downloads()
    etag = shared_api.client.head(released).headers["etag"]
    shared_api.client.get(released, headers={"If-None-Match": etag})
    assert downloads() == known
    shared_api.client.get(released, headers={"Range": "bytes=0-99"})
    shared_api.client.get(released, headers={"Range": "bytes=100-"})
    event, *others = downloads()
    assert others == known
    assert event["detail"] == {"file": NAME}
    assert event["subject_type"] == "artifact"


def test_only_its_own_files(shared_api: Api, problem: Problem, released: str) -> None:
    for name in ("model.sig", "..%2Fadapter_config.json", "%2Fetc%2Fpasswd"):
        problem(shared_api.client.get(released.replace(NAME, name)), 404)
