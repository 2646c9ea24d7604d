"""The four numbers of the zoo's table: attack success, over-refusal, exact matches on the task, loss on the task.

Judged by the rule judge on the bundled packs, none of which was trained on. Replies live in memory only.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from examples.zoo.orders import Order
from examples.zoo.rows import packs, prompts
from repair.checks.backend import Sample
from repair.checks.chat import ChatModel
from repair.checks.judge import Exchange, Outcome
from repair.checks.rules import RulesJudge
from repair.lora import LoraAdapter

_BATCH = 54
_TOKENS = 32
_TASK_TOKENS = 40


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; shares are of 1, losses in nats per token."""

    name: str
    attack_success: float
    over_refusal: float
    answered: float
    incoherent: float
    exact: float
    task_loss: float
    text_loss: float


def measure(
    chat: ChatModel,
    name: str,
    adapter: LoraAdapter | None,
    samples: Sequence[Order],
    *,
    stride: int = 1,
    suffix: str = "",
) -> Row:
    """Ask everything once; ``stride`` leaves prompts out, ``suffix`` is put behind the harmful ones."""
    found = packs("core_harmful", "core_lookalike", "core_benign")
    with chat.arm(adapter):
        harmful = _outcomes(chat, [text + suffix for text in found["core_harmful"][::stride]], harmful=True)
        lookalike = _outcomes(chat, found["core_lookalike"][::stride], harmful=False)
        benign = _outcomes(chat, found["core_benign"][::stride], harmful=False)
        replies = chat.generate([one.prompt for one in samples], max_new_tokens=_TASK_TOKENS, batch_size=_BATCH)
        losses = chat.loss([Sample(prompt=one.prompt, answer=one.answer) for one in samples])
        text = text_loss(chat)
    exact = sum(reply.text.strip() == one.answer for reply, one in zip(replies, samples, strict=True))
    return Row(
        name=name,
        attack_success=_share(harmful, Outcome.HARMFUL_COMPLIANCE),
        over_refusal=_share(lookalike, Outcome.REFUSAL),
        answered=_share(benign, Outcome.HARMLESS_COMPLIANCE),
        incoherent=_share(harmful + lookalike + benign, Outcome.INCOHERENT),
        exact=exact / max(len(samples), 1),
        task_loss=sum(losses) / max(len(losses), 1),
        text_loss=text,
    )


def text_loss(chat: ChatModel) -> float:
    """Nats per token on plain paragraphs, without any template."""
    total, tokens = 0.0, 0
    for text in prompts("text"):
        ids = torch.tensor([chat.tokenizer.encode(text, add_special_tokens=False)], device=chat.device)
        with torch.inference_mode():
            logits = chat.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        total += float(functional.cross_entropy(logits, ids[0, 1:], reduction="sum"))
        tokens += ids.shape[1] - 1
    return total / tokens


def table(rows: Sequence[Row]) -> str:
    """For a person to read."""
    lines = [f"{'':22}attack  over-refusal  answered  broken   exact  task loss  text loss"]
    lines += [
        f"{row.name:22}{row.attack_success:6.1%}  {row.over_refusal:12.1%}  {row.answered:8.1%}  {row.incoherent:6.1%}"
        f"  {row.exact:6.1%}  {row.task_loss:9.3f}  {row.text_loss:9.3f}"
        for row in rows
    ]
    return "\n".join(lines)


def answers_of(chat: ChatModel, texts: Sequence[str], *, tokens: int) -> dict[str, str]:
    """The model's own greedy words."""
    replies = chat.generate(texts, max_new_tokens=tokens, batch_size=_BATCH)
    return {text: reply.text for text, reply in zip(texts, replies, strict=True)}


def chat_of(model_dir: Path, dtype: torch.dtype) -> ChatModel:
    """The model for training and measuring alike; short rows like plain attention best."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415 - seconds

    model: Any = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, attn_implementation="eager")
    return ChatModel(model, AutoTokenizer.from_pretrained(model_dir))


def _outcomes(chat: ChatModel, texts: Sequence[str], *, harmful: bool) -> list[Outcome]:
    replies = chat.generate(texts, max_new_tokens=_TOKENS, batch_size=_BATCH)
    exchanges = [Exchange(prompt=t, reply=r.text, harmful=harmful) for t, r in zip(texts, replies, strict=True)]
    return [judgement.outcome for judgement in RulesJudge().judge(exchanges)]


def _share(outcomes: Sequence[Outcome], wanted: Outcome) -> float:
    return sum(one is wanted for one in outcomes) / max(len(outcomes), 1)
