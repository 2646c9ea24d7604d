"""A real service on each database: real app, real ledger, blobs in a folder, a token for every scope."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from safetensors.numpy import save
from starlette.testclient import TestClient

from api.app import create_app
from api.catalogue import Catalogue
from ledger import adapters, jobs, packs, references, tokens
from ledger.adapters import NewAdapter
from ledger.jobs import NewArtifact, NewJob, NewStatement, Result
from ledger.references import NewReference
from ledger.settings import Settings
from ledger.tokens import Scope

if TYPE_CHECKING:
    from pathlib import Path

    from fastapi import FastAPI

    from api.service import Service
    from ledger.tables import Verdict

MODULE = "model.layers.0.self_attn.q_proj"
OUT, IN, RANK = 24, 16, 4
MAX_UPLOAD = 4 << 20

CATALOGUE = Catalogue.model_validate(
    {
        "methods": [
            {
                "name": "scale",
                "version": 1,
                "parameters": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"strength": {"type": "number", "minimum": 0, "maximum": 1}},
                },
            },
            {"name": "patch", "version": 1, "needs": ["aligned", "patch"]},
            {"name": "project", "version": 1, "needs": ["aligned", "base"]},
            {"name": "guard", "version": 1, "needs": ["calibration"]},
            {
                "name": "compose",
                "version": 1,
                "parameters": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {
                        "steps": {
                            "type": "array",
                            "items": {
                                "type": "object",
                                "additionalProperties": False,
                                "required": ["method"],
                                "properties": {"method": {"type": "string"}, "parameters": {"type": "object"}},
                            },
                        }
                    },
                },
            },
        ],
        "policies": [{"name": "demo"}, {"name": "standard"}],
    }
)


def adapter_files(*, seed: int = 0, **config: Any) -> dict[str, bytes]:
    """A tiny valid adapter: one module."""
    random = np.random.default_rng(seed)
    weights = {
        f"base_model.model.{MODULE}.lora_A.weight": random.standard_normal((RANK, IN)).astype(np.float32),
        f"base_model.model.{MODULE}.lora_B.weight": random.standard_normal((OUT, RANK)).astype(np.float32),
    }
    described = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["q_proj"], **config}
    return {"adapter_config.json": json.dumps(described).encode(), "adapter_model.safetensors": save(weights)}


def as_parts(files: dict[str, bytes]) -> list[tuple[str, tuple[str, bytes, str]]]:
    """Files as multipart parts."""
    return [(name, (name, data, "application/octet-stream")) for name, data in files.items()]


@dataclass(frozen=True, kw_only=True)
class Api:
    """The running service and what a test wants of it."""

    app: FastAPI
    client: TestClient

    @property
    def service(self) -> Service:
        found: Service = self.app.state.service
        return found

    @property
    def staged(self) -> list[Path]:
        """What is left in staging."""
        return list((self.service.settings.data_dir / "staging").glob("*"))

    @property
    def stored(self) -> list[Path]:
        """Every file in the blob store, finished or not."""
        return [path for path in (self.service.settings.data_dir / "blobs").rglob("*") if path.is_file()]

    def token(self, *scopes: str, **options: Any) -> str:
        """A fresh token."""
        with self.service.database.begin() as tx:
            return tokens.mint(tx, name="test", scopes=scopes, **options).secret

    def upload(self, files: dict[str, bytes] | None = None, **fields: str) -> dict[str, Any]:
        """Upload an adapter that must be let in."""
        answer = self.client.post("/v1/adapters", files=as_parts(files or adapter_files()), data=fields)
        assert answer.status_code == 201, answer.text
        body: dict[str, Any] = answer.json()
        return body

    def seed_reference(self, name: str, shapes: Mapping[str, tuple[int, int]], **parts: Any) -> None:
        """A reference that no disk holds."""
        digest = f"sha256:{hashlib.sha256(name.encode()).hexdigest()}"
        new = NewReference(name=name, aligned_path="/nowhere", aligned_digest=digest, shapes=shapes, **parts)
        with self.service.database.begin() as tx:
            references.add(tx, new, actor="system:test")

    def seed_pack(self, name: str, digest: str) -> None:
        """A calibration pack for a reference, where no disk holds it."""
        with self.service.database.begin() as tx:
            pack = packs.Pack(kind="calibration", path="/nowhere", digest=digest)
            aligned = references.get(tx, name).aligned_digest
            packs.attach(tx, name, pack, aligned_digest=aligned, actor="system:test")

    def seed_adapter(self, name: str = "seeded") -> str:
        """An adapter row without bytes, for tests that need none."""
        new = NewAdapter(name=name, digest=f"sha256:{'a' * 64}", size=1, files=[], inspection={}, reference="tiny")
        with self.service.database.begin() as tx:
            return adapters.create(tx, new, uploaded_by="token:x").id

    def seed_job(self, adapter_id: str | None = None) -> str:
        """A queued job."""
        wish = NewJob(adapter_id=adapter_id or self.seed_adapter(), reference="tiny", spec={"policy": "demo"})
        with self.service.database.begin() as tx:
            return jobs.create(tx, wish, opened_by="token:x").id

    def finish(
        self, job_id: str, verdict: Verdict, files: dict[str, bytes] | None = None, report: bytes = b"{}"
    ) -> str | None:
        """Play the worker: claim the job and close it. Returns the artifact's digest."""
        blobs = self.service.blobs
        records = [
            {"name": name, "size": len(data), "sha256": blobs.put_bytes(data).removeprefix("sha256:")}
            for name, data in (files or {}).items()
        ]
        digest = f"sha256:{job_id.replace('-', '').ljust(64, '0')}"
        artifact = NewArtifact(digest=digest, files=records) if files else None
        statement = NewStatement(predicate_type="https://example.org/p/v1", digest=digest, envelope={"payload": "e30="})
        result = Result(
            verdict=verdict,
            report_digest=blobs.put_bytes(report),
            artifact=artifact,
            statements=(statement,) if artifact else (),
        )
        with self.service.database.begin() as tx:
            claim = jobs.claim(tx, job_id, owner="w1")
        with self.service.database.begin() as tx:
            jobs.close(tx, claim, result)
        return digest if files else None


@contextmanager
def served(data_dir: Path, database_url: str) -> Iterator[Api]:
    """The service, with an administrator's token on its client and the reference `tiny`."""
    app = create_app(Settings(data_dir=data_dir, database_url=database_url, max_upload_bytes=MAX_UPLOAD))
    app.state.service = replace(app.state.service, catalogue=CATALOGUE)
    with TestClient(app, raise_server_exceptions=False) as client:
        found = Api(app=app, client=client)
        client.headers["Authorization"] = f"Bearer {found.token(Scope.ADMIN)}"
        found.seed_reference("tiny", {MODULE: (OUT, IN)})
        yield found


@pytest.fixture
def api(tmp_path: Path, database_url: str) -> Iterator[Api]:
    """A service of the test's own, on each database."""
    with served(tmp_path, database_url) as found:
        yield found


@pytest.fixture
def sqlite_api(tmp_path: Path, sqlite_url: str) -> Iterator[Api]:
    """As `api`, on SQLite only, for laws in which the database plays no part."""
    with served(tmp_path, sqlite_url) as found:
        yield found


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def shared_api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """One service for a whole file, on each database: for requests that are refused and so change nothing."""
    new_url: Callable[[], str] = request.getfixturevalue(f"new_{request.param}_url")
    with served(tmp_path_factory.mktemp("shared"), new_url()) as found:
        yield found


Problem = Callable[..., dict[str, Any]]


@pytest.fixture
def problem() -> Problem:
    """Checks that an answer is a whole problem document, and returns it."""

    def check(answer: Any, status: int, kind: str | None = None) -> dict[str, Any]:
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        body: dict[str, Any] = answer.json()
        assert {"type", "title", "status", "detail", "instance"} <= set(body)
        assert body["status"] == status
        assert body["instance"] == f"urn:lora-repair:request:{answer.headers['x-request-id']}"
        if kind is not None:
            assert body["type"] == f"urn:lora-repair:problem:{kind}"
        return body

    return check
