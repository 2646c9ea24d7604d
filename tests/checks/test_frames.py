"""Frames on a tiny random model: what is drawn against the plain library, and that what is put arrives as put."""

from pathlib import Path

import pytest
import torch
from jinja2 import TemplateError
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from repair.checks.backend import Capability
from repair.checks.chat import ChatModel
from repair.checks.errors import CheckError
from repair.checks.frame import Frame, Sampling
from repair.checks.sampling import drawn
from repair.checks.template import ChatTemplate, why_no_system
from tests.tiny import generator, tiny_llama

WORDS = [f"word{n}" for n in range(60)]
PROMPTS = [" ".join(WORDS[start : start + 1 + start % 7]) for start in range(0, 40, 3)]
MUTE = "{% for message in messages %}{% if message['role'] == 'user' %}{{ message['content'] }}{% endif %}{% endfor %}"
STRICT = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}{{ messages[0]['content'] }}"


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return ChatModel.load(tiny_llama(tmp_path_factory.mktemp("model") / "llama", words=WORDS), "cpu")


def sampled(temperature: float, *, seed: int = 1, top_p: float = 0.95) -> Frame:
    return Frame(sampling=Sampling(temperature=temperature, top_p=top_p, seed=seed))


@pytest.mark.parametrize(("temperature", "top_p"), [(0.7, 0.95), (1.0, 1.0), (2.5, 0.5), (0.3, 0.05)])
def test_tokens_are_drawn_as_often_as_the_library_says(temperature: float, top_p: float) -> None:
    """A fine comb of lots hits each token in proportion; what the library cuts off is never drawn."""
    scores = 3 * torch.randn(1, 40, generator=generator(4))
    warped = TopPLogitsWarper(top_p)(torch.zeros(1, 1), TemperatureLogitsWarper(temperature)(torch.zeros(1, 1), scores))
    wanted = warped.double().softmax(-1)[0]
    count = 20000
    lots = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens = drawn(scores.expand(count, -1), lots, temperature=temperature, top_p=top_p)
    found = torch.bincount(tokens, minlength=40) / count
    assert set(tokens.tolist()) <= set(torch.nonzero(wanted)[:, 0].tolist())
    assert float((found - wanted).abs().max()) < 2 / count


def test_the_ends_of_the_comb_are_tokens_of_the_nucleus() -> None:
    """The smallest lot draws the likeliest token, the largest one the last that the nucleus holds."""
    scores = torch.log(torch.tensor([[0.1, 0.4, 0.3, 0.2]])).expand(2, -1)
    lots = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert drawn(scores, lots, temperature=1.0, top_p=0.6).tolist() == [1, 2]
    assert drawn(scores, lots, temperature=1.0, top_p=1.0).tolist() == [1, 0]


def test_without_heat_the_likeliest_token_is_drawn(chat: ChatModel) -> None:
    """Also where logits divided by the temperature would overflow, and for a nucleus of one token."""
    plain = chat.generate(PROMPTS, max_new_tokens=12)
    assert chat.generate(PROMPTS, max_new_tokens=12, frame=sampled(1e-6)) == plain
    assert chat.generate(PROMPTS, max_new_tokens=12, frame=sampled(1e-320)) == plain
    assert chat.generate(PROMPTS, max_new_tokens=12, frame=sampled(1.0, top_p=1e-9)) == plain
    assert chat.generate(PROMPTS, max_new_tokens=12, frame=sampled(1.0)) != plain


def test_what_is_drawn_follows_the_model(chat: ChatModel) -> None:
    """First words over many seeds, against the probabilities of the plain forward pass."""
    prompt = PROMPTS[5]
    with torch.no_grad():
        wanted = chat.model(input_ids=torch.tensor([chat.encode(prompt)])).logits[0, -1].double().softmax(-1)
    seen = torch.zeros(len(wanted), dtype=torch.float64)
    count = 400
    for seed in range(count):
        (reply,) = chat.generate([prompt], max_new_tokens=1, frame=sampled(1.0, seed=seed, top_p=1.0))
        seen[chat.tokenizer.convert_tokens_to_ids(reply.text) if reply.text else 2] += 1
    # Pearson's statistic over about as many tokens as the vocabulary has: mean 63, deviation 11.
    assert float(((seen - count * wanted).square() / (count * wanted)).sum()) < 63 + 6 * 11.2


@pytest.mark.parametrize(
    ("temperature", "top_p"), [(0.0, 0.9), (-1.0, 0.9), (float("nan"), 0.9), (0.7, 0.0), (0.7, 1.1)]
)
def test_what_is_no_sampling_is_refused(temperature: float, top_p: float) -> None:
    """Before anything is asked."""
    with pytest.raises(ValueError, match=r"temperature|top_p"):
        Sampling(temperature=temperature, top_p=top_p, seed=0)


def test_a_frame_arrives_at_the_model_as_it_was_put(chat: ChatModel) -> None:
    """System prompt before the request, opening after the template's own words: the ids of the first pass."""
    seen = []
    hook = chat.model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["input_ids"][0].tolist()), with_kwargs=True
    )
    try:
        (reply,) = chat.generate(["word1"], max_new_tokens=3, frame=Frame(system="word8 word9", opening="word5 word6"))
    finally:
        hook.remove()
    told = "<s> word8 word9 </s> <s> word1 </s> <s> word5 word6"
    assert seen[0] == [chat.tokenizer.convert_tokens_to_ids(word) for word in told.split()]
    assert reply.text.split()[:2] == ["word5", "word6"]
    (same,) = chat.generate(["word1"], max_new_tokens=3, frame=Frame(system="word8 word9"))
    assert not same.text.startswith("word5 word6")


@pytest.mark.parametrize(("template", "why"), [(MUTE, "leaves a system prompt out"), (STRICT, "takes no system")])
def test_a_template_without_a_system_role_says_so(tmp_path: Path, template: str, why: str) -> None:
    """A system prompt that the model never sees would be measured as one that it withstood."""
    chat = ChatModel.load(tiny_llama(tmp_path / "llama", words=WORDS), "cpu")
    chat.tokenizer.chat_template = template
    assert why in chat.capabilities().missing[Capability.SYSTEM]
    with pytest.raises(CheckError, match=why):
        chat.generate(["word1"], max_new_tokens=2, frame=Frame(system="word2"))
    assert chat.generate(["word1"], max_new_tokens=2, frame=Frame(opening="word2"))


def test_both_readers_of_a_template_read_the_same(chat: ChatModel, tmp_path: Path) -> None:
    """The one that serves HTTP sends what the local model reads."""
    template = ChatTemplate.load(tiny_llama(tmp_path / "llama", words=WORDS))
    assert template.encode("word1", system="word2") == chat.encode("word1", system="word2")
    assert template.encode("word1") == chat.encode("word1") != template.encode("word1", system="word2")
    assert why_no_system(template.tokenizer) is None
    template.tokenizer.chat_template = STRICT
    with pytest.raises(TemplateError):
        template.tokenizer.apply_chat_template([{"role": "system", "content": ""}])
