"""A guard model in this process: its own tokenizer and chat template, greedy decoding, one answer for each question."""

from collections.abc import Sequence
from typing import Any, Final, final

import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from repair.checks.decode import greedy
from repair.checks.errors import JudgeUnusable
from repair.checks.guards.contract import Ask, Guard, Said
from repair.checks.guards.loading import load_folder
from repair.checks.judge import Exchange
from repair.checks.judge_settings import JudgeSettings
from repair.checks.scoring import Pair, answer_log_probs

_PLAIN: Final = Exchange(prompt="x", reply="x", harmful=True)  # whatever controls are in this are the template's


@final
class LocalAsker:
    """Model and tokenizer of one folder."""

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int = 8, identity: dict[str, str] | None = None
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.identity = identity or {}
        self.special: tuple[str, ...] = tuple(sorted(_special_strings(tokenizer)))
        self._batch_size = batch_size
        self._stop = frozenset(_stop_tokens(model, tokenizer))
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(self._stop), 0)
        unknown = tokenizer.unk_token_id
        known = tokenizer.get_vocab()
        self._special_ids = frozenset(known[one] for one in self.special if one in known) - {unknown}
        text = getattr(model.config, "text_config", None) or model.config
        self._longest: int = getattr(text, "max_position_embeddings", None) or 1 << 30

    @classmethod
    def load(cls, settings: JudgeSettings, guard: Guard) -> "LocalAsker":
        """Read the folder of the settings. Raises JudgeUnusable naming it."""
        found = load_folder(settings, AutoModelForImageTextToText if guard.multimodal else AutoModelForCausalLM)
        return cls(found.model, found.tokenizer, batch_size=settings.batch_size, identity=found.identity)

    def clip(self, text: str, tokens: int) -> str:
        """The first so many tokens; what looks like a control token is text here."""
        read = self.tokenizer(
            text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True, verbose=False
        )
        offsets = read["offset_mapping"]
        return text if len(offsets) <= tokens else text[: offsets[tokens - 1][1]]

    def say(self, asks: Sequence[Ask], guard: Guard) -> list[Said | str]:
        """Answers in order; a question that is too long, or that smuggles a control token, has none."""
        plain = [self._controls(self._tokens(ask)) for ask in guard.asks(_PLAIN)]
        ids = [self._encode(ask, guard, plain[at % len(plain)]) for at, ask in enumerate(asks)]
        found: list[Said | str] = [one if isinstance(one, str) else "" for one in ids]
        good = [(at, one) for at, one in enumerate(ids) if not isinstance(one, str)]
        for start in range(0, len(good), self._batch_size):
            chunk = good[start : start + self._batch_size]
            prompts = [one for _, one in chunk]
            said = self._weigh(prompts, guard) if guard.choices else self._generate(prompts, guard)
            for (at, _), answer in zip(chunk, said, strict=True):
                found[at] = answer
        return found

    def _encode(self, ask: Ask, guard: Guard, controls: int) -> list[int] | str:
        """Token ids, which hold as many control tokens as the template itself has."""
        ids = self._tokens(ask)
        if len(ids) + max(guard.max_new_tokens, 1) > self._longest:
            return "too-long"
        return ids if self._controls(ids) == controls else "control-tokens"

    def _tokens(self, ask: Ask) -> list[int]:
        text = ask.text or self._render(ask)
        begins = ask.begins and not ask.messages  # a chat template writes its own first token
        ids: list[int] = self.tokenizer(text, add_special_tokens=begins, verbose=False)["input_ids"]
        return ids

    def _render(self, ask: Ask) -> str:
        if not self.tokenizer.chat_template:
            raise JudgeUnusable("the tokenizer has no chat template", field="model")
        turns = [
            {"role": role, "content": [{"type": "text", "text": content}] if ask.parts else content}
            for role, content in ask.messages
        ]
        return str(
            self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=ask.opens_answer, **dict(ask.template)
            )
        )

    def _controls(self, ids: Sequence[int]) -> int:
        return sum(one in self._special_ids for one in ids)

    def _generate(self, prompts: list[list[int]], guard: Guard) -> list[Said]:
        """Greedy answers, and in a second pass how probable each of their tokens was."""
        decoded = greedy(self.model, prompts, max_new_tokens=guard.max_new_tokens, stop=self._stop, pad=self._pad)
        answers = [list(one.tokens) for one in decoded]
        pairs: list[Pair] = [(ids, answer) for ids, answer in zip(prompts, answers, strict=True) if answer]

        def chosen(at: int, log_probs: torch.Tensor) -> list[float]:
            tokens = torch.tensor(pairs[at][1], device=log_probs.device)
            return [float(one) for one in log_probs.gather(1, tokens[:, None])[:, 0].exp()]

        probabilities = iter(answer_log_probs(self.model, pairs, chosen, pad=self._pad))
        return [self._said(answer, next(probabilities)) if answer else Said() for answer in answers]

    def _said(self, answer: list[int], probabilities: list[float]) -> Said:
        """Words as the growing decoded text shows them: a token alone may be no whole character."""
        pieces, before = [], ""
        for at, probability in enumerate(probabilities, start=1):
            now = self.tokenizer.decode(answer[:at], skip_special_tokens=False)
            pieces.append((now[len(before) :] if now.startswith(before) else "", probability))
            before = now if now.startswith(before) else before
        return Said(text=self.tokenizer.decode(answer, skip_special_tokens=False), pieces=tuple(pieces))

    def _weigh(self, prompts: list[list[int]], guard: Guard) -> list[Said]:
        """The guard's choices against each other as the first token."""
        choices = [self.tokenizer.convert_tokens_to_ids(one) for one in guard.choices]
        if len(set(choices)) < len(choices) or None in choices or self.tokenizer.unk_token_id in choices:
            raise JudgeUnusable(f"its tokenizer has no tokens {', '.join(guard.choices)}", field="model")

        def weights(_at: int, log_probs: torch.Tensor) -> tuple[float, ...]:
            return tuple(float(one) for one in log_probs[0, choices].softmax(dim=-1))

        pairs: list[Pair] = [(ids, [self._pad]) for ids in prompts]
        return [Said(weights=one) for one in answer_log_probs(self.model, pairs, weights, pad=self._pad)]


def _special_strings(tokenizer: Any) -> set[str]:
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return {one for one in {*tokenizer.all_special_tokens, *added} if len(one) > 1}


def _stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    configured = getattr(model.generation_config, "eos_token_id", None)
    found = configured if isinstance(configured, list) else [] if configured is None else [configured]
    return [*found, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
