"""Who may do what: every route needs its scope, and nothing else opens it."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from ledger import tokens
from ledger.clock import utc_now

if TYPE_CHECKING:
    from tests.api.conftest import Api, Problem

NOBODY = "01890000-0000-7000-8000-000000000000"
NOTHING = f"sha256:{'0' * 64}"
OPEN = {"/livez", "/readyz", "/version", "/metrics"}
# Method, path as in OpenAPI -> the scope it needs; None: any valid token.
NEEDED = {
    ("post", "/v1/adapters"): "adapters:write",
    ("get", "/v1/adapters"): "adapters:read",
    ("get", "/v1/adapters/{adapter_id}"): "adapters:read",
    ("get", "/v1/adapters/{adapter_id}/files/{name}"): "uploads:read",
    ("post", "/v1/jobs"): "jobs:create",
    ("get", "/v1/jobs"): "jobs:read",
    ("get", "/v1/jobs/{job_id}"): "jobs:read",
    ("get", "/v1/jobs/{job_id}/events"): "jobs:read",
    ("get", "/v1/jobs/{job_id}/report"): "jobs:read",
    ("get", "/v1/jobs/{job_id}/report.html"): "jobs:read",
    ("post", "/v1/jobs/{job_id}/cancel"): "jobs:create",
    ("post", "/v1/jobs/{job_id}/requeue"): "jobs:create",
    ("post", "/v1/batches"): "jobs:create",
    ("get", "/v1/batches"): "jobs:read",
    ("get", "/v1/batches/{batch_id}"): "jobs:read",
    ("post", "/v1/batches/{batch_id}/cancel"): "jobs:create",
    ("get", "/v1/artifacts/{digest}"): "adapters:read",
    ("get", "/v1/artifacts/{digest}/files/{name}"): "adapters:read",
    ("get", "/v1/statements"): "adapters:read",
    ("get", "/v1/methods"): None,
    ("get", "/v1/policies"): None,
    ("get", "/v1/references"): None,
    ("get", "/v1/references/{name}"): None,
    ("get", "/v1/audit"): "audit:read",
    ("get", "/v1/audit/verify"): "audit:read",
    ("post", "/v1/tokens"): "admin:*",
    ("get", "/v1/tokens"): "admin:*",
    ("delete", "/v1/tokens/{token_id}"): "admin:*",
}
SCOPES = ["adapters:read", "adapters:write", "uploads:read", "jobs:read", "jobs:create", "audit:read"]


def filled(path: str) -> str:
    return path.format(
        adapter_id=NOBODY, job_id=NOBODY, batch_id=NOBODY, token_id=NOBODY, digest=NOTHING, name="README.md"
    )


def ask(api: Api, method: str, path: str, token: str | None) -> Any:
    headers = {"Authorization": f"Bearer {token}" if token is not None else ""}
    return api.client.request(method, filled(path), headers=headers)


def test_the_matrix_names_every_route(sqlite_api: Api) -> None:
    """A new route cannot be forgotten here."""
    document = sqlite_api.client.get("/openapi.json").json()
    routes = {(method, path) for path, item in document["paths"].items() for method in item}
    assert {route for route in routes if route[1] not in OPEN} == set(NEEDED)


@pytest.mark.parametrize(("route", "scope"), NEEDED.items(), ids=str)
def test_a_route_opens_to_its_scope_only(
    sqlite_api: Api, problem: Problem, route: tuple[str, str], scope: str | None
) -> None:
    """401 without a token, 403 with every other scope, and neither with the right one or an administrator's."""
    found = ask(sqlite_api, *route, None)
    problem(found, 401, "unauthenticated")
    assert found.headers["www-authenticate"] == 'Bearer realm="lora-repair"'
    others = sqlite_api.token(*(other for other in SCOPES if other != scope))
    found = ask(sqlite_api, *route, others)
    if scope is not None:
        problem(found, 403, "forbidden")
        assert f'error="insufficient_scope", scope="{scope}"' in found.headers["www-authenticate"]
    else:
        assert found.status_code not in {401, 403}
    for good in {scope or "jobs:read", "admin:*"}:
        assert ask(sqlite_api, *route, sqlite_api.token(good)).status_code not in {401, 403}


@pytest.mark.parametrize("path", sorted(OPEN))
def test_health_needs_no_token(sqlite_api: Api, path: str) -> None:
    assert ask(sqlite_api, "get", path, None).status_code == 200


def test_no_bad_token_gets_in(api: Api, problem: Problem) -> None:
    """Mistyped, unknown, expired and revoked tokens get one and the same answer."""
    good = api.token("admin:*")
    with api.service.database.begin() as tx:
        old = tokens.mint(tx, name="old", scopes=["admin:*"], expires_at=utc_now() - timedelta(seconds=1))
        gone = tokens.mint(tx, name="gone", scopes=["admin:*"])
        tokens.revoke(tx, gone.token.id, actor="system:test")
    mistyped = good[:-1] + ("a" if good[-1] != "a" else "b")
    details = set()
    for secret in (mistyped, tokens.new_secret(), old.secret, gone.secret, "x", "ä"):
        answer = api.client.get("/v1/adapters", headers={b"Authorization": f"Bearer {secret}".encode()})
        body = problem(answer, 401, "unauthenticated")
        assert 'error="invalid_token"' in answer.headers["www-authenticate"]
        details.add(body["detail"])
    assert len(details) == 1
    assert ask(api, "get", "/v1/adapters", good).status_code == 200


def test_other_schemes_are_no_tokens(sqlite_api: Api, problem: Problem) -> None:
    for header in ("Basic eDp5", "Bearer", "nonsense"):
        problem(sqlite_api.client.get("/v1/adapters", headers={"Authorization": header}), 401)


def test_use_of_a_token_is_noted(api: Api) -> None:
    """To the minute; that is what an administrator looks at before revoking."""
    secret = api.token("jobs:read")
    ask(api, "get", "/v1/jobs", secret)
    rows = api.client.get("/v1/tokens").json()["items"]
    (row,) = [row for row in rows if row["last4"] == secret[-4:]]
    assert row["last_used_at"] is not None
    assert secret not in api.client.get("/v1/tokens").text
