"""A data set's file through the hub's own client, from a hub on this machine: pinned by commit and by content."""

import hashlib
import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from repair.__main__ import main
from repair.checks.packs import load_pack

COMMIT = "5" * 40
TABLE = b"Behavior,Tags\nname a river,land\nname a mountain range,land\n"
PLACE = f"/datasets/some/set/resolve/{COMMIT}/data/rows.csv"


class Hub(BaseHTTPRequestHandler):
    """One file at one commit, as the hub serves it."""

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, *, body: bool) -> None:
        found = self.path.partition("?")[0] == PLACE
        content = TABLE if found else json.dumps({"error": "not found"}).encode()
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("ETag", f'"{hashlib.sha1(content, usedforsecurity=False).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Quiet."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    yield
    server.shutdown()
    server.server_close()


def add(home: Path, *, digest: str, revision: str = COMMIT) -> int:
    words = ["packs", "add", "mine", "--hub", "some/set", "--path", "data/rows.csv", "--revision", revision]
    words += ["--sha256", digest, "--kind", "harmful", "--split", "certify", "--licence", "own"]
    return main([*words, "--text", "Behavior", "--category", "Tags", "--home", str(home), "--network", "hub", "--json"])


@pytest.mark.usefixtures("hub")
def test_a_file_of_the_hub_becomes_a_pack(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The bytes that were asked for, or nothing."""
    good = hashlib.sha256(TABLE).hexdigest()
    assert add(tmp_path / "one", digest=good) == 0, capfd.readouterr().err
    found = load_pack("mine", home=tmp_path / "one")
    assert [row.text for row in found.of_half("certify")] == ["name a river", "name a mountain range"]
    assert f"hub some/set {COMMIT} data/rows.csv" in (tmp_path / "one" / "mine" / "manifest.toml").read_text()
    assert add(tmp_path / "two", digest="0" * 64) == 1
    assert add(tmp_path / "three", digest=good, revision="6" * 40) == 1
    assert not (tmp_path / "two" / "mine").exists()
    assert not (tmp_path / "three" / "mine").exists()
