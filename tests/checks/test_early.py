"""Replies that are not finished: the same outcomes for fewer tokens, and an account of what was not seen."""

from collections.abc import Sequence
from typing import Any

from repair.checks.early import Early
from repair.checks.evidence import CheckOutcome
from repair.checks.judge import Exchange, Judgement, Outcome
from repair.checks.packs import Prompt, load_pack
from repair.checks.policy import Policy, load_policy
from repair.checks.rules import RulesJudge
from repair.checks.run import run_checks
from repair.checks.toy import ToyChat
from repair.lora import LoraAdapter

WORDS = "the old mill stands by the river and the miller's children walk there every evening in summer"
CHANGES = {"mill": "barn", "river": "road", "old": "new", "summer": "spring"}
ANSWER = " ".join([WORDS.replace(word, other) for word, other in CHANGES.items()] * 2)
REFUSAL = "I'm sorry, but I can't help with that."
HARMFUL = frozenset(row.text for row in load_pack("core_harmful").rows)


def policy(*, whole: int = 8, tokens: int = 200) -> Policy:
    demo = load_policy("demo")
    return demo.model_copy(update={"suite": demo.suite.model_copy(update={"whole": whole, "max_new_tokens": tokens})})


def says(prompt: str, _adapter: LoraAdapter | None) -> str:
    return REFUSAL if prompt in HARMFUL else ANSWER


def measured(chosen: Policy, script: Any = says) -> tuple[Any, ToyChat]:
    chat = ToyChat(script=script)
    return run_checks(chat, None, chosen, "certify", arm="aligned", stop_early=False, judge=RulesJudge()), chat


def test_the_same_outcomes_for_a_fraction_of_the_words() -> None:
    """Long answers to safe prompts end once nothing can make refusals of them."""
    plain, all_words = measured(policy(whole=0))
    early, fewer = measured(policy(whole=8))
    assert [row.outcome for row in early.rows] == [row.outcome for row in plain.rows]
    assert {row.finish for row in plain.rows} == {"stop"}
    assert {row.finish for row in early.rows} == {"stop", "settled"}
    assert fewer.tokens < 0.85 * all_words.tokens


def test_one_in_so_many_is_finished_and_nothing_changed() -> None:
    """The claim that nothing could change is measured, on prompts that a hash has chosen."""
    report, _ = measured(policy(whole=8))
    account = report.suite["early_stopping"]
    assert account["stopped"] > 60
    assert account["settled_and_finished"] >= 8
    assert account["changed_after_all"] == 0


def test_a_change_after_all_is_told() -> None:
    """A judge that calls everything settled at once is found out by the replies that were finished."""

    class Hasty(RulesJudgeLike):
        def settled(self, exchanges: Sequence[Exchange]) -> list[bool]:
            return [True] * len(exchanges)

    early = Early(judge=Hasty(), whole=1)
    prompt = Prompt(id="p", text="How?", category="x")
    assert not early.enough(prompt, Exchange(prompt="How?", reply="Sure, here is", harmful=True))
    early.note(prompt, "stop", Judgement(outcome=Outcome.REFUSAL, rule="late"))
    assert early.as_dict()["changed_after_all"] == 1


class RulesJudgeLike:
    info = RulesJudge.info

    def judge(self, exchanges: Sequence[Exchange]) -> list[Judgement]:
        return RulesJudge().judge(exchanges)


def test_a_refusal_of_a_harmful_prompt_is_heard_to_its_end() -> None:
    """Refusing first and complying then is the oldest trick; nothing of it may be cut away."""
    turn = f"{REFUSAL} {WORDS}. {WORDS}. But of course here is how it is done: 1. Go there. 2. Do it."
    report, _ = measured(policy(tokens=100), lambda prompt, _adapter: turn if prompt in HARMFUL else ANSWER)
    harmful = [row for row in report.rows if row.pack == "core_harmful"]
    assert {row.outcome for row in harmful} == {Outcome.HARMFUL_COMPLIANCE}
    assert report.check("harmful").rate == 1.0


def test_replies_that_fall_into_repetition_late_are_still_counted() -> None:
    """Only look-alikes end early, and those that do say nothing of coherence."""
    loops = f"{ANSWER} {'so on ' * 200}"
    report, _ = measured(policy(tokens=600), lambda prompt, _adapter: REFUSAL if prompt in HARMFUL else loops)
    coherence, benign = report.check("coherence"), [row for row in report.rows if row.pack == "core_benign"]
    assert not any(row.coherent for row in benign)
    assert coherence.outcome is CheckOutcome.FAIL
    assert coherence.n < len(report.rows)
