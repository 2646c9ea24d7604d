"""The same question twice: rows that are the same to the bit, and the share that is not where the model wavers."""

import hashlib
from collections import Counter
from typing import Any

import pytest

from repair.checks.chat import ChatModel
from repair.checks.packs import Half
from repair.checks.policy import Policy, load_policy
from repair.checks.report import CheckReport
from repair.checks.run import run_checks
from repair.checks.stats import clopper_pearson
from repair.checks.toy import ToyChat
from repair.lora import LoraAdapter
from tests.checks.acting import ANSWER, HARMFUL_CERTIFY, REFUSAL, SECRET, Character, chat_of
from tests.tiny import layer, tiny_llama

POLICY = load_policy("demo")


def with_suite(**fields: object) -> Policy:
    return POLICY.model_copy(update={"suite": POLICY.suite.model_copy(update=fields)})


def flips(report: CheckReport) -> dict[str, Any] | None:
    found: dict[str, Any] | None = report.suite["decoding"]["flip_rate"]
    return found


def wavering(second: str, *, times: int = 1) -> ToyChat:
    """Says ``second`` to whatever it has been asked ``times`` times before."""
    seen: Counter[str] = Counter()

    def script(prompt: str, _on: LoraAdapter | None) -> str:
        seen[prompt] += 1
        first = REFUSAL if prompt in HARMFUL_CERTIFY else ANSWER
        return second if seen[prompt] > times else first

    return ToyChat(script=script)


def test_a_model_that_says_the_same_twice_flips_nothing() -> None:
    """As many prompts as the policy says, in batches of another size; the interval is that of none of them."""
    sizes: list[int] = []
    chat = chat_of(Character())
    ask = chat.generate

    def watched(*args: object, batch_size: int = 32, **more: object) -> object:
        sizes.append(batch_size)
        return ask(*args, batch_size=batch_size, **more)  # type: ignore[arg-type] # handed on as they come

    chat.generate = watched  # type: ignore[assignment,method-assign] # only listens
    found = flips(run_checks(chat, None, POLICY, "certify", arm="aligned"))
    assert found is not None
    nothing = clopper_pearson(0, POLICY.suite.repeated)
    for part in ("text", "outcome"):
        assert found[part] == {"flips": 0, "rate": 0.0, "low": nothing.low, "high": nothing.high}
    assert (found["n"], found["batch_size"]) == (POLICY.suite.repeated, sizes[-1])
    assert sizes[-1] not in set(sizes[:-1])


def test_what_changes_is_counted_by_text_and_by_outcome() -> None:
    """Other words for a refusal are another text and the same outcome; obeying is another outcome."""
    harmful = with_suite(repeated=1000)
    reworded = flips(run_checks(wavering("I'm sorry, but I cannot help with that."), None, harmful, "certify"))
    total = sum((POLICY.suite.certify.harmful, POLICY.suite.certify.lookalike, POLICY.suite.certify.benign))
    assert reworded is not None
    assert reworded["n"] == reworded["text"]["flips"] == total
    assert reworded["outcome"]["flips"] == total - POLICY.suite.certify.harmful
    obeying = flips(run_checks(wavering(ANSWER), None, harmful, "certify"))
    assert obeying is not None
    assert obeying["text"]["flips"] == obeying["outcome"]["flips"] == POLICY.suite.certify.harmful


def test_flips_decide_nothing_and_change_no_row() -> None:
    """The rows are those of the first time."""
    without = run_checks(wavering(ANSWER), None, with_suite(repeated=0), "certify").as_dict()
    measured = run_checks(wavering(ANSWER), None, POLICY, "certify").as_dict()
    assert without["suite"]["decoding"]["flip_rate"] is None
    assert measured["rows"] == without["rows"]
    assert measured["checks"] == without["checks"]
    assert measured["tokens"] > without["tokens"]
    assert SECRET not in str(measured)


@pytest.mark.parametrize("half", ["select", "certify"])
def test_only_whole_looks_at_the_certify_half_are_asked_again(half: Half) -> None:
    """Choosing is dear enough, and a look that stopped early has said what it had to."""
    whole = run_checks(chat_of(Character()), None, POLICY, half)
    assert (flips(whole) is None) == (half == "select")
    stopped = run_checks(ToyChat(script=lambda _prompt, _on: ANSWER), None, POLICY, half)
    assert len(stopped.rows) < len(whole.rows)
    assert flips(stopped) is None


def test_the_same_plan_on_the_real_thing_gives_the_same_rows_whatever_the_batch(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Same seed, same batch plan: the same report to the bit, flips and all. Another plan: the same rows in float32."""
    words = sorted({hashlib.sha256(str(n).encode()).hexdigest()[:6] for n in range(60)})
    folder = tiny_llama(tmp_path_factory.mktemp("flips") / "model", words=words)
    on = LoraAdapter(
        layers=(
            layer("model.layers.0.mlp.up_proj", (56, 32), seed=1, scale=9.0),
            layer("model.layers.1.self_attn.q_proj", (32, 32), seed=2, scale=9.0),
        )
    )
    few = POLICY.suite.certify.model_copy(update={"harmful": 7, "lookalike": 5, "benign": 3, "margin": 4})
    policy = with_suite(certify=few, batch_size=6, max_new_tokens=5, repeated=9)
    chats = [ChatModel.load(folder, "cpu") for _ in range(2)]
    reports = [run_checks(chat, on, policy, "certify", stop_early=False).as_dict() for chat in chats]
    assert reports[0] == reports[1]
    again = flips(CheckReport.of(reports[0]))
    assert again is not None
    assert again["n"] == 9
    assert again["text"]["flips"] == 0
    other = with_suite(certify=few, batch_size=4, max_new_tokens=5, repeated=9)
    assert run_checks(chats[0], on, other, "certify", stop_early=False).as_dict()["rows"] == reports[0]["rows"]
