"""The OpenAI protocol as a judge needs it: greedy answers with their probabilities, from servers of every strictness.

Servers refuse fields that they do not know, and some refuse to be told a temperature. What this one takes is found
once, with a question that holds nothing, and is part of what is known about the judge.
"""

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from math import exp
from typing import Any, Final, final

from endpoints.client import Endpoint
from endpoints.errors import EndpointError, EndpointSilent
from repair.checks.guards.contract import Ask, Guard, Said

_OPTIONAL: Final = ("response_format", "add_special_tokens", "logprobs", "seed", "temperature", "max_tokens")
_SEED: Final = 1
_CHARACTERS: Final = 4  # of a token, where the tokenizer is elsewhere
_HELLO: Final = "Say OK."


@final
class ChatServer:
    """One model on one server, as its judge sees it; an `Asker` for guards."""

    def __init__(
        self,
        endpoint: Endpoint,
        model: str,
        *,
        at_once: int = 8,
        schema: Mapping[str, Any] | None = None,
        whole_texts: bool = False,
    ) -> None:
        """Find out what the server takes. Raises EndpointError when it takes nothing, EndpointSilent when silent."""
        self._endpoint, self._model, self._at_once, self._schema = endpoint, model, at_once, schema
        self._hello = Ask(text=_HELLO) if whole_texts else Ask(messages=(("user", _HELLO),))
        void = {"response_format": schema is None, "add_special_tokens": not whole_texts}
        self._dropped = frozenset(name for name, nowhere in void.items() if nowhere)
        self._lock = threading.Lock()
        self._answered = False
        served = self._negotiate()
        taken = [name for name in _OPTIONAL if name not in self._dropped]
        self.identity: Mapping[str, str] = {"model": model, "served": served, "request": ",".join(taken)}
        self.special: Sequence[str] = ()

    def clip(self, text: str, tokens: int) -> str:
        """About so many tokens: the tokenizer is on the server."""
        return text[: tokens * _CHARACTERS]

    def say(self, asks: Sequence[Ask], guard: Guard) -> list[Said | str]:
        """One answer for each question, several at a time, in order; raises EndpointSilent for a silent server."""
        return self.each(asks, max_tokens=guard.max_new_tokens)

    def each(self, asks: Sequence[Ask], *, max_tokens: int) -> list[Said | str]:
        """As `say`, without a guard."""
        with ThreadPoolExecutor(self._at_once) as threads:
            return list(threads.map(lambda ask: self._one(ask, max_tokens), asks))

    def _one(self, ask: Ask, max_tokens: int) -> Said | str:
        try:
            answer = self._post(ask, max_tokens, self._dropped)
        except EndpointSilent:
            raise
        except EndpointError:
            if not self._answered:
                raise
            return "endpoint-refused"  # this question; others were answered
        with self._lock:
            self._answered = True
        return read_answer(answer)

    def _post(self, ask: Ask, max_tokens: int, dropped: frozenset[str]) -> Any:
        path, body = _body(ask)
        chat = path.startswith("chat/")
        wanted: dict[str, Any] = {"temperature": 0, "seed": _SEED, "logprobs": True if chat else 1}
        wanted |= {} if chat else {"add_special_tokens": ask.begins}
        if self._schema is not None and chat:
            wanted["response_format"] = self._schema
        wanted = {name: value for name, value in wanted.items() if name not in dropped}
        limit = "max_completion_tokens" if "max_tokens" in dropped else "max_tokens"
        return self._endpoint.post(path, {"model": self._model, **body, **wanted, limit: max_tokens})

    def _negotiate(self) -> str:
        """Leave out as little as the server wants: nothing, one field, or several. Its name of the model."""
        first, start = None, self._dropped
        optional = [name for name in _OPTIONAL if name not in start]
        tries = [start, *(start | {name} for name in optional)]
        tries += [start | frozenset(optional[: n + 1]) for n in range(1, len(optional))]
        for dropped in tries:
            try:
                answer = self._post(self._hello, 16, dropped)
            except EndpointSilent:
                raise
            except EndpointError as error:
                first = first or error
                continue
            self._dropped = dropped
            served = answer.get("model") if isinstance(answer, dict) else None
            return served if isinstance(served, str) else ""
        raise first or EndpointError("takes no question", field=self._endpoint.url)


def _body(ask: Ask) -> tuple[str, dict[str, Any]]:
    """Where the question goes, and how it is put."""
    if ask.text:
        return "completions", {"prompt": ask.text}
    messages = [
        {"role": role, "content": [{"type": "text", "text": content}] if ask.parts else content}
        for role, content in ask.messages
    ]
    more = {"chat_template_kwargs": dict(ask.template)} if ask.template else {}
    return "chat/completions", {"messages": messages, **more}


def read_answer(answer: Any) -> Said | str:
    """The words of the first choice with their probabilities; a word why there are none, whatever came."""
    try:
        choice = answer["choices"][0]
        text = choice["message"]["content"] if "message" in choice else choice["text"]
    except (KeyError, IndexError, TypeError):
        return "endpoint-shape"
    if not isinstance(text, str):
        return "endpoint-empty"
    pieces = _pieces(choice.get("logprobs"))
    return Said(text=text, pieces=pieces if "".join(piece for piece, _ in pieces) == text else ())


def _pieces(logprobs: Any) -> tuple[tuple[str, float], ...]:
    """Tokens with probabilities as either protocol tells them; none where it tells them otherwise."""
    try:
        if "content" in logprobs:
            found = [(one["token"], exp(min(one["logprob"], 0.0))) for one in logprobs["content"]]
        else:
            pairs = zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
            found = [(token, exp(min(value, 0.0))) for token, value in pairs]
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(found) if all(isinstance(token, str) for token, _ in found) else ()
