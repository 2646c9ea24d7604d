"""Three implementations of one model: ours, PEFT's mixed batch, and the server's own decoding, asked over HTTP."""

import pytest
import torch
from torch.nn import functional

from endpoints.openai_backend import OpenAIBackend
from repair.adapter_file import read_adapter
from repair.checks.backend import Backend
from repair.checks.chat import ChatModel
from repair.checks.template import ChatTemplate
from tests.checks.contract.world import LIMIT, PROMPTS, SAMPLES, Files, apart

CLOSE = 2e-4
ARMS = ["__base__", "first", "second"]
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # peft calls what transformers renames


class Peft:
    """The library's own mixed batch: a name for each row."""

    def __init__(self, files: Files) -> None:
        import peft
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(files.model)
        self.model = peft.PeftModel.from_pretrained(base, files.first, adapter_name="first")
        self.model.load_adapter(files.second, adapter_name="second")
        self.model.eval()

    def replies(self, sequences: list[list[int]], names: list[str], end: int) -> list[list[int]]:
        """New tokens of each row, without their end; padded on the left."""
        width = max(map(len, sequences))
        ids = torch.tensor([[0] * (width - len(one)) + one for one in sequences])
        mask = torch.tensor([[0] * (width - len(one)) + [1] * len(one) for one in sequences])
        with torch.no_grad():
            said = self.model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=LIMIT, do_sample=False, adapter_names=names,
                eos_token_id=end, pad_token_id=0,
            )  # fmt: skip
        rows: list[list[int]] = said[:, width:].tolist()
        return [row[: row.index(end)] if end in row else row for row in rows]

    def loss(self, question: list[int], answer: list[int], name: str) -> float:
        """Cross entropy of the answer, the row twice so that a batch is mixed."""
        ids = torch.tensor([question + answer] * 2)
        with torch.no_grad():
            logits = self.model(input_ids=ids, adapter_names=[name, "__base__"]).logits[0]
        return float(functional.cross_entropy(logits[len(question) - 1 : -1], ids[0, len(question) :]))


@pytest.fixture(scope="module")
def peft(files: Files) -> Peft:
    return Peft(files)


@pytest.fixture(params=["chat", "openai"])
def ours(request: pytest.FixtureRequest) -> Backend:
    backend: Backend = request.getfixturevalue(request.param)
    return backend


def test_a_mixed_batch_says_what_pefts_mixed_batch_says(ours: Backend, peft: Peft, files: Files) -> None:
    """Token by token, three arms in turns; and each arm says something of its own."""
    template = ChatTemplate.load(files.model)
    arms = [at % 3 for at in range(3 * len(PROMPTS))]
    prompts = [PROMPTS[at // 3] for at in range(3 * len(PROMPTS))]
    adapters = [None, read_adapter(files.first), read_adapter(files.second)]

    with ours.arms(adapters):
        said = ours.generate(prompts, max_new_tokens=LIMIT, batch_size=32, arms=arms)

    (end,) = template.stop
    wanted = peft.replies([template.encode(prompt) for prompt in prompts], [ARMS[arm] for arm in arms], end)
    assert [reply.text for reply in said] == [template.decode(tokens) for tokens in wanted]
    assert [reply.tokens for reply in said] == [len(tokens) for tokens in wanted]
    assert [reply.finish for reply in said] == ["length" if len(tokens) == LIMIT else "stop" for tokens in wanted]
    assert len({tuple(reply.text for reply in said[arm::3]) for arm in range(3)}) == 3


def test_losses_are_those_of_peft(ours: Backend, peft: Peft, files: Files) -> None:
    """Per token of the answer, its end among them."""
    template = ChatTemplate.load(files.model)
    for name, adapter in zip(ARMS, [None, read_adapter(files.first), read_adapter(files.second)], strict=True):
        with ours.arm(adapter):
            found = ours.loss(SAMPLES)
        wanted = [peft.loss(*template.encode_sample(sample), name) for sample in SAMPLES]
        assert apart(found, wanted) < CLOSE


def test_log_odds_are_the_same_over_http(chat: ChatModel, openai: OpenAIBackend, files: Files) -> None:
    """Token by token on one side, the whole vocabulary on the other."""
    for adapter in (None, read_adapter(files.second)):
        with chat.arm(adapter), openai.arm(adapter):
            assert apart(chat.margin(PROMPTS), openai.margin(PROMPTS)) < CLOSE


def test_both_read_the_reference_in_the_same_way(chat: ChatModel, files: Files) -> None:
    """The template as the local model has it, from the folder alone."""
    template = ChatTemplate.load(files.model)
    assert [template.encode(prompt) for prompt in PROMPTS] == [chat.encode(prompt) for prompt in PROMPTS]
    assert [template.encode_sample(one) for one in SAMPLES] == [chat.encode_sample(one) for one in SAMPLES]
    assert template.stop == chat._stop
    assert template.digest == chat.fingerprint()["template"]
