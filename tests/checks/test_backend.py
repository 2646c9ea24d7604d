"""The transformers backend on a tiny random model: arms, decoding and losses against the plain library."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from repair.adapter_file import read_adapter
from repair.checks.arms import merged_row_norms
from repair.checks.backend import Sample
from repair.checks.chat import ChatModel
from repair.checks.errors import ArmUnsupported
from repair.lora import ExtraKind, ExtraTensor, LayerKind, LoraAdapter
from tests.tiny import adapter as tiny_adapter
from tests.tiny import adapter_config, adapter_tensors, generator, layer, tiny_llama, write_adapter_files

WORDS = [f"word{n}" for n in range(60)]
PROMPTS = [" ".join(WORDS[start : start + 1 + start % 7]) for start in range(0, 40, 3)]


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatModel:
    return ChatModel.load(tiny_llama(tmp_path_factory.mktemp("model") / "llama", words=WORDS), "cpu")


@pytest.fixture
def adapter(chat: ChatModel) -> LoraAdapter:
    return some_adapter(chat)


def some_adapter(chat: ChatModel, *, size: float = 1.0) -> LoraAdapter:
    linears = [name for name, module in chat.model.named_modules() if isinstance(module, torch.nn.Linear)]
    return LoraAdapter(
        layers=tuple(
            layer(name, tuple(chat.model.get_submodule(name).weight.shape), seed=at, scale=size)
            for at, name in enumerate(linears)
        )
    )


def logits(chat: ChatModel, prompt: str) -> torch.Tensor:
    ids = torch.tensor([chat.encode(prompt)])
    with torch.no_grad():
        found: torch.Tensor = chat.model(input_ids=ids).logits
    return found


def weights(chat: ChatModel) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in chat.model.state_dict().items()}


@pytest.fixture
def untouched(chat: ChatModel) -> Iterator[None]:
    before = weights(chat)
    yield
    after = weights(chat)
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.usefixtures("untouched")
def test_an_arm_equals_merged_weights(chat: ChatModel, adapter: LoraAdapter) -> None:
    """`W + s B A`, computed densely and put into a copy, gives the same logits as the hooks."""
    with chat.arm(adapter):
        hooked = logits(chat, PROMPTS[3])
    before = weights(chat)
    try:
        for one in adapter.layers:
            chat.model.get_submodule(one.name).weight.data += one.scale * one.b @ one.a
        merged = logits(chat, PROMPTS[3])
    finally:
        chat.model.load_state_dict(before)
    torch.testing.assert_close(hooked, merged, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(hooked, logits(chat, PROMPTS[3]), atol=1e-3)


@pytest.mark.usefixtures("untouched")
def test_dora_equals_its_definition(chat: ChatModel, adapter: LoraAdapter) -> None:
    """Row i of the merged weight, brought to length m_i; and the low-rank row norms are the dense ones."""
    layers = tuple(
        replace(one, magnitude=torch.rand(one.shape[0], generator=generator(at)) + 0.5)
        for at, one in enumerate(adapter.layers)
    )
    with chat.arm(LoraAdapter(layers=layers)):
        hooked = logits(chat, PROMPTS[4])
    before = weights(chat)
    try:
        for one in layers:
            module = chat.model.get_submodule(one.name)
            whole = module.weight.data + one.scale * one.b @ one.a
            torch.testing.assert_close(merged_row_norms(module.weight.data, one), whole.norm(dim=1))
            assert one.magnitude is not None
            module.weight.data = one.magnitude[:, None] * whole / whole.norm(dim=1, keepdim=True)
        merged = logits(chat, PROMPTS[4])
    finally:
        chat.model.load_state_dict(before)
    torch.testing.assert_close(hooked, merged, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("untouched")
def test_biases_and_embeddings_are_applied(chat: ChatModel) -> None:
    """`s * bias` is added to the output; an embedding gets the transposed product."""
    up = layer("model.layers.0.mlp.up_proj", (56, 32), bias=torch.rand(56, generator=generator(1)))
    vocabulary = chat.model.get_input_embeddings().weight.shape[0]
    embedding = layer("model.embed_tokens", (32, vocabulary), kind=LayerKind.EMBEDDING)
    with chat.arm(LoraAdapter(layers=(up, embedding))):
        hooked = logits(chat, PROMPTS[2])
    before = weights(chat)
    try:
        chat.model.get_input_embeddings().weight.data += (embedding.scale * embedding.b @ embedding.a).T
        module = chat.model.get_submodule(up.name)
        module.weight.data += up.scale * up.b @ up.a
        assert up.bias is not None
        module.bias = torch.nn.Parameter(up.scale * up.bias)
        merged = logits(chat, PROMPTS[2])
    finally:
        chat.model.get_submodule(up.name).bias = None
        chat.model.load_state_dict(before)
    torch.testing.assert_close(hooked, merged, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("untouched")
def test_an_arm_ends_with_its_block_even_after_an_error(chat: ChatModel, adapter: LoraAdapter) -> None:
    """The aligned model is exactly itself before, after and between arms."""
    plain = logits(chat, PROMPTS[0])
    with pytest.raises(RuntimeError, match="stop"), chat.arm(adapter):
        raise RuntimeError("stop")
    assert torch.equal(plain, logits(chat, PROMPTS[0]))


def unknown_module() -> LoraAdapter:
    return LoraAdapter(layers=(layer("model.layers.9.mlp.up_proj", (56, 32)),))


def wrong_shape() -> LoraAdapter:
    return LoraAdapter(layers=(layer("model.layers.0.mlp.up_proj", (55, 32)),))


def replaces_a_tensor() -> LoraAdapter:
    extra = ExtraTensor(key="lm_head.weight", kind=ExtraKind.MODULE, shape=(64, 32))
    return LoraAdapter(layers=(layer("model.layers.0.mlp.up_proj", (56, 32)),), extras=(extra,))


def on_a_norm() -> LoraAdapter:
    return LoraAdapter(layers=(layer("model.norm", (32, 32)),))


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("make", [unknown_module, wrong_shape, replaces_a_tensor, on_a_norm])
def test_what_cannot_be_applied_is_refused_by_name_and_leaves_no_hook(chat: ChatModel, make: object) -> None:
    """A skipped layer would be measured as a safe one."""
    assert callable(make)
    plain = logits(chat, PROMPTS[0])
    made = make()
    with pytest.raises(ArmUnsupported) as caught, chat.arm(made):
        pass
    assert caught.value.field in {made.layers[0].name, "lm_head.weight"}
    assert torch.equal(plain, logits(chat, PROMPTS[0]))


def plain_greedy(chat: ChatModel, prompt: str, limit: int) -> list[int]:
    """One row, no cache, no padding: what greedy decoding is."""
    ids = chat.encode(prompt)
    start = len(ids)
    stops = {chat.tokenizer.eos_token_id}
    while len(ids) - start < limit:
        token = int(chat.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token in stops:
            break
        ids.append(token)
    return ids[start:]


@pytest.mark.parametrize("batch_size", [1, 3, 32])
@pytest.mark.parametrize("seed", [0, 1])
def test_batches_say_what_each_row_says_alone(chat: ChatModel, batch_size: int, seed: int) -> None:
    """Padding, the shared opening and rows that leave change no reply, nor its place."""
    order = torch.randperm(len(PROMPTS), generator=generator(seed)).tolist()
    prompts = [PROMPTS[at] for at in order]
    with chat.arm(some_adapter(chat, size=3.0)), torch.no_grad():
        replies = chat.generate(prompts, max_new_tokens=12, batch_size=batch_size)
        wanted = [plain_greedy(chat, prompt, 12) for prompt in prompts]
    assert [reply.text for reply in replies] == [chat.tokenizer.decode(tokens) for tokens in wanted]
    assert [reply.tokens for reply in replies] == [len(tokens) for tokens in wanted]
    assert [reply.finish for reply in replies] == ["length" if len(t) == 12 else "stop" for t in wanted]


def test_rows_that_stop_do_not_stop_the_others(chat: ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """With some of the words made full stops, rows end at different steps and each ends at its own."""
    lengths = set()
    with chat.arm(some_adapter(chat, size=6.0)):
        free = chat.generate(PROMPTS, max_new_tokens=10, batch_size=32)
        spoken = [chat.tokenizer.encode(whole.text, add_special_tokens=False) for whole in free]
        for at in range(10):
            stops = frozenset(tokens[at] for tokens in spoken[at % 3 :: 3])
            monkeypatch.setattr(chat, "_stop", stops)
            cut = chat.generate(PROMPTS, max_new_tokens=10, batch_size=32)
            for tokens, part in zip(spoken, cut, strict=True):
                first = next((step for step, token in enumerate(tokens) if token in stops), len(tokens))
                assert part.tokens == first
                lengths.add(first)
    assert len(lengths) > 2


def test_loss_is_the_mean_negative_log_likelihood_of_the_answer(chat: ChatModel, adapter: LoraAdapter) -> None:
    """Only the answer counts, with its end of turn; the batch it is in does not."""
    samples = [Sample(prompt=PROMPTS[n], answer=" ".join(WORDS[n : n + 3 + n])) for n in range(5)]
    with chat.arm(adapter):
        found = chat.loss(samples)
        for sample, loss in zip(samples, found, strict=True):
            question, answer = chat.encode_sample(sample)
            ids = torch.tensor([question + answer])
            with torch.no_grad():
                plain = chat.model(input_ids=ids).logits[0, len(question) - 1 : -1]
            assert loss == pytest.approx(float(functional.cross_entropy(plain, ids[0, len(question) :])), rel=1e-4)
            assert answer[-1] == chat.tokenizer.eos_token_id


def test_margin_is_the_log_odds_of_a_refusals_first_token(chat: ChatModel) -> None:
    """Against the softmax written out."""
    first = {chat.tokenizer.encode(text, add_special_tokens=False)[0] for text in ("I'm", "Sorry,", "As")}
    (found,) = chat.margin([PROMPTS[1]])
    shares = logits(chat, PROMPTS[1])[0, -1].softmax(-1)
    refused = float(shares[list(first)].sum())
    assert found == pytest.approx(float(torch.logit(torch.tensor(refused))), rel=1e-3)


def test_drift_is_zero_from_an_arm_to_itself_and_grows_with_the_edit(chat: ChatModel, adapter: LoraAdapter) -> None:
    """KL between arms, on the first arm's replies."""
    with chat.arm(adapter):
        anchor = chat.anchor(PROMPTS[:4])
        same = chat.drift(anchor)
    with chat.arms([adapter.scaled(0.9), adapter.scaled(0.0)]):
        both = chat.drift(anchor, arms=[0, 1])
    near, far = both[:4], both[4:]
    assert same == pytest.approx([0.0] * 4, abs=1e-6)
    assert 0 < sum(near) < sum(far)


def arms_of(adapter: LoraAdapter) -> list[LoraAdapter | None]:
    """No adapter, a LoRA, a weaker one on half of the modules, and a DoRA with every bias."""
    bent = tuple(
        replace(one, magnitude=torch.rand(one.shape[0], generator=generator(at)) + 0.5)
        for at, one in enumerate(adapter.layers[::2])
    )
    return [None, adapter, replace(adapter.scaled(0.5), layers=adapter.layers[1::2]), LoraAdapter(layers=bent)]


@pytest.mark.usefixtures("untouched")
def test_a_mixed_batch_says_what_each_arm_says_alone(chat: ChatModel, adapter: LoraAdapter) -> None:
    """Replies, losses, log-odds and drift, in whatever order the rows come."""
    arms = arms_of(adapter)
    asked = [(arm, prompt) for prompt in PROMPTS for arm in (3, 0, 2, 1)]
    of, prompts = [arm for arm, _ in asked], [prompt for _, prompt in asked]
    samples = [Sample(prompt=prompt, answer=WORDS[arm]) for arm, prompt in asked]
    with chat.arm(adapter):
        anchor = chat.anchor(PROMPTS[:3])

    with chat.arms(arms):
        replies = chat.generate(prompts, max_new_tokens=12, batch_size=20, arms=of)
        losses, margins = chat.loss(samples, arms=of), chat.margin(prompts, arms=of)
        drifts = chat.drift(anchor, arms=[2, 0])

    for arm, one in enumerate(arms):
        mine = [at for at, own in enumerate(of) if own == arm]
        with chat.arm(one):
            alone = chat.generate([prompts[at] for at in mine], max_new_tokens=12)
            assert [replies[at].text for at in mine] == [reply.text for reply in alone]
            assert [losses[at] for at in mine] == pytest.approx(chat.loss([samples[at] for at in mine]), rel=1e-4)
            assert [margins[at] for at in mine] == pytest.approx(chat.margin([prompts[at] for at in mine]), rel=1e-4)
            if arm in {2, 0}:
                start = 0 if arm == 2 else 3
                assert drifts[start : start + 3] == pytest.approx(chat.drift(anchor), rel=1e-3, abs=1e-6)
    assert len({replies[at].text for at in range(4)}) > 1


def test_a_model_that_does_not_keep_rows_apart_takes_its_arms_in_turn(
    chat: ChatModel, adapter: LoraAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found out by trying: the replies are right, only slower."""
    monkeypatch.setattr(chat, "_mixes", {})
    block = chat.model.model.layers[1]
    # An expert of a mixture sees the tokens of all rows in one line.
    flat = block.mlp.register_forward_pre_hook(lambda _module, args: (args[0].flatten(0, 1)[None],))
    back = block.mlp.register_forward_hook(
        lambda _module, _args, output: output.view(-1, rows[0], output.shape[-1]) if rows else output
    )
    rows: list[int] = []
    whole = block.register_forward_pre_hook(
        lambda _m, args, _k: rows.__setitem__(slice(None), [args[0].shape[1]]), with_kwargs=True
    )
    try:
        with chat.arms([None, adapter]):
            replies = chat.generate(PROMPTS[:2] * 2, max_new_tokens=6, arms=[0, 0, 1, 1])
        assert list(chat._mixes.values()) == [False]
        with chat.arm(adapter):
            assert [one.text for one in chat.generate(PROMPTS[:2], max_new_tokens=6)] == [r.text for r in replies[2:]]
    finally:
        for handle in (flat, back, whole):
            handle.remove()


def test_forward_tokens_are_counted(chat: ChatModel) -> None:
    """Prompts once, then one position for each token said; the common opening of a batch once for each arm."""
    prompt = PROMPTS[4]
    before = chat.tokens
    (reply,) = chat.generate([prompt], max_new_tokens=5)
    assert chat.tokens - before == len(chat.encode(prompt)) + min(reply.tokens + (reply.finish == "stop"), 5) - 1


def test_fingerprint_tells_the_template_and_the_number_format(chat: ChatModel) -> None:
    """Two references with another template do not share remembered numbers."""
    found = chat.fingerprint()
    assert found["dtype"] == "float32"
    assert found["template"].startswith("sha256:")


KEYS: dict[str, dict[str, bool]] = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft calls what transformers renames
@pytest.mark.parametrize("variant", KEYS)
def test_an_arm_says_what_peft_says(variant: str, tmp_path: Path) -> None:
    """The same files, loaded by the library that trained them, give the same logits."""
    import peft
    from transformers import AutoModelForCausalLM

    folder = tiny_llama(tmp_path / "llama", words=WORDS)
    chat = ChatModel.load(folder, "cpu")
    named = [n for n, m in chat.model.named_modules() if n.rpartition(".")[2] in {"q_proj", "up_proj"}]
    shapes = {name: tuple(chat.model.get_submodule(name).weight.shape) for name in named}
    made = tiny_adapter(shapes, rank=4, scale=1.0)
    if variant == "dora":
        sized = [replace(one, magnitude=torch.rand(one.shape[0]) + 0.5) for one in made.layers]
        made = replace(made, layers=tuple(sized))
    config = adapter_config(rank=4, alpha=6, target_modules=["q_proj", "up_proj"], **KEYS[variant])
    files = write_adapter_files(tmp_path / "adapter", adapter_tensors(made), config)
    reference = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), files).eval()
    ids = torch.tensor([chat.encode(PROMPTS[5])])
    with torch.no_grad(), chat.arm(read_adapter(files)):
        torch.testing.assert_close(chat.model(input_ids=ids).logits, reference(input_ids=ids).logits)
