"""Jobs over HTTP: a wish is checked at the door, done once, and can be followed to its end."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from api.catalogue import Catalogue
from api.problems import Problem as Refusal
from ledger import idempotency, jobs
from ledger.idempotency import Call
from ledger.jobs import Failure, Retry
from ledger.tables import Verdict

if TYPE_CHECKING:
    from tests.api.conftest import Api, Problem


def order(api: Api, wish: dict[str, Any], key: str | None = "k") -> Any:
    headers = {"Idempotency-Key": key} if key is not None else {}
    return api.client.post("/v1/jobs", json=wish, headers=headers)


def test_a_job_is_accepted_and_found(api: Api) -> None:
    """202 with location, pause and body; the audit log and the outbox know it."""
    adapter = api.seed_adapter()
    answer = order(api, {"adapter_id": adapter, "policy": "demo"})
    assert answer.status_code == 202, answer.text
    body = answer.json()
    assert answer.headers["location"] == body["links"]["self"] == f"/v1/jobs/{body['id']}"
    assert int(answer.headers["retry-after"]) > 0
    assert (body["state"], body["verdict"], body["reference"]) == ("queued", None, "tiny")
    assert api.client.get(answer.headers["location"]).json() == body
    events = api.client.get("/v1/audit", params={"subject": f"job:{body['id']}"}).json()["items"]
    assert [event["action"] for event in events] == ["job.opened"]
    assert "lora_repair_outbox_unsent 1" in api.client.get("/metrics").text


def test_a_method_alone_must_still_meet_a_policy(api: Api) -> None:
    """Nothing is released unmeasured, and not by the demo's lenient numbers unless somebody names them."""
    wish = {"adapter_id": api.seed_adapter(), "method": "scale", "parameters": {"strength": 0.5}}
    body = order(api, wish).json()
    assert (body["policy"], body["method"], body["parameters"]) == ("standard", "scale", {"strength": 0.5})


@pytest.mark.parametrize(
    ("wish", "pointer"),
    [
        ({"policy": "lenient"}, "/policy"),
        ({"method": "magic"}, "/method"),
        ({"method": "scale", "parameters": {"strength": 2}}, "/parameters/strength"),
        ({"method": "scale", "parameters": {"strength": "much"}}, "/parameters/strength"),
        ({"method": "scale", "parameters": {"bogus/key": 1}}, "/parameters/bogus~1key"),
        ({"policy": "demo", "parameters": {"strength": 0.5}}, "/parameters"),
        ({"policy": "demo", "reference": "nowhere"}, "/reference"),
        ({"policy": "demo", "adapter_id": "01890000-0000-7000-8000-000000000000"}, "/adapter_id"),
        ({"policy": "demo", "priority": 1000}, "/priority"),
    ],
)
def test_a_bad_wish_is_refused_at_the_door(
    shared_api: Api, problem: Problem, wish: dict[str, Any], pointer: str
) -> None:
    """422 that points at what is wrong, and no job."""
    answer = order(shared_api, {"adapter_id": shared_api.seed_adapter(), **wish})
    assert problem(answer, 422)["errors"][0]["pointer"] == pointer
    assert shared_api.client.get("/v1/jobs").json()["items"] == []


@pytest.mark.parametrize(("method", "part"), [("patch", "patch"), ("project", "base"), ("guard", "calibration")])
def test_a_method_is_offered_only_where_the_reference_has_what_it_needs(
    api: Api, problem: Problem, method: str, part: str
) -> None:
    """A job or a batch that could never be done is refused at the door and opens nothing; with the part it is taken."""
    digest = f"sha256:{'7' * 64}"
    files = {part: {"model.safetensors": digest}}
    if part == "calibration":
        api.seed_reference("whole", {})
        api.seed_pack("whole", digest)
    else:
        api.seed_reference("whole", {}, **{f"{part}_digest": digest, f"{part}_path": "/nowhere", "files": files})
    adapter = api.seed_adapter()
    for path, named in (("jobs", {"adapter_id": adapter}), ("batches", {"adapter_ids": [adapter]})):

        def answer(reference: str, path: str = path, named: dict[str, Any] = named) -> Any:
            wish = {**named, "method": method, "reference": reference}
            return api.client.post(f"/v1/{path}", json=wish, headers={"Idempotency-Key": f"{path}-{reference}"})

        (error,) = problem(answer("tiny"), 422, "invalid-wish")["errors"]
        assert error["pointer"] == "/method"
        assert part in error["detail"]
        assert api.client.get(f"/v1/{path}").json()["items"] == []
        assert answer("whole").status_code == 202
    assert api.client.get("/v1/references/whole").json()[f"{part}_digest"] == digest


@pytest.mark.parametrize("wish", [{"method": "lox", "parameters": {"source": "twin"}}, {"method": "lox"}])
def test_a_parameter_may_ask_for_another_part(wish: dict[str, Any]) -> None:
    """Of the generated catalogue: with a twin no base is needed, and by default no twin; also within a composition."""
    offered = Catalogue.load()
    parts: dict[str, Any] = {"base": "sha256:b", "patch": None, "calibration": None, "twin": "sha256:t"}
    needed, other = ("twin", "base") if wish.get("parameters") else ("base", "twin")
    asked: tuple[tuple[str, dict[str, Any]], ...]
    asked = ("lox", wish.get("parameters", {})), ("compose", {"steps": [wish]})
    for method, parameters in asked:
        offered.validate_needs(method, parameters, {**parts, other: None}, reference="r")
        with pytest.raises(Refusal) as caught:
            offered.validate_needs(method, parameters, {**parts, needed: None}, reference="r")
        assert f"lox needs {needed}" in caught.value.errors[0].detail


@pytest.mark.parametrize(
    ("method", "command"),
    [("patch", "reference add tiny"), ("project", "reference add NAME"), ("guard", "reference prepare tiny")],
)
def test_a_refusal_names_the_command_that_helps(api: Api, problem: Problem, method: str, command: str) -> None:
    """Whoever runs the service need not look for it."""
    wish = {"adapter_id": api.seed_adapter(), "method": method, "reference": "tiny"}
    answer = api.client.post("/v1/jobs", json=wish, headers={"Idempotency-Key": "one"})
    (error,) = problem(answer, 422, "invalid-wish")["errors"]
    assert f"lora-repair {command}" in error["detail"]


@pytest.mark.parametrize(
    ("step", "pointer"),
    [
        ({"method": "bless"}, "/parameters/steps/1/method"),
        ({"method": "compose"}, "/parameters/steps/1/method"),
        ({"parameters": {}}, "/parameters/steps/1/method"),
        ({"method": "scale", "parameters": {"strength": 2}}, "/parameters/steps/1/parameters/strength"),
        ({"method": "scale", "parameters": {"patch": "/etc"}}, "/parameters/steps/1/parameters/patch"),
        ({"method": "patch"}, "/method"),  # the reference has no patch
    ],
)
def test_a_step_of_a_composition_is_held_to_the_catalogue(
    shared_api: Api, problem: Problem, step: dict[str, Any], pointer: str
) -> None:
    """What could not be asked for alone cannot be asked for inside a composition either."""
    steps = [{"method": "scale", "parameters": {"strength": 0.5}}, step]
    wish = {"adapter_id": shared_api.seed_adapter(), "method": "compose", "parameters": {"steps": steps}}
    answer = order(shared_api, wish)
    assert problem(answer, 422)["errors"][0]["pointer"] == pointer
    assert shared_api.client.get("/v1/jobs").json()["items"] == []


def test_a_composition_is_taken(api: Api) -> None:
    steps = [{"method": "scale", "parameters": {"strength": 0.5}}, {"method": "scale"}]
    wish = {"adapter_id": api.seed_adapter(), "method": "compose", "parameters": {"steps": steps}}
    assert order(api, wish).status_code == 202


def test_a_job_needs_a_reference(api: Api, problem: Problem) -> None:
    """The wish's or the upload's."""
    answer = order(api, {"adapter_id": api.upload()["id"], "policy": "demo"})
    assert problem(answer, 422)["errors"][0]["pointer"] == "/reference"


def test_a_key_is_required_and_plain(api: Api, problem: Problem) -> None:
    wish = {"adapter_id": api.seed_adapter(), "policy": "demo"}
    problem(order(api, wish, key=None), 400, "idempotency-key-missing")
    problem(order(api, wish, key="with space"), 400, "idempotency-key-invalid")
    problem(order(api, wish, key="x" * 256), 400, "idempotency-key-invalid")


def test_the_same_post_twice_is_one_job(api: Api, problem: Problem) -> None:
    """Same body in another spelling: replayed. Another body: 422. Another path or token: another deed."""
    adapter = api.seed_adapter()
    first = order(api, {"adapter_id": adapter, "policy": "demo"})
    again = order(api, {"policy": "demo", "priority": 0, "adapter_id": adapter})
    assert (again.status_code, again.json()) == (202, first.json())
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    assert "idempotency-replayed" not in first.headers
    problem(order(api, {"adapter_id": adapter, "policy": "demo", "priority": 1}), 422, "idempotency-key-reused")
    assert len(api.client.get("/v1/jobs").json()["items"]) == 1
    other = api.client.post(
        "/v1/jobs",
        json={"adapter_id": adapter, "policy": "demo"},
        headers={"Idempotency-Key": "k", "Authorization": f"Bearer {api.token('jobs:create')}"},
    )
    assert other.json()["id"] != first.json()["id"]


def test_a_key_whose_deed_runs_is_409(api: Api, problem: Problem) -> None:
    """The first request has not ended; the second is told to come back."""
    wish = {"adapter_id": api.seed_adapter(), "policy": "demo"}
    body = order(api, wish, key="first").json()
    me = body["opened_by"].removeprefix("token:")
    with api.service.database.begin() as tx:
        row = tx.connection().exec_driver_sql("SELECT body_digest FROM idempotency_key").scalar_one()
        call = Call(token_id=me, key="second", request="POST /v1/jobs", body_digest=row)
        assert idempotency.begin(tx, call) is None
    answer = order(api, wish, key="second")
    problem(answer, 409, "idempotency-in-progress")
    assert int(answer.headers["retry-after"]) > 0


def test_a_failed_deed_frees_its_key(api: Api, problem: Problem) -> None:
    """A refused wish is no deed: the same key may be used for a better one."""
    adapter = api.seed_adapter()
    problem(order(api, {"adapter_id": adapter, "policy": "demo", "reference": "nowhere"}), 422)
    assert order(api, {"adapter_id": adapter, "policy": "demo"}).status_code == 202


def test_a_job_that_did_not_change_is_304(api: Api) -> None:
    """The tag changes with every change that a reader can see."""
    job = api.seed_job()
    first = api.client.get(f"/v1/jobs/{job}")
    assert first.headers["etag"].startswith('W/"')
    conditional = {"If-None-Match": first.headers["etag"]}
    again = api.client.get(f"/v1/jobs/{job}", headers=conditional)
    assert (again.status_code, again.content) == (304, b"")
    with api.service.database.begin() as tx:
        claim = jobs.claim(tx, job, owner="w1")
    changed = api.client.get(f"/v1/jobs/{job}", headers=conditional)
    assert (changed.status_code, changed.json()["state"]) == (200, "running")
    with api.service.database.begin() as tx:
        jobs.heartbeat(tx, claim, progress={"stage": "measuring", "done": 3, "total": 10})
    told = {"stage": "measuring", "done": 3, "total": 10}
    assert api.client.get(f"/v1/jobs/{job}").json()["progress"] == told
    race = {**told, "phase": "choosing", "alive": 4, "best": 0.853, "seconds_left": 12}
    with api.service.database.begin() as tx:
        jobs.heartbeat(tx, claim, progress=race)
    assert api.client.get(f"/v1/jobs/{job}").json()["progress"] == race
    described = api.client.get("/openapi.json").json()["components"]["schemas"]["JobOut"]["properties"]["progress"]
    assert race.keys() <= described["properties"].keys()


def test_a_finished_job_shows_its_checks_and_report(api: Api, problem: Problem) -> None:
    """The summary of every arm in the job, all of it in the report, byte for byte as stored."""
    job = api.seed_job()
    problem(api.client.get(f"/v1/jobs/{job}/report"), 404)
    check = {"name": "harmful", "outcome": "fail", "hits": 9, "n": 10, "rate": 0.9, "low": 0.5, "high": 1.0}
    report = json.dumps(
        {"input": {"checks": [{**check, "details": {"much": 1}}], "rows": []}, "certify": None}
    ).encode()
    api.finish(job, Verdict.QUARANTINED, report=report)
    body = api.client.get(f"/v1/jobs/{job}").json()
    assert (body["state"], body["verdict"], body["artifact_digest"]) == ("succeeded", "quarantined", None)
    assert "artifact" not in body["links"]
    assert body["checks"] == {"input": [{**check, "bound": None, "cut_off_share": None, "reason": None}]}
    got = api.client.get(body["links"]["report"])
    assert (got.content, got.headers["content-type"]) == (report, "application/json")
    tagged = api.client.get(body["links"]["report"], headers={"If-None-Match": got.headers["etag"]})
    assert tagged.status_code == 304


def test_a_report_is_served_as_a_page_that_runs_nothing(api: Api, problem: Problem) -> None:
    """HTML with a policy against everything; tagged by report and drawing; another version's report is none."""
    job = api.seed_job()
    problem(api.client.get(f"/v1/jobs/{job}/report.html"), 404)
    refusal = {"file": "f", "field": "<script>alert(1)</script>", "rule": "nan-weight", "detail": "d"}
    report = json.dumps({"report_version": 1, "verdict": "refused", "refusal": refusal}).encode()
    api.finish(job, Verdict.REFUSED, report=report)
    got = api.client.get(api.client.get(f"/v1/jobs/{job}").json()["links"]["page"])
    assert got.headers["content-type"] == "text/html; charset=utf-8"
    assert got.text.startswith("<!doctype html>")
    assert "nan-weight" in got.text
    assert "<script" not in got.text
    policy = got.headers["content-security-policy"].split("; ")
    assert {"default-src 'none'", "frame-ancestors 'none'", "sandbox"} <= set(policy)
    assert got.headers["x-content-type-options"] == "nosniff"
    assert got.headers["content-disposition"] == f'inline; filename="report-{job}.html"'
    tagged = api.client.get(f"/v1/jobs/{job}/report.html", headers={"If-None-Match": got.headers["etag"]})
    assert (tagged.status_code, tagged.content) == (304, b"")
    assert got.headers["etag"] != api.client.get(f"/v1/jobs/{job}/report").headers["etag"]
    old = api.seed_job()
    api.finish(old, Verdict.QUARANTINED, report=b'{"verdict": "quarantined"}')
    problem(api.client.get(f"/v1/jobs/{old}/report.html"), 404)
    assert api.client.get(f"/v1/jobs/{old}/report").status_code == 200


def test_cancelling_is_safe_to_repeat(api: Api) -> None:
    """At once when nobody has the job; twice is one event; a running job is asked."""
    job = api.seed_job()
    for _ in range(2):
        answer = api.client.post(f"/v1/jobs/{job}/cancel")
        assert (answer.status_code, answer.json()["state"]) == (202, "cancelled")
    events = api.client.get("/v1/audit", params={"action": "job.cancelled"}).json()["items"]
    assert len(events) == 1
    running = api.seed_job()
    with api.service.database.begin() as tx:
        jobs.claim(tx, running, owner="w1")
    body = api.client.post(f"/v1/jobs/{running}/cancel", headers={"Idempotency-Key": "c"}).json()
    assert body["state"] == "running"
    assert body["cancel_requested_at"] is not None


def test_a_failed_job_is_queued_again_on_request(api: Api, problem: Problem) -> None:
    """It says so itself by a link; who asks twice with one key gets one answer, without a key the second is a 409."""
    job = api.seed_job()
    requeue = f"/v1/jobs/{job}/requeue"
    assert "requeue" not in api.client.get(f"/v1/jobs/{job}").json()["links"]
    problem(api.client.post(requeue), 409, "conflict")
    with api.service.database.begin() as tx:
        claim = jobs.claim(tx, job, owner="w1")
        jobs.fail(tx, claim, Failure(code="storage", message="gone", retry=Retry.PERMANENT))
    assert api.client.get(f"/v1/jobs/{job}").json()["links"]["requeue"] == requeue

    for _ in range(2):
        answer = api.client.post(requeue, headers={"Idempotency-Key": "again"})
        assert (answer.status_code, answer.json()["state"], answer.json()["attempts"]) == (202, "queued", 0)

    problem(api.client.post(requeue), 409, "conflict")
    problem(api.client.post("/v1/jobs/019ab6a0-5a5a-7000-8000-000000000000/requeue"), 404, "not-found")
    reader = {"Authorization": f"Bearer {api.token('jobs:read')}"}
    problem(api.client.post(requeue, headers=reader), 403, "forbidden")
    (event,) = api.client.get("/v1/audit", params={"action": "job.requeued"}).json()["items"]
    assert (event["subject_id"], event["outcome"], event["detail"]) == (job, "failed", {"attempts": 1})


def test_jobs_are_filtered(api: Api) -> None:
    """By state, verdict, adapter and reference."""
    first, second = api.seed_job(), api.seed_job()
    api.finish(first, Verdict.QUARANTINED)

    def ids(**query: str) -> list[str]:
        return [job["id"] for job in api.client.get("/v1/jobs", params=query).json()["items"]]

    assert ids() == [second, first]
    assert ids(state="queued") == [second]
    assert ids(verdict="quarantined") == [first]
    assert ids(reference="tiny") == [second, first]
    assert ids(reference="other") == []
    assert ids(adapter_id=api.client.get(f"/v1/jobs/{first}").json()["adapter_id"]) == [first]
