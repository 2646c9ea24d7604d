"""The reference's own words for a conversation: what a prompt is in token ids, and where a reply ends.

Needs the tokenizer and the generation config of the reference's folder and no weights, so that whoever serves the model
is sent exactly what the local model reads. An adapter's template or tokenizer is never looked at.
"""

import hashlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, final

from jinja2 import TemplateError
from transformers import AutoTokenizer, GenerationConfig

from repair.checks.backend import Sample
from repair.checks.errors import CheckError

_REMEMBERED: Final = 4096  # prompts; more than any suite has
_TURN_ENDS: Final = ("<|im_end|>", "<|eot_id|>", "<|end_of_text|>", "<|endoftext|>", "<end_of_turn>", "</s>")
_REFUSAL_OPENINGS: Final = (
    "I'm sorry, but",
    "I cannot",
    "I can't",
    "Sorry, but",
    "As an AI",
    "Unfortunately",
    "I am unable",
    "No, I",
)
_PROBE: Final = "Answer in one word."


def rendered(tokenizer: Any, prompt: str, *, system: str | None = None) -> str:
    """One user turn in the tokenizer's template, ready for the reply; under a system prompt where one is given."""
    before = [] if system is None else [{"role": "system", "content": system}]
    turns = [*before, {"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def why_no_system(tokenizer: Any) -> str | None:
    """Why no system prompt can be put by this template; None where one can."""
    try:
        text = rendered(tokenizer, "Hello", system=_PROBE)
    except TemplateError:
        return "the reference's chat template takes no system prompt"
    return None if _PROBE in text else "the reference's chat template leaves a system prompt out"


@final
class ChatTemplate:
    """A tokenizer with its chat template."""

    def __init__(self, tokenizer: Any, *, ends: Sequence[int] = ()) -> None:
        """``ends`` are the tokens that end a turn by the generation config."""
        if not getattr(tokenizer, "chat_template", None):
            raise CheckError("the reference has no chat template, so nothing can be asked of it")
        self.tokenizer = tokenizer
        self.stop: frozenset[int] = frozenset([*ends, *self._named_ends()])
        self.refusals: tuple[int, ...] = tuple(sorted({self.ids(text)[0] for text in _REFUSAL_OPENINGS}))
        self._ids_of = lru_cache(maxsize=_REMEMBERED)(self._tokenise)  # every arm is asked the same prompts

    @classmethod
    def load(cls, directory: Path) -> "ChatTemplate":
        """Read it from a model's folder; raises CheckError naming the folder."""
        try:
            tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError) as error:
            raise CheckError("the reference's tokenizer cannot be read", file=directory.name) from error
        return cls(tokenizer, ends=_configured_ends(directory))

    @property
    def digest(self) -> str:
        """Of the template's text."""
        return f"sha256:{hashlib.sha256(str(self.tokenizer.chat_template).encode()).hexdigest()}"

    def encode(self, prompt: str, *, system: str | None = None) -> list[int]:
        """Token ids of one user turn, ready for the reply."""
        return list(self._ids_of(prompt, system))

    def encode_sample(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Token ids of the question and of the answer with its end of turn."""
        opening = rendered(self.tokenizer, sample.prompt)
        turns = [{"role": "user", "content": sample.prompt}, {"role": "assistant", "content": sample.answer}]
        whole = str(self.tokenizer.apply_chat_template(turns, tokenize=False))
        rest = whole.removeprefix(opening) if whole.startswith(opening) else sample.answer
        return self.ids(opening), self.ids(rest.rstrip("\n"))

    def ids(self, text: str) -> list[int]:
        """Token ids of a text as it stands."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of a reply."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=False))

    def _tokenise(self, prompt: str, system: str | None) -> tuple[int, ...]:
        return tuple(self.ids(rendered(self.tokenizer, prompt, system=system)))

    def _named_ends(self) -> Iterator[int]:
        """By the tokenizer, or by a well-known name."""
        if self.tokenizer.eos_token_id is not None:
            yield int(self.tokenizer.eos_token_id)
        known = self.tokenizer.get_vocab()
        yield from (int(known[name]) for name in _TURN_ENDS if name in known)


def _configured_ends(directory: Path) -> list[int]:
    """By the generation config, which a folder may lack."""
    if not (directory / "generation_config.json").is_file():
        return []
    found = GenerationConfig.from_pretrained(directory, local_files_only=True).eos_token_id
    return list(found) if isinstance(found, list) else [] if found is None else [int(found)]
