"""Health, metrics, the catalogue and the OpenAPI document."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from starlette.testclient import TestClient

from api.app import assemble, create_app
from api.catalogue import PATH, Catalogue
from api.inputs import DEFAULT_POLICY
from api.openapi import openapi_document
from gate.schema_check import check, unknown_keywords
from ledger.settings import Settings
from ledger.tables import Verdict

if TYPE_CHECKING:
    from tests.api.conftest import Api, Problem

ROOT = Path(__file__).parents[2]


def test_a_migrated_service_is_ready(api: Api) -> None:
    assert api.client.get("/readyz").json() == {"status": "ok"}
    assert api.client.get("/livez").json() == {"status": "ok"}


def test_an_empty_database_is_not_ready(tmp_path: Path, problem: Problem) -> None:
    """Alive, but 503 with the part that is missing; migrations never run by themselves."""
    with TestClient(create_app(Settings(data_dir=tmp_path)), raise_server_exceptions=False) as client:
        assert client.get("/livez").status_code == 200
        body = problem(client.get("/readyz"), 503, "not-ready")
        assert [error["pointer"] for error in body["errors"]] == ["/database"]


def test_a_lost_blob_store_is_not_ready(sqlite_api: Api, problem: Problem) -> None:
    """The folder of the blobs became a file."""
    root = sqlite_api.service.settings.data_dir / "blobs"
    for path in sorted(root.rglob("*"), reverse=True):
        path.rmdir()
    root.rmdir()
    root.write_text("not a folder")
    body = problem(sqlite_api.client.get("/readyz"), 503, "not-ready")
    assert [error["pointer"] for error in body["errors"]] == ["/blobs"]


def test_metrics_count_what_is_there(api: Api) -> None:
    """Every state and verdict has a line, also at zero."""
    api.finish(api.seed_job(), Verdict.QUARANTINED)
    api.seed_job()
    lines = api.client.get("/metrics").text.splitlines()
    assert 'lora_repair_jobs{state="queued"} 1' in lines
    assert 'lora_repair_jobs{state="dead"} 0' in lines
    assert 'lora_repair_verdicts{verdict="quarantined"} 1' in lines
    assert [line for line in lines if line.startswith("lora_repair_outbox_lag_seconds ")]
    for line in lines:
        assert line.startswith("#") or float(line.rsplit(" ", 1)[1]) >= 0


def test_version_names_the_schema(sqlite_api: Api) -> None:
    body = sqlite_api.client.get("/version").json()
    assert body["api"] == "v1"
    assert body["migration"]


def test_references_are_listed_without_their_paths(api: Api) -> None:
    """Where a model lies on our disk is nobody's business."""
    (listed,) = api.client.get("/v1/references").json()["items"]
    assert (listed["name"], listed["modules"]) == ("tiny", 1)
    assert api.client.get("/v1/references/tiny").json() == listed
    assert "/nowhere" not in json.dumps(listed)


def test_the_catalogue_is_offered(api: Api) -> None:
    method, *_ = api.client.get("/v1/methods").json()["items"]
    assert (method["name"], method["parameters"]["properties"]["strength"]["maximum"]) == ("scale", 1)
    assert [policy["name"] for policy in api.client.get("/v1/policies").json()["items"]] == ["demo", "standard"]


def test_the_shipped_catalogue_loads_and_its_defaults_are_wishes() -> None:
    """Every method that is offered can be ordered without parameters, and none takes what it does not know."""
    catalogue = Catalogue.load(PATH)
    assert catalogue.methods
    assert {"demo", DEFAULT_POLICY} <= {policy.name for policy in catalogue.policies}
    for method in catalogue.methods:
        catalogue.validate_wish(policy="demo", method=method.name, parameters={})
        assert check({"no such thing": 1}, method.parameters, pointer="")


def test_a_schema_that_we_cannot_enforce_does_not_load(tmp_path: Path) -> None:
    """Better no service than one that skips a constraint in silence."""
    path = tmp_path / "catalogue.json"
    odd = {"name": "m", "version": 1, "parameters": {"properties": {"a": {"contains": {"type": "string"}}}}}
    path.write_text(json.dumps({"methods": [odd], "policies": []}))
    with pytest.raises(ValueError, match="contains"):
        Catalogue.load(path)


def test_the_committed_openapi_document_is_fresh() -> None:
    """`python -m api --openapi > docs/openapi.json` brings it up to date."""
    committed = json.loads((ROOT / "docs" / "openapi.json").read_text("utf-8"))
    assert committed == json.loads(json.dumps(openapi_document(assemble())))


def test_the_command_prints_the_document() -> None:
    """The same bytes as are committed; and nothing heavy is imported on the way."""
    done = subprocess.run([sys.executable, "-m", "api", "--openapi"], check=True, capture_output=True, cwd=ROOT)
    assert done.stdout == (ROOT / "docs" / "openapi.json").read_bytes()


def test_every_route_declares_its_problems(sqlite_api: Api) -> None:
    """Each error status has the problem document, and FastAPI's own shape is gone."""
    document = sqlite_api.client.get("/openapi.json").json()
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for path, item in document["paths"].items():
        for operation in item.values():
            responses = operation["responses"]
            assert "default" in responses
            if path.startswith("/v1/"):
                assert {"400", "401", "403", "422", "500"} <= set(responses)
            for status, response in responses.items():
                if status == "default" or int(status) >= 400:
                    (media,) = response["content"]
                    assert media == "application/problem+json"


def test_the_api_never_imports_torch() -> None:
    """Nor anything that does: it starts in a second and fits a small container."""
    heavy = ("torch", "repair", "worker", "celery")
    code = f"import sys, api.app, api.__main__; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("schema", "good", "bad"),
    [
        ({"type": "integer"}, [1, 1.0, -3], [True, 1.5, "1", None, float("inf"), float("nan")]),
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, [1, 0.5], [0, 1.1, float("nan")]),
        ({"type": ["string", "null"]}, ["", None], [0]),
        ({"enum": [1, "a"]}, [1, "a"], [True, "b"]),
        ({"const": True}, [True], [1]),
        ({"type": "string", "minLength": 1, "maxLength": 2, "pattern": "^a"}, ["a", "ab"], ["", "b", "abc"]),
        (
            {"type": "array", "items": {"type": "integer"}, "minItems": 1, "uniqueItems": True},
            [[1]],
            [[], ["a"], [1, 1]],
        ),
        ({"prefixItems": [{"type": "integer"}], "items": False}, [[1]], [[1, 2], ["a"]]),
        (
            {"type": "object", "required": ["a"], "additionalProperties": {"type": "integer"}},
            [{"a": 1}],
            [{}, {"a": "x"}],
        ),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, [1, None], ["a"]),
        ({"allOf": [{"minimum": 1}, {"maximum": 2}]}, [1, 2], [0, 3]),
        ({"$ref": "#/$defs/x", "$defs": {"x": {"type": "integer"}}}, [1], ["a"]),
        ({"multipleOf": 3}, [0, 9], [1]),
        ({"not": {"type": "null"}}, [1, "a"], [None]),
        (
            {"if": {"required": ["a"], "properties": {"a": {"const": 1}}}, "then": {"required": ["b"]}},
            [{}, {"a": 2}, {"a": 1, "b": 0}, {"b": 0}],
            [{"a": 1}],
        ),
        (
            {"properties": {"a": {"default": 2}}, "allOf": [{"x-ordered": ["a", "b"]}]},
            [{}, {"a": 9}, {"a": 0, "b": 1}, {"b": 3}, {"a": "x", "b": 1}],
            [{"a": 1, "b": 1}, {"a": 2, "b": 1}, {"b": 2}],
        ),
    ],
    ids=str,
)
def test_schemas_are_enforced(schema: dict[str, object], good: list[object], bad: list[object]) -> None:
    """As JSON Schema says, for every keyword that the catalogue may use."""
    assert unknown_keywords(schema) == set()
    for value in good:
        assert check(value, schema, pointer="") == [], value
    for value in bad:
        assert check(value, schema, pointer=""), value


def test_a_service_can_be_given_another_catalogue(sqlite_api: Api, problem: Problem) -> None:
    """The catalogue is a value of the service, not a global."""
    empty = Catalogue(methods=[], policies=[])
    sqlite_api.app.state.service = replace(sqlite_api.service, catalogue=empty)
    assert sqlite_api.client.get("/v1/methods").json()["items"] == []
