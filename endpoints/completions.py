"""One call of the completions protocol: token ids in, one choice for each prompt out, believed only when it is whole.

Everything about decoding is said in the request, because servers fill in what is left out (vLLM takes penalties from
the model's generation config). No text of a prompt or a reply reaches an error.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final

from pydantic import BaseModel, Field, ValidationError

from endpoints.client import Endpoint
from endpoints.errors import EndpointError
from repair.checks.frame import Sampling

ENDS: Final = frozenset({"stop", "length"})
_LARGEST_TOKEN: Final = 1 << 31
_GREEDY: Final[Mapping[str, Any]] = {
    "temperature": 0.0,
    "seed": 0,
    "n": 1,
    "stream": False,
    "top_p": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    # Not of the protocol; vLLM and SGLang know them, others pass over them.
    "repetition_penalty": 1.0,
    "skip_special_tokens": False,
    "return_token_ids": True,
}

_Token = Annotated[int, Field(ge=0, lt=_LARGEST_TOKEN)]


class _LogProbs(BaseModel):
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None] | None = None


class _Choice(BaseModel):
    index: int
    text: str
    finish_reason: str | None = None
    logprobs: _LogProbs | None = None
    token_ids: list[_Token] | None = None


class _Usage(BaseModel):
    prompt_tokens: int = Field(ge=0)
    completion_tokens: int = Field(default=0, ge=0)


class _Completion(BaseModel):
    model: str = ""
    choices: list[_Choice]
    usage: _Usage | None = None


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is put to one model of the server in one request.

    Attributes:
        model: Its name there.
        prompts: Token ids of each prompt.
        max_tokens: Of each reply.
        stop: Tokens that end a reply besides the model's own.
        echo: Tell the log-probability of every token of the prompt.
        top: Tell this many of the likeliest tokens at each place; None for no log-probabilities.
        sampling: Temperature and nucleus to draw from; None for the likeliest tokens.
        seed: Of the draws.
    """

    model: str
    prompts: Sequence[Sequence[int]]
    max_tokens: int
    stop: Sequence[int] = ()
    echo: bool = False
    top: int | None = None
    sampling: Sampling | None = None
    seed: int = 0

    def body(self) -> dict[str, Any]:
        """As the protocol has it."""
        found = {
            **_GREEDY,
            "model": self.model,
            "prompt": [list(ids) for ids in self.prompts],
            "max_tokens": self.max_tokens,
            "stop_token_ids": list(self.stop),
        }
        if self.sampling is not None:
            drawn = {"temperature": self.sampling.temperature, "top_p": self.sampling.top_p, "seed": self.seed}
            found |= drawn
        return found | ({"echo": True} if self.echo else {}) | ({} if self.top is None else {"logprobs": self.top})


@dataclass(frozen=True, kw_only=True)
class Said:
    """One choice.

    Attributes:
        text: As the server spells it.
        finish: "stop" or "length".
        tokens: The reply's ids, its end among them; None where the server does not tell.
        log_probs: Of each token, those of the prompt first where it was echoed; empty where none were asked.
        top: The likeliest tokens at each place, spelt by the server.
    """

    text: str
    finish: str
    tokens: tuple[int, ...] | None
    log_probs: tuple[float | None, ...]
    top: tuple[Mapping[str, float], ...]


@dataclass(frozen=True, kw_only=True)
class Completions:
    """The choices in the order of the prompts, and what they cost in positions."""

    said: tuple[Said, ...]
    tokens: int


def complete(endpoint: Endpoint, asked: Asked) -> Completions:
    """Put it to the server; raises EndpointError for an answer that is not whole or not of the model that was asked."""
    answer = _read(endpoint.post("completions", asked.body()), endpoint.url)
    if answer.model and answer.model != asked.model:
        raise EndpointError(f"{asked.model} was asked and another model answered", field=endpoint.url)
    choices = sorted(answer.choices, key=lambda choice: choice.index)
    if [choice.index for choice in choices] != list(range(len(asked.prompts))):
        detail = f"{len(asked.prompts)} prompts were answered by {len(choices)} choices, or not one by one"
        raise EndpointError(detail, field=endpoint.url)
    said = tuple(_said(choice, asked, endpoint.url) for choice in choices)
    return Completions(said=said, tokens=_cost(answer, asked))


def echoed(said: Said, length: int, url: str) -> list[float]:
    """Log-probabilities of the ``length`` tokens of a prompt; the first has none and counts as certain.

    Raises EndpointError when the server has read more or fewer tokens than it was sent, or left one out.
    """
    # One token more is generated, because not every server takes it that none is wanted.
    if len(said.log_probs) not in {length, length + 1}:
        detail = f"a prompt of {length} tokens was scored as {len(said.log_probs)}"
        raise EndpointError(detail, field=url)
    found = [0.0, *(one for one in said.log_probs[1:length] if one is not None)]
    if len(found) != length:
        raise EndpointError("a token of a prompt has no log-probability", field=url)
    return found


def _read(document: Any, url: str) -> _Completion:
    try:
        return _Completion.model_validate(document)
    except ValidationError as error:
        # The values are replies: only their places are told.
        where = ".".join(str(part) for part in error.errors(include_input=False)[0]["loc"])
        raise EndpointError(f"the answer is no completion: {where or 'it is no object'}", field=url) from None


def _said(choice: _Choice, asked: Asked, url: str) -> Said:
    if choice.finish_reason not in ENDS:
        raise EndpointError(f"a reply ended with {json.dumps(choice.finish_reason)[:40]}", field=url)
    found = choice.logprobs
    if (asked.echo or asked.top is not None) and found is None:
        raise EndpointError("log-probabilities were asked and none came", field=url)
    return Said(
        text=choice.text,
        finish=choice.finish_reason,
        tokens=None if choice.token_ids is None else tuple(choice.token_ids),
        log_probs=() if found is None else tuple(found.token_logprobs),
        top=() if found is None else tuple(one or {} for one in found.top_logprobs or ()),
    )


def _cost(answer: _Completion, asked: Asked) -> int:
    """As the server counts, else the prompts and what is known of the replies."""
    if answer.usage is not None:
        return answer.usage.prompt_tokens + answer.usage.completion_tokens
    return sum(map(len, asked.prompts)) + sum(len(choice.token_ids or ()) for choice in answer.choices)
