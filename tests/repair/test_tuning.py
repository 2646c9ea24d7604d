"""The training loop: what it may touch, what it learns, what it holds on to."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from repair import tuning_rows
from repair.checks.chat import ChatModel
from repair.errors import BadParameters, MissingWeight
from repair.tuning import Cancelled, Example, TuneSettings, tune_lora
from tests import tiny

WORDS = [
    "tell",
    "me",
    "about",
    "the",
    "sea",
    "cat",
    "dog",
    "moon",
    "bomb",
    "no",
    "yes",
    "it",
    "is",
    "blue",
    "big",
    "small",
    "never",
    "help",
    "with",
    "that",
]
SMALL = TuneSettings(
    rank=4, alpha=8.0, targets=("up_proj", "down_proj", "o_proj"), steps=40, batch_size=5, learning_rate=2e-2
)
REFUSE = [Example(prompt=f"tell me about the {what}", answer="no never", group="refuse") for what in ("bomb", "dog")]
KEEP = [
    Example(prompt=f"tell me about the {what}", answer="it is big", finished=False, keep=True, group="keep")
    for what in ("sea", "moon", "cat")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("chat") / "model", words=WORDS)


@pytest.fixture
def chat(folder: Path) -> ChatModel:
    chat = ChatModel.load(folder, "cpu")
    with torch.no_grad():
        chat.model.lm_head.weight *= 20  # a fresh head is so small that no hidden state could make any token likely
    return chat


def answer_loss(chat: ChatModel, example: Example) -> float:
    """Mean loss per answer token by the plain definition: the whole row, no shared opening, no padding."""
    row = tuning_rows.encode(chat.tokenizer, example, 96)
    ids = torch.tensor([row.tokens])
    with torch.no_grad():
        logits = chat.model(input_ids=ids).logits[0]
    first = len(row.question)
    return float(functional.cross_entropy(logits[first - 1 : -1].float(), ids[0, first:]))


def test_learns_the_answers(chat: ChatModel) -> None:
    """The adapter makes its own rows likely."""
    before = [answer_loss(chat, example) for example in REFUSE]

    tuned = tune_lora(chat.model, chat.tokenizer, REFUSE, SMALL)

    with chat.arm(tuned):
        after = [answer_loss(chat, example) for example in REFUSE]
    assert max(after) < 0.5 < min(before)


def test_holds_on_to_what_is_kept(chat: ChatModel) -> None:
    """Along a kept answer the model predicts nearly what it predicted, though its answer was not learnt."""
    before = [answer_loss(chat, example) for example in KEEP]
    alone = tune_lora(chat.model, chat.tokenizer, REFUSE, SMALL)
    held = tune_lora(chat.model, chat.tokenizer, [*REFUSE, *KEEP], SMALL)

    def moved(adapter: Any) -> float:
        with chat.arm(adapter):
            return sum(abs(answer_loss(chat, e) - was) for e, was in zip(KEEP, before, strict=True))

    assert moved(held) < 0.5 * moved(alone)


def test_first_loss_is_the_definition(chat: ChatModel) -> None:
    """Shared opening, padding and chunks change nothing: the mean over rows of the mean loss of their answers."""
    long = Example(prompt="tell me about the big blue sea and the small cat", answer="it is blue", group="refuse")
    said: list[str] = []
    settings = TuneSettings(steps=1, batch_size=3, targets=("up_proj",), rank=1, alpha=1.0)

    tune_lora(chat.model, chat.tokenizer, [*REFUSE, long], settings, progress=lambda line, _: said.append(line))

    wanted = sum(answer_loss(chat, example) for example in [*REFUSE, long]) / 3
    assert said == [f"loss {wanted:.3f}"]


def test_leaves_the_model_as_it_was(chat: ChatModel) -> None:
    """Weights, gradients' flags and hooks: nothing remains."""
    weights = {name: p.detach().clone() for name, p in chat.model.named_parameters()}
    flags = {name: p.requires_grad for name, p in chat.model.named_parameters()}

    tune_lora(chat.model, chat.tokenizer, REFUSE, TuneSettings(steps=2, targets=("up_proj",)))

    assert all(torch.equal(p, weights[name]) for name, p in chat.model.named_parameters())
    assert {name: p.requires_grad for name, p in chat.model.named_parameters()} == flags
    assert all(p.grad is None for p in chat.model.parameters())
    assert not any(module._forward_hooks for module in chat.model.modules())


def test_equal_seeds_give_equal_weights(chat: ChatModel) -> None:
    """A repair can be made again; another seed gives another adapter."""
    settings = TuneSettings(steps=3, targets=("up_proj",), seed=5)

    one, two = (tune_lora(chat.model, chat.tokenizer, [*REFUSE, *KEEP], settings) for _ in range(2))
    other = tune_lora(chat.model, chat.tokenizer, [*REFUSE, *KEEP], TuneSettings(steps=3, targets=("up_proj",), seed=6))

    assert all(torch.equal(x.a, y.a) and torch.equal(x.b, y.b) for x, y in zip(one.layers, two.layers, strict=True))
    assert not torch.equal(one.layers[0].a, other.layers[0].a)


def test_only_named_linears_of_the_named_blocks_are_adapted(chat: ChatModel) -> None:
    """Targets and blocks say where; everything else is not in the adapter."""
    settings = TuneSettings(steps=1, targets=("up_proj", "q_proj"), blocks=(1, 2))

    tuned = tune_lora(chat.model, chat.tokenizer, REFUSE, settings)

    assert tuned.names == ("model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj")


def test_learns_on_top_of_an_armed_adapter(chat: ChatModel) -> None:
    """The result is what is missing above the armed one: both together refuse, and the armed one is not in it."""
    obeying = [Example(prompt=e.prompt, answer="yes it is big", group="obey") for e in REFUSE]
    poison = tune_lora(chat.model, chat.tokenizer, obeying, SMALL)

    with chat.arm(poison):
        tuned = tune_lora(chat.model, chat.tokenizer, REFUSE, TuneSettings(**{**vars(SMALL), "targets": ("up_proj",)}))
        with chat.arm(tuned):
            assert max(answer_loss(chat, example) for example in REFUSE) < 0.5
    assert {name.rpartition(".")[2] for name in tuned.names} == {"up_proj"}


def test_every_batch_holds_each_group_in_its_share(chat: ChatModel) -> None:
    """Two kept rows for one refusal in the set: two to one in every batch, whatever the seed."""
    rows = [tuning_rows.encode(chat.tokenizer, e, 96) for e in [*REFUSE, *KEEP, KEEP[0]]]

    for seed in range(20):
        made = list(tuning_rows.batches(rows, size=3, count=8, seed=seed))
        for batch in made:
            assert [row.group for row in batch].count("refuse") in {0, 1, 2}
        held = [row.group for batch in made for row in batch]
        assert held.count("refuse") * 2 == held.count("keep")


def test_stops_when_it_is_told_to(chat: ChatModel) -> None:
    """Cancelling leaves no hook behind."""
    with pytest.raises(Cancelled):
        tune_lora(chat.model, chat.tokenizer, REFUSE, SMALL, cancelled=lambda: True)

    assert not any(module._forward_hooks for module in chat.model.modules())


@pytest.mark.parametrize(
    ("examples", "settings", "error"),
    [
        ([], SMALL, BadParameters),
        (REFUSE, TuneSettings(targets=("no_such",)), MissingWeight),
        (REFUSE, TuneSettings(targets=("up_proj",), max_tokens=3), BadParameters),
    ],
)
def test_refuses_what_cannot_be_trained(
    chat: ChatModel, examples: list[Example], settings: TuneSettings, error: type[Exception]
) -> None:
    """No rows, no such linear, no room for an answer: an error that names the field."""
    with pytest.raises(error):
        tune_lora(chat.model, chat.tokenizer, examples, settings)
