"""Uploading: what is let in is stored once and whole; whatever else comes leaves nothing but an audit event."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import tarfile
import zipfile
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load, save

from tests.api.conftest import MAX_UPLOAD, MODULE, Api, Problem, adapter_files, as_parts


def content_digest(data: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"


def test_a_good_adapter_is_created_and_read_back(api: Api) -> None:
    """201 with its location; every file comes back byte for byte, under its digest."""
    files = {**adapter_files(), "README.md": b"# hello\n"}
    answer = api.client.post("/v1/adapters", files=as_parts(files), data={"name": "mine", "reference": "tiny"})
    assert answer.status_code == 201, answer.text
    body = answer.json()
    assert answer.headers["location"] == f"/v1/adapters/{body['id']}"
    assert api.client.get(answer.headers["location"]).json() == body
    assert (body["name"], body["reference"]) == ("mine", "tiny")
    assert body["inspection"]["rank"] == 4
    for file in body["files"]:
        got = api.client.get(f"/v1/adapters/{body['id']}/files/{file['name']}")
        assert got.content == files[file["name"]]
        assert file["sha256"] == f"sha256:{hashlib.sha256(got.content).hexdigest()}"
        assert "unverified-" in got.headers["content-disposition"]
    assert api.staged == []


def test_an_adapter_trained_on_a_quantised_base_is_let_in_with_a_note(api: Api) -> None:
    """Its factors are like any other's; a job against the original is taken."""
    body = api.upload(adapter_files(base_model_name_or_path="unsloth/tiny-bnb-4bit"), reference="tiny")
    assert body["inspection"]["base_model_name_or_path"] == "unsloth/tiny-bnb-4bit"
    assert any("16 bit originals" in note for note in body["inspection"]["notes"])
    wish = {"adapter_id": body["id"], "policy": "demo"}
    assert api.client.post("/v1/jobs", json=wish, headers={"Idempotency-Key": "q"}).status_code == 202


def test_an_upload_is_in_the_audit_log(api: Api) -> None:
    """One event names the adapter and its digest."""
    body = api.upload()
    events = api.client.get("/v1/audit", params={"subject": f"adapter:{body['id']}"}).json()["items"]
    assert [(event["action"], event["digest"]) for event in events] == [("adapter.uploaded", body["digest"])]


def test_reading_an_uploads_bytes_is_in_the_audit_log(api: Api, problem: Problem) -> None:
    """Whole or in part, with who and which file; looking at its headers, or not being allowed to, is no download."""
    body = api.upload()
    file = f"/v1/adapters/{body['id']}/files/adapter_config.json"
    reader = {"Authorization": f"Bearer {api.token('adapters:read', 'adapters:write', 'jobs:read', 'audit:read')}"}
    problem(api.client.get(file, headers=reader), 403, "forbidden")
    assert api.client.head(file, headers=reader).status_code == 403
    secret = api.token("uploads:read")
    allowed = {"Authorization": f"Bearer {secret}"}
    head = api.client.head(file, headers=allowed)
    assert head.status_code == 200
    assert api.client.get(file, headers={**allowed, "If-None-Match": head.headers["etag"]}).status_code == 304
    for part in ({}, {"Range": "bytes=1-"}, {"Range": "bytes=-5"}):
        assert api.client.get(file, headers={**allowed, **part}).status_code in {200, 206}

    (token,) = [one for one in api.client.get("/v1/tokens").json()["items"] if one["last4"] == secret[-4:]]
    events = api.client.get("/v1/audit", params={"subject": f"adapter:{body['id']}"}).json()["items"]
    assert [event["action"] for event in events] == [*["upload.downloaded"] * 3, "adapter.uploaded"]
    assert [(event["actor"], event["digest"], event["detail"]) for event in events[:3]] == [
        (f"token:{token['id']}", body["digest"], {"file": "adapter_config.json"})
    ] * 3


def test_the_same_bytes_twice_are_two_adapters_of_one_digest(api: Api) -> None:
    """Bytes are stored once; name, reference and uploader are each upload's own."""
    first = api.upload(name="one")
    stored = len(api.stored)
    second = api.upload(name="two")
    assert first["digest"] == second["digest"]
    assert first["id"] != second["id"]
    assert len(api.stored) == stored


@pytest.mark.parametrize("kind", ["zip", "tar", "tar.gz"])
def test_an_archive_is_as_good_as_its_files(sqlite_api: Api, kind: str) -> None:
    """The digest is over the files, however they came."""
    files = adapter_files()
    packed = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(packed, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
    else:
        with tarfile.open(fileobj=packed, mode="w:gz" if kind == "tar.gz" else "w") as tar:
            for name, data in files.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    answer = sqlite_api.client.post("/v1/adapters", files={"archive": (f"a.{kind}", packed.getvalue())})
    assert answer.status_code == 201, answer.text
    assert answer.json()["digest"] == sqlite_api.upload(files)["digest"]
    assert sqlite_api.staged == []


def test_samples_are_kept_in_one_form(sqlite_api: Api) -> None:
    """Spacing and blank lines make no other blob."""
    texts = [b'{"prompt":"a","answer":"b"}\n', b'\n{ "answer" : "b", "prompt" : "a" }']
    digests = []
    for text in texts:
        parts = [*as_parts(adapter_files()), ("samples", ("s.jsonl", text, "application/jsonl"))]
        digests.append(sqlite_api.client.post("/v1/adapters", files=parts).json()["samples_digest"])
    assert digests[0] == digests[1]
    rows = [json.loads(line) for line in sqlite_api.service.blobs.read(digests[0]).splitlines()]
    assert rows == [{"prompt": "a", "answer": "b"}]


def test_a_sample_stays_on_its_line(sqlite_api: Api) -> None:
    """Whatever a reader takes for the end of a line."""
    text = "a\u2028b\u0085c"
    parts = [
        *as_parts(adapter_files()),
        ("samples", ("s", json.dumps({"prompt": text, "answer": "x"}, ensure_ascii=False).encode(), "text/plain")),
    ]
    digest = sqlite_api.client.post("/v1/adapters", files=parts).json()["samples_digest"]
    (line,) = sqlite_api.service.blobs.read(digest).decode().splitlines()
    assert json.loads(line)["prompt"] == text


@pytest.mark.parametrize(
    ("text", "pointer"),
    [
        (b"", "/samples"),
        (b"\xff", "/samples"),
        (b"nonsense", "/samples/0"),
        (b'{"prompt":"a","answer":"b"}\n[1]', "/samples/1"),
        (b'{"prompt":"a"}', "/samples/0"),
        (b'{"prompt":"a","answer":"b","more":1}', "/samples/0"),
        (b'{"prompt":"a","answer":3}', "/samples/0/answer"),
        (b'{"prompt":"a\\u0000","answer":"b"}', "/samples/0/prompt"),
        (b'{"prompt":"a","answer":"b"}\n' * 201, "/samples"),
    ],
)
def test_bad_samples_are_named_by_line(sqlite_api: Api, problem: Problem, text: bytes, pointer: str) -> None:
    """The problem points at the line, and at the key where there is one."""
    parts = [*as_parts(adapter_files()), ("samples", ("s.jsonl", text, "application/jsonl"))]
    body = problem(sqlite_api.client.post("/v1/adapters", files=parts), 422, "invalid-request")
    assert body["errors"][0]["pointer"] == pointer
    assert (sqlite_api.staged, sqlite_api.stored) == ([], [])


def test_an_adapter_that_does_not_fit_its_reference_is_refused(api: Api, problem: Problem) -> None:
    """The shapes of the reference are the gate's business already at the door."""
    files = adapter_files()
    api.seed_reference("wide", {MODULE: (99, 99)})
    answer = api.client.post("/v1/adapters", files=as_parts(files), data={"reference": "wide"})
    body = problem(answer, 422, "adapter-refused")
    assert (body["file"], body["rule"]) == ("adapter_model.safetensors", "shape-mismatch")


def bad_fields() -> list[Any]:
    return [
        ({"reference": "nowhere"}, "/reference"),
        ({"name": "x" * 201}, "/name"),
        ({"name": "a\x00b"}, "/name"),
        ({"colour": "red"}, "/colour"),
    ]


@pytest.mark.parametrize(("fields", "pointer"), bad_fields())
def test_a_bad_field_is_named(sqlite_api: Api, problem: Problem, fields: dict[str, str], pointer: str) -> None:
    """422 that points at the field; nothing is kept."""
    answer = sqlite_api.client.post("/v1/adapters", files=as_parts(adapter_files()), data=fields)
    assert problem(answer, 422)["errors"][0]["pointer"] == pointer
    assert (sqlite_api.staged, sqlite_api.stored) == ([], [])


@pytest.mark.parametrize("header", ["Content-Digest", "Repr-Digest"])
def test_a_digest_of_the_body_is_verified(sqlite_api: Api, problem: Problem, header: str) -> None:
    """The right one is taken, a wrong one is 400, one that is no digest too."""
    request = sqlite_api.client.build_request("POST", "/v1/adapters", files=as_parts(adapter_files()))
    body = request.read()
    sent = {"Content-Type": request.headers["content-type"], header: content_digest(body)}
    assert sqlite_api.client.post("/v1/adapters", content=body, headers=sent).status_code == 201
    before = len(sqlite_api.stored)
    for wrong in (content_digest(body + b"x"), "sha-256=:bm9uc2Vuc2U=:", "sha-256=nonsense"):
        answer = sqlite_api.client.post("/v1/adapters", content=body, headers={**sent, header: wrong})
        problem(answer, 400, "digest-mismatch")
    assert len(sqlite_api.stored) == before
    assert sqlite_api.staged == []


def test_a_digest_of_a_part_is_verified(sqlite_api: Api, problem: Problem) -> None:
    """Each part may announce its own."""
    name, data = "adapter_config.json", adapter_files()["adapter_config.json"]
    for announced, status in ((content_digest(data), 422), (content_digest(b"other"), 400)):
        part = (name, data, "application/json", {"Content-Digest": announced})
        answer = sqlite_api.client.post("/v1/adapters", files={name: part})
        # 422: the digest is right, and the weights are not there.
        problem(answer, status)
    assert sqlite_api.staged == []


def test_too_large_a_body_is_413(sqlite_api: Api, problem: Problem) -> None:
    """By its announced length, and by what really comes when no length is announced."""
    files = {**adapter_files(), "adapter_model.safetensors": bytes(MAX_UPLOAD + (2 << 20))}
    request = sqlite_api.client.build_request("POST", "/v1/adapters", files=as_parts(files))
    body, kind = request.read(), {"Content-Type": request.headers["content-type"]}
    problem(sqlite_api.client.post("/v1/adapters", content=body, headers=kind), 413, "too-large")
    unannounced = (body[at : at + 65536] for at in range(0, len(body), 65536))
    problem(sqlite_api.client.post("/v1/adapters", content=unannounced, headers=kind), 413, "too-large")
    assert (sqlite_api.staged, sqlite_api.stored) == ([], [])


def test_each_part_has_its_own_limit(sqlite_api: Api, problem: Problem) -> None:
    """A field is a word or two, not a megabyte."""
    answer = sqlite_api.client.post("/v1/adapters", files=as_parts(adapter_files()), data={"name": "x" * 2000})
    problem(answer, 413, "too-large")


def test_a_part_that_comes_twice_is_refused(sqlite_api: Api, problem: Problem) -> None:
    """Which one was meant, nobody can say; so a hundred parts are no way in either."""
    files = as_parts(adapter_files())
    answer = sqlite_api.client.post("/v1/adapters", files=[*files, files[0]])
    body = problem(answer, 422, "adapter-refused")
    assert (body["file"], body["rule"]) == ("adapter_config.json", "duplicate-member")
    assert (sqlite_api.staged, sqlite_api.stored) == ([], [])


@pytest.mark.parametrize(
    ("content_type", "body", "status"),
    [
        ("application/json", b"{}", 415),
        ("", b"", 415),
        ("multipart/form-data", b"--x--", 400),
        ("multipart/form-data; boundary=" + "x" * 71, b"", 400),
        ("multipart/form-data; boundary=x", b"", 400),
        ("multipart/form-data; boundary=x", b"garbage", 400),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\ncut', 400),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"A: b\r\n" * 99 + b"\r\n\r\n--x--\r\n", 400),
        ("multipart/form-data; boundary=x", b"--x\r\nA: " + b"b" * 9999 + b"\r\n\r\n\r\n--x--\r\n", 400),
    ],
)
def test_what_is_no_multipart_is_a_problem(
    sqlite_api: Api, problem: Problem, content_type: str, body: bytes, status: int
) -> None:
    """Never a 500, whatever the bytes."""
    answer = sqlite_api.client.post("/v1/adapters", content=body, headers={"Content-Type": content_type})
    problem(answer, status)
    assert (sqlite_api.staged, sqlite_api.stored) == ([], [])


@pytest.mark.parametrize(
    "name", ["../evil", "/etc/passwd", "sub/adapter_config.json", ".hidden", "a\\b", "", "x" * 300]
)
def test_a_part_cannot_choose_its_path(sqlite_api: Api, problem: Problem, name: str) -> None:
    """A name that no adapter has is refused before a byte is written."""
    answer = sqlite_api.client.post("/v1/adapters", files={name: ("f", b"x", "text/plain")})
    assert problem(answer, 422, "adapter-refused")["rule"] == "unexpected-file"
    assert (sqlite_api.staged, sqlite_api.stored) == ([], [])


def test_files_and_an_archive_do_not_mix(sqlite_api: Api, problem: Problem) -> None:
    """Which one was meant, nobody can say."""
    parts = [*as_parts(adapter_files()), ("archive", ("a.zip", b"PK", "application/zip"))]
    problem(sqlite_api.client.post("/v1/adapters", files=parts), 422, "invalid-request")


def test_a_refusal_leaves_an_audit_event_and_nothing_else(api: Api, problem: Problem) -> None:
    """Reason, file, field and rule; no adapter, no blob, no staged byte."""
    files = {**adapter_files(), "adapter_model.safetensors": b"\x80\x04."}
    answer = api.client.post("/v1/adapters", files=as_parts(files), headers={"Idempotency-Key": "k"})
    body = problem(answer, 422, "adapter-refused")
    assert body["file"] == "adapter_model.safetensors"
    assert (api.staged, api.stored) == ([], [])
    assert api.client.get("/v1/adapters").json()["items"] == []
    (event,) = api.client.get("/v1/audit", params={"action": "adapter.refused"}).json()["items"]
    assert (event["detail"]["file"], event["detail"]["rule"]) == (body["file"], body["rule"])
    # The key of a deed that failed is free again.
    good = api.client.post("/v1/adapters", files=as_parts(adapter_files()), headers={"Idempotency-Key": "k"})
    assert good.status_code == 201


def test_a_repeated_upload_with_a_key_is_one_adapter(api: Api, problem: Problem) -> None:
    """The boundary differs, the parts do not; other parts under the same key are 422."""
    key = {"Idempotency-Key": "same"}
    first = api.client.post("/v1/adapters", files=as_parts(adapter_files()), headers=key)
    again = api.client.post("/v1/adapters", files=as_parts(adapter_files()), headers=key)
    assert (again.status_code, again.json()) == (201, first.json())
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    other = api.client.post("/v1/adapters", files=as_parts(adapter_files(seed=1)), headers=key)
    problem(other, 422, "idempotency-key-reused")
    assert len(api.client.get("/v1/adapters").json()["items"]) == 1


def test_what_cannot_be_measured_is_refused_at_the_door(api: Api, problem: Problem) -> None:
    """Not an hour later by a job: with file, field, rule and what to do instead; only the audit event remains."""
    files = adapter_files(modules_to_save=["lm_head"])
    weights = load(files["adapter_model.safetensors"])
    weights["base_model.model.lm_head.weight"] = np.ones((8, 16), dtype=np.float32)
    files["adapter_model.safetensors"] = save(weights)
    body = problem(api.client.post("/v1/adapters", files=as_parts(files)), 422, "adapter-refused")
    assert (body["file"], body["field"], body["rule"]) == (
        "adapter_model.safetensors",
        "base_model.model.lm_head.weight",
        "unsupported-layout",
    )
    assert "modules_to_save" in body["detail"]
    assert (api.staged, api.stored) == ([], [])
