"""A chat model behind an OpenAI-compatible server, asked with token ids; adapters by vLLM's loading at run time.

The aligned arm is the served model under its own name. Prompts become token ids here, by the reference's tokenizer and
template, so that every engine sees the same input; losses and log-odds are read from the log-probabilities that the
server tells of a prompt's own tokens. What it cannot tell, `capabilities` says.
"""

import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Final, final

import numpy as np

from endpoints.adapters import ServedAdapters
from endpoints.client import Endpoint
from endpoints.completions import Asked, Completions, Said, complete, echoed
from endpoints.errors import EndpointError
from endpoints.probes import probe_adapters
from endpoints.selftest import Examiner
from repair.checks.backend import Anchor, Capabilities, Capability, Reply, Sample, Settled, known_arms
from repair.checks.backends import Served
from repair.checks.errors import ArmUnsupported
from repair.checks.frame import PLAIN, Frame
from repair.checks.template import ChatTemplate, why_no_system
from repair.lora import LoraAdapter

_TIMEOUT_S: Final = 600.0  # of one request: a batch of long replies on a busy server
_SCORED: Final = 8  # prompts in a request that wants log-probabilities of every token
_NEARLY_CERTAIN: Final = -1e-6  # as the local model: log-odds of a certainty are not infinite
_LOCAL: Final = {
    Capability.DRIFT: "a server tells log-probabilities of some tokens, not of its whole vocabulary",
    Capability.MODULES: "the modules of a served model cannot be listened to or trained",
}


@dataclass(frozen=True, kw_only=True)
class _Row:
    """One prompt for one model of the server; what is drawn has a seed of its own, and so a request of its own."""

    model: str
    ids: list[int]
    seed: int = 0


@final
class OpenAIBackend:
    """A served model; use `open_backend`, which tries it out before it is relied on."""

    def __init__(self, endpoint: Endpoint, template: ChatTemplate, served: Served, adapters: ServedAdapters) -> None:
        self.tokens = 0
        self._endpoint = endpoint
        self._template = template
        self._served = served
        self._adapters = adapters
        self._on: list[list[str]] = [[served.model]]
        self._card = _card_of(endpoint, served.model)
        why = why_no_system(template.tokenizer)
        self._missing = _LOCAL | ({} if why is None else {Capability.SYSTEM: why})

    def fingerprint(self) -> dict[str, str]:
        """What decides the numbers besides the weights; those are the server's word."""
        return {
            "backend": "openai",
            "server": str(self._card.get("owned_by", "unknown")),
            "version": _version_of(self._endpoint),
            "model": self._served.model,
            "template": self._template.digest,
        }

    def capabilities(self) -> Capabilities:
        """What the server was found not to do."""
        return Capabilities(missing=dict(self._missing))

    @contextmanager
    def arm(self, adapter: LoraAdapter | None) -> Iterator[None]:
        """Have the adapter on the server inside the block."""
        with self.arms([adapter]):
            yield

    @contextmanager
    def arms(self, adapters: Sequence[LoraAdapter | None]) -> Iterator[None]:
        """Have several adapters on the server inside the block."""
        why = self._missing.get(Capability.ADAPTERS)
        if why is not None and any(one is not None for one in adapters):
            raise EndpointError(why, field=self._endpoint.url)
        with ExitStack() as loaded:
            names = [
                self._served.model if one is None else loaded.enter_context(self._adapters.loaded(one))
                for one in adapters
            ]
            self._on.append(names)
            try:
                yield
            finally:
                self._on.pop()

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        batch_size: int = 32,
        arms: Sequence[int] | None = None,
        settled: Settled | None = None,  # noqa: ARG002 - a request that has been sent cannot be cut short
        frame: Frame = PLAIN,
    ) -> list[Reply]:
        """Replies, greedy unless framed otherwise; up to ``batch_size`` prompts of one arm travel in a request.

        Every one is finished. Draws are the server's: that a seed gives the same ones again is its word.
        """
        if frame.system is not None and (why := self._missing.get(Capability.SYSTEM)) is not None:
            raise EndpointError(why, field=self._endpoint.url)
        opening = self._template.ids(frame.opening) if frame.opening else []
        ids = [[*self._template.encode(prompt, system=frame.system), *opening] for prompt in prompts]
        stop, drawn = tuple(sorted(self._template.stop)), frame.sampling
        asked = Asked(model="", prompts=(), max_tokens=max_new_tokens, stop=stop, sampling=drawn)
        seeds = None if drawn is None else [drawn.seed_of(prompt) for prompt in prompts]
        found = self._ask(self._rows(ids, arms, seeds), asked, batch_size)
        return [self._reply(said, opening) for said in found]

    def loss(self, samples: Sequence[Sample], *, arms: Sequence[int] | None = None) -> list[float]:
        """Mean negative log-likelihood per answer token."""
        pairs = [self._template.encode_sample(sample) for sample in samples]
        scored = self._scored([question + answer for question, answer in pairs], arms)
        return [-fmean(found[len(question) :]) for (question, _), found in zip(pairs, scored, strict=True)]

    def margin(self, prompts: Sequence[str], *, arms: Sequence[int] | None = None) -> list[float]:
        """Log-odds that the reply opens with a refusal's first token: each of these is put after the prompt once."""
        first = self._template.refusals
        wanted = [[*self._template.encode(prompt), token] for prompt in prompts for token in first]
        each = None if arms is None else [arm for arm in arms for _ in first]
        log_probs = np.array([found[-1] for found in self._scored(wanted, each)]).reshape(len(prompts), len(first))
        refused = np.minimum(np.logaddexp.reduce(log_probs, axis=1), _NEARLY_CERTAIN)
        return [float(value) for value in refused - np.log1p(-np.exp(refused))]

    def anchor(self, prompts: Sequence[str]) -> Anchor:  # noqa: ARG002 - the interface
        """Raises EndpointError: see `capabilities`."""
        raise EndpointError(self._missing[Capability.DRIFT], field=self._endpoint.url)

    def drift(self, anchor: Anchor, *, arms: Sequence[int] | None = None) -> list[float]:  # noqa: ARG002 - as above
        """Raises EndpointError: see `capabilities`."""
        raise EndpointError(self._missing[Capability.DRIFT], field=self._endpoint.url)

    def try_out(self) -> None:
        """Find out what the server can; raises EndpointError when what it says cannot be relied on."""
        before = self.tokens
        examiner = Examiner(ask=self._ask_one, template=self._template, url=self._endpoint.url)
        if (why := examiner.cannot_score(self._served.model)) is not None:
            self._missing |= {Capability.LOSS: why, Capability.MARGIN: why, Capability.ADAPTERS: why}
        elif (why := self._adapters.refusal()) is not None:
            self._missing[Capability.ADAPTERS] = why
        else:
            try:
                why = examiner.examine(self._adapters, self._served.model, probe_adapters(self._served.reference))
            except ArmUnsupported as error:
                why = f"an ordinary adapter is not taken: {error.detail}"
            self._missing |= {} if why is None else {Capability.ADAPTERS: why}
        self.tokens = before  # paid once for a server, by no arm

    def _reply(self, said: Said, opening: list[int]) -> Reply:
        """Spelt here where the ids are told, so that no server's spelling decides an outcome."""
        if said.tokens is None:
            text = f"{self._template.decode(opening)} {said.text.lstrip()}" if opening else said.text
            return Reply(text=text, finish=said.finish, tokens=len(self._template.ids(text)))
        ended = said.finish == "stop" and said.tokens[-1:] != () and said.tokens[-1] in self._template.stop
        tokens = said.tokens[:-1] if ended else said.tokens
        whole = [*opening, *tokens]
        return Reply(text=self._template.decode(whole), finish=said.finish, tokens=len(whole))

    def _scored(self, sequences: Sequence[list[int]], arms: Sequence[int] | None) -> list[list[float]]:
        """Log-probability of each token of each sequence; the first one has none and counts as certain."""
        if (why := self._missing.get(Capability.LOSS)) is not None:
            raise EndpointError(why, field=self._endpoint.url)
        asked = Asked(model="", prompts=(), max_tokens=1, echo=True, top=1)
        rows = self._rows(sequences, arms)
        said = self._ask(rows, asked, _SCORED)
        return [echoed(one, len(row.ids), self._endpoint.url) for one, row in zip(said, rows, strict=True)]

    def _rows(
        self, sequences: Sequence[list[int]], arms: Sequence[int] | None, seeds: Sequence[int] | None = None
    ) -> list[_Row]:
        names = self._on[-1]
        if arms is None and len(names) > 1:
            raise ValueError("several adapters are at hand: say which one is asked")
        own = known_arms([0] * len(sequences) if arms is None else arms, len(names))
        lots = [0] * len(sequences) if seeds is None else seeds
        return [_Row(model=names[arm], ids=ids, seed=lot) for arm, ids, lot in zip(own, sequences, lots, strict=True)]

    def _ask(self, rows: Sequence[_Row], like: Asked, size: int) -> list[Said]:
        """Every row, a few requests at once; the results stand in the order of the rows."""
        if size < 1:
            raise ValueError(size)
        alike: dict[tuple[str, int], list[int]] = {}
        for at, row in enumerate(rows):
            alike.setdefault((row.model, row.seed), []).append(at)
        chunks = [mine[start : start + size] for mine in alike.values() for start in range(0, len(mine), size)]
        asked = [
            replace(
                like,
                model=rows[chunk[0]].model,
                seed=rows[chunk[0]].seed,
                prompts=tuple(rows[at].ids for at in chunk),
            )
            for chunk in chunks
        ]
        found: dict[int, Said] = {}
        with ThreadPoolExecutor(self._served.requests) as pool:
            try:
                for chunk, answer in zip(chunks, pool.map(self._complete, asked), strict=True):
                    found.update(zip(chunk, answer.said, strict=True))
                    self.tokens += answer.tokens
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [found[at] for at in range(len(rows))]

    def _complete(self, asked: Asked) -> Completions:
        return complete(self._endpoint, asked)

    def _ask_one(self, asked: Asked) -> tuple[Said, ...]:
        return self._complete(asked).said


@contextmanager
def open_backend(served: Served) -> Iterator[OpenAIBackend]:
    """The served model, tried out; raises EndpointError when there is none or it cannot be relied on."""
    template = ChatTemplate.load(served.reference)
    with ExitStack() as stack:
        endpoint = Endpoint(served.url, key=served.key, timeout_s=_TIMEOUT_S)
        stack.callback(endpoint.close)
        folder = served.adapters
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lora-repair-served-")))
        backend = OpenAIBackend(endpoint, template, served, ServedAdapters(endpoint, folder, served.files))
        backend.try_out()
        yield backend


def _card_of(endpoint: Endpoint, model: str) -> dict[str, Any]:
    """What the server says of the model; raises EndpointError naming the models that it has."""
    found = endpoint.get("models")
    cards = found.get("data") if isinstance(found, dict) else None
    if not isinstance(cards, list) or not all(isinstance(card, dict) for card in cards):
        raise EndpointError("GET models is not answered by a list of models", field=endpoint.url)
    mine: dict[str, Any] | None = next((card for card in cards if card.get("id") == model), None)
    if mine is None:
        there = ", ".join(str(card.get("id"))[:80] for card in cards[:10]) or "none"
        raise EndpointError(f"no model is served as {model}; there are: {there}", field=endpoint.url)
    return mine


def _version_of(endpoint: Endpoint) -> str:
    """The server's version where it tells one, as vLLM does."""
    try:
        found = endpoint.root("version")
    except EndpointError as error:
        if error.status is None:
            raise
        return "unknown"
    return str(found.get("version", "unknown"))[:80] if isinstance(found, dict) else "unknown"
