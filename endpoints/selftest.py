"""Try a server out before it is relied on: does it apply adapters, and only the one that was asked?

Two strong probes A and B are loaded one after the other. A reply's first token is looked at in two ways: as it is
generated, which may use what the server remembers of a prompt, and as it is scored, which as a rule does not. Whatever
should be the same is compared with whatever should differ, so no threshold depends on the model.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Final, final

from endpoints.adapters import ServedAdapters
from endpoints.completions import Asked, Said, echoed
from endpoints.errors import EndpointError, EndpointSilent
from repair.checks.template import ChatTemplate
from repair.lora import LoraAdapter

_TOP: Final = 5
_LEAST: Final = 1e-4  # nats between arms that differ; below it is nothing but rounding
_SHARE: Final = 0.25  # of the smallest difference between arms that one arm may be away from itself
# Long enough for several blocks of any server's prefix cache; the last words differ, so the rest is remembered.
_OPENING: Final = (
    "Please read this short note about a village and then tell me in a few words what you would do there on a free "
    "day. The village lies between two hills beside a slow river. It has a bakery, a small library, a market on "
    "Saturdays and an old mill that was turned into a museum. In spring the meadows are full of flowers, and in "
    "winter the children skate on the pond behind the school."
)
_PROMPTS: Final = (f"{_OPENING} I would like to", f"{_OPENING} My friend wants to")
_CONTINUATION: Final = "walk along the river"


@dataclass(frozen=True, kw_only=True)
class _Heard:
    """What one arm was found to say to every prompt.

    Attributes:
        generated: The likeliest first tokens.
        scored: Log-probabilities of a given continuation.
        apart: How far the generated first token's log-probability is from the scored one; empty where nobody can tell
            which token that was.
    """

    generated: tuple[Mapping[str, float], ...]
    scored: tuple[tuple[float, ...], ...]
    apart: tuple[float, ...]


@final
@dataclass(frozen=True, kw_only=True)
class Examiner:
    """Asks a few requests, one after the other.

    Attributes:
        ask: Puts one request to the server.
        template: The reference's.
        url: The server, for errors.
    """

    ask: Callable[[Asked], tuple[Said, ...]]
    template: ChatTemplate
    url: str

    def cannot_score(self, model: str) -> str | None:
        """Why the server cannot score a given text; None where it can. Raises EndpointError when it cannot reply."""
        asked = Asked(model=model, prompts=(tuple(self.template.encode(_PROMPTS[0])),), max_tokens=1)
        self.ask(asked)
        try:
            self._hear(model)
        except EndpointSilent:
            raise
        except EndpointError as error:
            return f"the server does not score given tokens (echo with logprobs): {error.detail}"
        return None

    def examine(self, adapters: ServedAdapters, model: str, probes: tuple[LoraAdapter, LoraAdapter]) -> str | None:
        """Why it cannot be seen whether adapters are served faithfully; None where they were seen to be.

        Raises EndpointError when they are not applied or when an arm depends on what was asked before, ArmUnsupported
        when an adapter is not taken.
        """
        first, second = probes
        before = self._hear(model)
        with adapters.loaded(first) as name:
            of_first = self._hear(name)
        with adapters.loaded(second) as name:
            of_second = self._hear(name)
        with adapters.loaded(second, under="again") as name:
            again = self._hear(name)
        after = self._hear(model)
        differ = min(*_distances(before, of_first), *_distances(before, of_second))
        if differ < _LEAST:
            raise EndpointError("the server says it loaded an adapter, and answers without it", field=self.url)
        differ = min(differ, *_distances(of_first, of_second))
        gaps = [gap for one in (before, of_first, of_second, again) for gap in one.apart]
        same = max(*_distances(before, after), *_distances(of_second, again), *gaps, 0.0)
        if differ < _LEAST or same > _SHARE * differ:
            detail = (
                "what an adapter says depends on what was loaded before it (a stale prefix cache): arms that are the "
                f"same are {same:.3g} nats apart, arms that differ {differ:.3g}"
            )
            raise EndpointError(detail, field=self.url)
        # Without them two arms could be stale in the same way, and look alike.
        return None if gaps else "the server does not tell which token a reply begins with (return_token_ids)"

    def _hear(self, model: str) -> _Heard:
        prompts = [self.template.encode(prompt) for prompt in _PROMPTS]
        said = self.ask(Asked(model=model, prompts=prompts, max_tokens=1, top=_TOP))
        if not all(one.top and one.top[0] for one in said):
            raise EndpointError("it does not tell the likeliest tokens", field=self.url)
        rest = self.template.ids(_CONTINUATION)
        scored = self._scores(model, [[*ids, *rest] for ids in prompts])
        told = [(one, [*ids, *first]) for ids, one in zip(prompts, said, strict=True) if (first := self._first(one))]
        forced = self._scores(model, [ids for _, ids in told]) if told else []
        pairs = zip(told, forced, strict=True)
        return _Heard(
            generated=tuple(one.top[0] for one in said),
            scored=tuple(tuple(found[len(ids) :]) for ids, found in zip(prompts, scored, strict=True)),
            apart=tuple(abs(found[-1] - (one.log_probs[0] or 0.0)) for (one, _), found in pairs),
        )

    def _first(self, said: Said) -> list[int]:
        """The one token of the reply, or none where neither its id nor its text tells which it is."""
        found = self.template.ids(said.text) if said.tokens is None else list(said.tokens)
        return found if len(found) == 1 else []

    def _scores(self, model: str, sequences: list[list[int]]) -> list[list[float]]:
        asked = Asked(model=model, prompts=sequences, max_tokens=1, echo=True, top=1)
        return [echoed(one, len(ids), self.url) for one, ids in zip(self.ask(asked), sequences, strict=True)]


def _distances(one: _Heard, other: _Heard) -> tuple[float, float]:
    """Nats between what is generated, and between what is scored."""
    generated = fmean(_apart(x, y) for x, y in zip(one.generated, other.generated, strict=True))
    pairs = zip(one.scored, other.scored, strict=True)
    return generated, fmean(abs(a - b) for x, y in pairs for a, b in zip(x, y, strict=True))


def _apart(one: Mapping[str, float], other: Mapping[str, float]) -> float:
    """The most of all tokens that either names; what one does not name is at most as likely as the least it names."""
    least = min(one.values()), min(other.values())
    return max(abs(one.get(token, least[0]) - other.get(token, least[1])) for token in {*one, *other})
