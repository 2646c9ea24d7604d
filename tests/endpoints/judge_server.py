"""A real HTTP server on 127.0.0.1 that speaks the OpenAI protocol; what it says is the test's."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | tuple[str, list[tuple[str, float]]] | int | bytes
"""Words, words with log-probabilities, a status, or a body as it is."""


@dataclass(kw_only=True)
class Spoken:
    """What the server is told to do, and what it was asked.

    Attributes:
        says: The answer to a body.
        refuses: Fields that it answers with 400, as strict servers do.
        key: The bearer key that it wants.
    """

    says: Callable[[dict[str, Any]], Answer]
    refuses: frozenset[str] = frozenset()
    key: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    paths: list[str] = field(default_factory=list)
    url: str = ""

    def asked(self) -> list[dict[str, Any]]:
        """Bodies that hold a question, not the empty one by which a judge learns what the server takes."""
        return [body for body in self.bodies if "Say OK." not in json.dumps(body)]


def choice_of(path: str, answer: Answer) -> dict[str, Any]:
    """One choice in the form of the path."""
    if isinstance(answer, int | bytes):
        raise TypeError(answer)
    text, pieces = (answer, None) if isinstance(answer, str) else answer
    if path.endswith("/chat/completions"):
        chat = None if pieces is None else {"content": [{"token": t, "logprob": p} for t, p in pieces]}
        return {"message": {"role": "assistant", "content": text}, "logprobs": chat, "finish_reason": "stop"}
    logprobs = None if pieces is None else {"tokens": [t for t, _ in pieces], "token_logprobs": [p for _, p in pieces]}
    return {"text": text, "logprobs": logprobs, "finish_reason": "stop"}


@contextmanager
def speaking(spoken: Spoken) -> Iterator[Spoken]:
    """The server, for the block."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            spoken.bodies.append(body)
            spoken.paths.append(self.path)
            if spoken.key and self.headers["authorization"] != f"Bearer {spoken.key}":
                return self._send(401, b"{}")
            if spoken.refuses & set(body):
                return self._send(400, json.dumps({"error": "extra field", "echo": body}).encode())
            hello = "Say OK." in json.dumps(body)
            answer = "OK" if hello else spoken.says(body)
            if isinstance(answer, int):
                return self._send(answer, b"{}")
            if isinstance(answer, bytes):
                return self._send(200, answer)
            return self._send(
                200, json.dumps({"model": "served-7", "choices": [choice_of(self.path, answer)]}).encode()
            )

        def _send(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        spoken.url = f"http://127.0.0.1:{server.server_port}/v1"
        yield spoken
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
