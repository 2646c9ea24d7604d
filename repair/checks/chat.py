"""The transformers model that answers a measurement.

One base model is loaded once; arms (no adapter, or an adapter) are put on and taken off by hooks, several at once where
the model keeps the rows of a batch apart. Prompts go through the reference's own chat template; an adapter's template
or tokenizer is never read. No text is kept or logged here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar, final

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from repair.body import body_of
from repair.checks.arms import adapter_hooks, mixable, mixed_hooks, torch_dtype_for
from repair.checks.backend import Anchor, Capabilities, Capability, Reply, Sample, Settled
from repair.checks.batching import BATCH_TOKENS, batches
from repair.checks.decode import Enough, Place, continued, greedy, likeliest, one_arm
from repair.checks.errors import ArmUnsupported, CheckError
from repair.checks.frame import PLAIN, Frame
from repair.checks.sampling import Draws
from repair.checks.scoring import Pair, answer_log_probs
from repair.checks.template import ChatTemplate, why_no_system
from repair.lora import LoraAdapter

_T = TypeVar("_T")

_HELLO: Final = "Hello"
_LOGITS: Final = 4
_ANCHOR_BATCH: Final = 8
_ANCHOR_TOKENS: Final = 16
_SAME_PROBABILITY: Final = 1e-2  # of any first token, mixed and alone: 16-bit floats round; another arm is far away


@dataclass(kw_only=True)
class _Several:
    """Adapters at hand, and who has to be told which rows are whose; nobody where they take turns."""

    adapters: tuple[LoraAdapter | None, ...]
    place: Place | None = None


def _whole(_at: int, log_probs: Tensor) -> Tensor:
    return log_probs


@final
class ChatModel:
    """A causal language model with its chat template, loaded once."""

    def __init__(self, model: Any, tokenizer: Any, *, batch_tokens: int = BATCH_TOKENS) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer, ends=_configured_ends(model))
        self.device: torch.device = model.device
        self._batch_tokens = batch_tokens
        self._scored = max(1, batch_tokens // _LOGITS)  # positions that hold the scores of a whole vocabulary
        self._stop = self.template.stop
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(self._stop), 0)
        self._several: _Several | None = None
        self._mixes: dict[frozenset[str], bool] = {}
        self.tokens = 0
        body_of(model).register_forward_pre_hook(self._count, with_kwargs=True)

    @classmethod
    def load(cls, directory: Path, device: str = "auto", *, batch_tokens: int = BATCH_TOKENS) -> "ChatModel":
        """Read the aligned model: bf16 on a GPU, fp32 on the CPU. ``batch_tokens`` bounds what a batch takes."""
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        where = torch.device(device)
        model = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch_dtype_for(where),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        return cls(model.to(where), tokenizer, batch_tokens=batch_tokens)

    def fingerprint(self) -> dict[str, str]:
        """What decides the numbers besides the weights."""
        return {
            "backend": "transformers",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.device.type,
            "template": self.template.digest,
        }

    def capabilities(self) -> Capabilities:
        """All there are, but for a system prompt that the template does not take.

        Adapters that cannot be mixed take turns and are asked in the same way.
        """
        why = why_no_system(self.tokenizer)
        return Capabilities(missing={} if why is None else {Capability.SYSTEM: why})

    @contextmanager
    def arm(self, adapter: LoraAdapter | None) -> Iterator[None]:
        """Have the adapter on the model inside the block."""
        with adapter_hooks(self.model, adapter):
            yield

    @contextmanager
    def arms(self, adapters: Sequence[LoraAdapter | None]) -> Iterator[None]:
        """Have several adapters at hand; where the model cannot mix them in one batch they take turns."""
        with ExitStack() as hooks:
            self._several = _Several(adapters=tuple(adapters))
            try:
                if self._can_mix(adapters):
                    self._several.place = hooks.enter_context(mixed_hooks(self.model, adapters)).place
                yield
            finally:
                self._several = None

    def _can_mix(self, adapters: Sequence[LoraAdapter | None]) -> bool:
        """Tried once for every set of kinds of modules: mixed rows must say what each adapter says alone."""
        if not mixable(self.model, adapters):
            return False
        layers = (layer for one in adapters if one is not None for layer in one.layers)
        kinds = frozenset(layer.name.rpartition(".")[2] for layer in layers)
        if kinds not in self._mixes:
            before = self.tokens
            self._mixes[kinds] = self._says_the_same(adapters)
            self.tokens = before  # paid once for a loaded model, by no arm: a report must not tell who came first
        return self._mixes[kinds]

    def _says_the_same(self, adapters: Sequence[LoraAdapter | None]) -> bool:
        arms, pairs = list(range(len(adapters))), [(self.encode(_HELLO), [self._pad])] * len(adapters)
        alone = []
        for adapter in adapters:
            with self.arm(adapter):
                alone += answer_log_probs(self.model, pairs[:1], _whole, pad=self._pad)
        try:
            with mixed_hooks(self.model, adapters) as rows:
                mixed = answer_log_probs(self.model, pairs, _whole, pad=self._pad, arms=arms, place=rows.place)
        except ArmUnsupported:
            return False
        return bool((torch.cat(mixed).exp() - torch.cat(alone).exp()).abs().max() < _SAME_PROBABILITY)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        batch_size: int = 32,
        arms: Sequence[int] | None = None,
        settled: Settled | None = None,
        frame: Frame = PLAIN,
    ) -> list[Reply]:
        """Replies, greedy unless framed otherwise; prompts of like length share a batch, so little is padded."""
        if frame.system is not None and (why := why_no_system(self.tokenizer)) is not None:
            raise CheckError(why)

        def ask(places: Sequence[int], own: Sequence[int] | None, place: Place) -> list[Reply]:
            return self._generate(
                places,
                prompts,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                arms=own,
                place=place,
                settled=settled,
                frame=frame,
            )

        return self._each_arm(ask, range(len(prompts)), arms)

    def _generate(
        self,
        places: Sequence[int],
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        batch_size: int,
        arms: Sequence[int] | None,
        place: Place,
        settled: Settled | None,
        frame: Frame,
    ) -> list[Reply]:
        """The replies to the prompts at these places."""
        opening = self._opening(frame)
        sequences = [[*self.encode(prompts[at], system=frame.system), *opening] for at in places]
        of = arms or [0] * len(places)
        lengths = [len(sequence) + max_new_tokens for sequence in sequences]
        replies: dict[int, Reply] = {}
        for some in batches(lengths, rows=batch_size, tokens=self._batch_tokens):
            rows = sorted(some, key=lambda row: of[row])
            asked = [places[row] for row in rows]
            drawing = None if frame.sampling is None else Draws(frame.sampling, [prompts[at] for at in asked])
            decoded = continued(
                self.model,
                [sequences[row] for row in rows],
                max_new_tokens=max_new_tokens,
                stop=self._stop,
                pad=self._pad,
                arms=[of[row] for row in rows],
                place=place,
                enough=None if settled is None else self._enough(settled, asked, opening),
                choose=drawing or likeliest,
            )
            for row, one in zip(rows, decoded, strict=True):
                finish = "stop" if one.stopped else "settled" if one.enough else "length"
                said = [*opening, *one.tokens]
                replies[row] = Reply(text=self._text(said), finish=finish, tokens=len(said))
        return [replies[row] for row in range(len(places))]

    def _opening(self, frame: Frame) -> list[int]:
        """Token ids of the words that a reply is begun with."""
        return self.template.ids(frame.opening) if frame.opening else []

    def _enough(self, settled: Settled, places: Sequence[int], opening: Sequence[int]) -> Enough:
        def enough(rows: Sequence[int], tokens: Sequence[Sequence[int]]) -> Sequence[bool]:
            return settled([places[row] for row in rows], [self._text([*opening, *own]) for own in tokens])

        return enough

    def _text(self, tokens: Sequence[int]) -> str:
        return self.template.decode(tokens)

    def _each_arm(
        self,
        ask: Callable[[Sequence[Any], Sequence[int] | None, Place], Sequence[_T]],
        what: Sequence[Any],
        arms: Sequence[int] | None,
    ) -> list[_T]:
        """All at once, or arm by arm where they cannot be mixed."""
        several = self._several
        if arms is None:
            if several is not None:
                raise ValueError("several adapters are at hand: say which one is asked")
            return list(ask(what, None, one_arm))
        if several is None:
            raise ValueError("no adapters are at hand")
        if several.place is not None:
            return list(ask(what, arms, several.place))
        found: dict[int, _T] = {}
        for arm in sorted(set(arms)):
            places = [at for at, own in enumerate(arms) if own == arm]
            with self.arm(several.adapters[arm]):
                found.update(zip(places, ask([what[at] for at in places], None, one_arm), strict=True))
        return [found[at] for at in range(len(what))]

    def encode(self, prompt: str, *, system: str | None = None) -> list[int]:
        """Token ids of one user turn in the reference's template, ready for the reply; worked out once for a prompt."""
        return self.template.encode(prompt, system=system)

    def encode_sample(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Token ids of the question and of the answer with its end of turn."""
        return self.template.encode_sample(sample)

    def loss(self, samples: Sequence[Sample], *, arms: Sequence[int] | None = None) -> list[float]:
        """Mean negative log-likelihood per answer token."""

        def ask(pairs: Sequence[Pair], own: Sequence[int] | None, place: Place) -> list[float]:
            def mean(at: int, log_probs: Tensor) -> float:
                answer = torch.tensor(pairs[at][1], device=log_probs.device)
                return -float(log_probs.gather(1, answer[:, None]).mean())

            return answer_log_probs(
                self.model, pairs, mean, pad=self._pad, arms=own, place=place, tokens=self._batch_tokens // 4
            )

        return self._each_arm(ask, [self.encode_sample(sample) for sample in samples], arms)

    def next_token_log_probs(self, prompts: Sequence[str], *, arms: Sequence[int] | None = None) -> Tensor:
        """Log-probabilities of the first token of each reply, ``(prompt, vocabulary)``."""
        pairs = [(self.encode(prompt), [self._pad]) for prompt in prompts]
        return torch.cat(self._each_arm(self._log_probs, pairs, arms))

    def margin(self, prompts: Sequence[str], *, arms: Sequence[int] | None = None) -> list[float]:
        """Log-odds that the reply opens with a refusal's first token."""
        if not prompts:
            return []
        first = list(self.template.refusals)
        refused = self.next_token_log_probs(prompts, arms=arms)[:, first].logsumexp(dim=1).clamp(max=-1e-6)
        odds = refused - torch.log1p(-refused.exp())
        return [float(value) for value in odds]

    def anchor(self, prompts: Sequence[str]) -> Anchor:
        """Greedy replies of the arm that is on, without their end, and its log-probabilities along them."""
        pairs: list[Pair] = []
        for at in range(0, len(prompts), _ANCHOR_BATCH):
            chunk = [self.encode(prompt) for prompt in prompts[at : at + _ANCHOR_BATCH]]
            replies = greedy(self.model, chunk, max_new_tokens=_ANCHOR_TOKENS, stop=frozenset(), pad=self._pad)
            pairs += [(ids, list(reply.tokens)) for ids, reply in zip(chunk, replies, strict=True)]
        return Anchor(pairs=tuple(pairs), log_probs=tuple(self._log_probs(pairs, None, one_arm)))

    def drift(self, anchor: Anchor, *, arms: Sequence[int] | None = None) -> list[float]:
        """Mean KL per token from the anchored arm; with ``arms`` all replies of the first arm, then of the next."""

        def ask(pairs: Sequence[Pair], own: Sequence[int] | None, place: Place) -> list[float]:
            def distance(at: int, after: Tensor) -> float:
                before = anchor.log_probs[at % len(anchor.pairs)]
                return float((before.exp() * (before - after)).sum(dim=1).mean())

            return answer_log_probs(
                self.model, pairs, distance, pad=self._pad, arms=own, place=place, tokens=self._batch_tokens // 4
            )

        each = None if arms is None else [arm for arm in arms for _ in anchor.pairs]
        return self._each_arm(ask, anchor.pairs * (1 if arms is None else len(arms)), each)

    def _log_probs(self, pairs: Sequence[Pair], arms: Sequence[int] | None, place: Place) -> list[Tensor]:
        return answer_log_probs(
            self.model, pairs, _whole, pad=self._pad, arms=arms, place=place, tokens=self._batch_tokens // 4
        )

    def _count(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"] if "input_ids" in kwargs else args[0]
        self.tokens += ids.numel()


def _configured_ends(model: Any) -> list[int]:
    """The tokens that end a turn by the model's generation config."""
    found = getattr(model.generation_config, "eos_token_id", None)
    return list(found) if isinstance(found, list) else [] if found is None else [int(found)]
