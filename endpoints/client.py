"""One JSON request to one server, tried again where trying again can help.

It knows status codes, limits and keys, and nothing of models. Neither a prompt nor a reply reaches an error message:
both may be harmful text.
"""

import time
from collections.abc import Mapping
from typing import Any, Final, final

import httpx2

from endpoints.errors import EndpointError, EndpointSilent

_TRIES: Final = 4
_FIRST_WAIT_S: Final = 0.5
_LARGEST_ANSWER: Final = 64 << 20
_MAY_PASS: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_LOOPBACK: Final = frozenset({"127.0.0.1", "::1", "localhost"})


@final
class Endpoint:
    """A server by its base URL (with ``/v1`` where the protocol has it) and a bearer key."""

    def __init__(
        self, url: str, *, key: str = "", timeout_s: float = 120.0, first_wait_s: float = _FIRST_WAIT_S
    ) -> None:
        """``first_wait_s`` is waited before the second try, twice as long before each further one."""
        try:
            address = httpx2.URL(url)
            if address.scheme not in {"http", "https"} or not address.host:
                raise EndpointError("an address looks like http://host:8000/v1", field=url)
            self._http = httpx2.Client(
                base_url=url.rstrip("/") + "/",
                headers={"Authorization": f"Bearer {key}"} if key else {},
                timeout=timeout_s,
                # A proxy of the environment cannot reach this machine's own addresses.
                trust_env=address.host not in _LOOPBACK,
            )
        except (httpx2.InvalidURL, UnicodeEncodeError) as error:
            raise EndpointError(f"the address or the key cannot be used: {error}", field=url) from error
        self.url = url
        self._first_wait_s = first_wait_s

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def get(self, path: str) -> Any:
        """The JSON answer to GET; raises EndpointError."""
        return self._ask("GET", path, None)

    def post(self, path: str, body: Mapping[str, Any], *, tries: int = _TRIES) -> Any:
        """The JSON answer to POST, or its text where the server answers in words; raises EndpointError.

        ``tries`` is 1 for what must not happen twice.
        """
        return self._ask("POST", path, body, tries=tries)

    def root(self, path: str) -> Any:
        """The JSON answer to GET beside ``/v1``, where servers keep what is not of the protocol."""
        return self._ask("GET", f"{self.url.rstrip('/').removesuffix('/v1')}/{path}", None)

    def _ask(self, verb: str, path: str, body: Mapping[str, Any] | None, *, tries: int = _TRIES) -> Any:
        wait = self._first_wait_s
        for attempt in range(1, tries + 1):
            try:
                answer = self._http.request(verb, path.lstrip("/"), json=body)
            except httpx2.TransportError as error:
                problem: EndpointError = EndpointSilent(f"{verb} {path}: {type(error).__name__}", field=self.url)
            else:
                if answer.is_success:
                    return self._read(answer, verb, path)
                kind = EndpointSilent if answer.status_code in _MAY_PASS else EndpointError
                # The server may quote the prompt in its words, so only the number is told.
                problem = kind(f"{verb} {path}: status {answer.status_code}", field=self.url, status=answer.status_code)
            if not isinstance(problem, EndpointSilent) or attempt == tries:
                raise problem
            time.sleep(wait)
            wait *= 2
        raise AssertionError("the loop returns or raises")

    def _read(self, answer: httpx2.Response, verb: str, path: str) -> Any:
        if len(answer.content) > _LARGEST_ANSWER:
            raise EndpointError(f"{verb} {path}: the answer is larger than {_LARGEST_ANSWER} bytes", field=self.url)
        if not answer.headers.get("content-type", "").startswith("application/json"):
            return answer.text
        try:
            return answer.json()
        except ValueError as error:
            raise EndpointError(f"{verb} {path}: the answer is no JSON", field=self.url) from error
