"""What a backend cannot measure: the check that needs it says so and does not pass; nothing else takes its place."""

from pathlib import Path
from typing import Any

import pytest

from repair.checkpoint import Checkpoint
from repair.checks.backend import Anchor, Capabilities, Capability, Sample
from repair.checks.evidence import CheckOutcome
from repair.checks.planner import Reference, Verdict, plan
from repair.checks.policy import Candidate, load_policy
from repair.checks.run import Original, run_checks
from repair.checks.toy import ToyChat
from repair.errors import MissingReference
from tests.checks.acting import SAMPLES, UPLOAD, Character, chat_of, policy_of
from tests.tiny import SHAPES, weights, write_checkpoint

POLICY = load_policy("demo")
WHY = "it was never taught to"


def without(*missing: Capability) -> ToyChat:
    """The scripted model, which breaks when it is asked what it says it cannot do."""
    chat = chat_of(Character())

    def broken(*_args: object, **_more: object) -> Any:
        raise AssertionError("asked for what is missing")

    questions = {Capability.LOSS: "loss", Capability.MARGIN: "margin", Capability.DRIFT: "anchor"}
    for one in missing:
        if one in questions:
            setattr(chat, questions[one], broken)
    chat.missing = {**chat.missing, **dict.fromkeys(missing, WHY)}
    return chat


def measured(chat: ToyChat, samples: tuple[Sample, ...]) -> tuple[Original, Any]:
    """A candidate that is the upload itself, on the certify half."""
    original = Original.measure(chat, UPLOAD, samples, prompts=["hello there", "how are you", "what now", "so"])
    report = run_checks(chat, UPLOAD.scaled(0.5), POLICY, "certify", original=original, repaired=True)
    return original, report


@pytest.mark.parametrize(("missing", "samples"), [(Capability.LOSS, SAMPLES), (Capability.DRIFT, ())])
def test_utility_that_cannot_be_measured_is_skipped_with_the_reason(
    missing: Capability, samples: tuple[Sample, ...]
) -> None:
    """Samples are not replaced by drift, nor drift by nothing; the release does not pass."""
    original, report = measured(without(missing), samples)
    assert original == Original()
    found = report.check("utility")
    assert found.outcome is CheckOutcome.SKIPPED
    assert found.reason.endswith(f"{missing.value}: {WHY}")
    assert report.outcome is not CheckOutcome.PASS
    assert report.suite["unable"][missing.value] == WHY
    _, able = measured(chat_of(Character()), samples)
    assert able.check("utility").outcome not in {CheckOutcome.SKIPPED, CheckOutcome.INFORMATIVE}


def test_the_measure_that_is_there_is_taken() -> None:
    """Samples need no drift."""
    _, report = measured(without(Capability.DRIFT), SAMPLES)
    assert report.check("utility").details["measure"] == "share of gain kept"


def test_a_margin_that_cannot_be_measured_says_why() -> None:
    """It decides nothing, so nothing else changes."""
    report = run_checks(without(Capability.MARGIN), None, POLICY, "certify")
    able = run_checks(chat_of(Character()), None, POLICY, "certify")
    assert (report.check("margin").n, report.check("margin").reason) == (0, f"not measured: {WHY}")
    assert able.check("margin").n == POLICY.suite.certify.margin
    assert report.outcome is able.outcome is CheckOutcome.PASS


@pytest.fixture
def reference(tmp_path: Path) -> Any:
    folder = write_checkpoint(tmp_path / "aligned", weights(SHAPES))
    return lambda chat: Reference(aligned=Checkpoint.open(folder), base=None, chat=chat)


def planned(chat: ToyChat, reference: Any, work: Path, *, samples: tuple[Sample, ...] = SAMPLES) -> Any:
    policy = policy_of("scale", strength=[0.97, 0.85])
    return plan(UPLOAD, reference=reference(chat), policy=policy, work_dir=work, samples=samples)


def test_the_planner_chooses_without_a_proxy_and_releases_the_same(reference: Any, tmp_path: Path) -> None:
    """Log-odds only save prompts; adapters that cannot be mixed only cost time."""
    wanted = planned(chat_of(Character()), reference, tmp_path / "able")
    for one in (Capability.MARGIN, Capability.MIXED):
        found = planned(without(one), reference, tmp_path / one.value)
        assert found.verdict is wanted.verdict is Verdict.RELEASED_REPAIRED
        assert found.winner.wish == wanted.winner.wish
        assert (found.winner.proxy is None) == (one is Capability.MARGIN)


def test_adapters_that_cannot_be_mixed_are_put_on_one_by_one(reference: Any, tmp_path: Path) -> None:
    """While candidates are weighed; several at hand would only cost memory."""
    at_once: list[int] = []

    class Watched(ToyChat):
        def margin(self, prompts: Any, *, arms: Any = None) -> list[float]:
            at_once.append(len(set(arms or [0])))
            return super().margin(prompts, arms=arms)

    for missing, most in (({}, 2), ({Capability.MIXED: WHY}, 1)):
        scripted = chat_of(Character())
        chat = Watched(script=scripted.script, losses=scripted.losses, drifts=scripted.drifts, missing=missing)
        at_once.clear()
        policy = policy_of()
        wishes = [Candidate(method="scale", parameters={"strength": one}) for one in (0.8, 0.5)]
        work = tmp_path / str(most)
        plan(UPLOAD, reference=reference(chat), policy=policy, work_dir=work, samples=SAMPLES, candidates=wishes)
        # Before that, the aligned model on each half, and then both ends at once: the upload and the aligned model.
        assert at_once[:3] == [1, 1, 2]
        assert max(at_once[3:]) == most


def test_without_losses_nothing_is_released_as_useful(reference: Any, tmp_path: Path) -> None:
    """Each candidate is screened out with the reason."""
    found = planned(without(Capability.LOSS), reference, tmp_path / "work")
    assert found.verdict is Verdict.QUARANTINED
    assert all(WHY in one.lost for one in found.candidates)


def test_methods_that_need_the_model_itself_are_not_given_what_only_talks(reference: Any, tmp_path: Path) -> None:
    """They say what is missing, as for any reference without a model; nothing is trained on a script."""
    policy, work = policy_of("refusal_tune", steps=[0]), tmp_path / "work"
    found = plan(UPLOAD, reference=reference(without()), policy=policy, work_dir=work, samples=SAMPLES)
    assert found.candidates[0].lost.startswith("cannot be built: chat")
    assert found.verdict is Verdict.QUARANTINED
    wishes = [Candidate(method="refusal_tune", parameters={"steps": 0})]
    with pytest.raises(MissingReference):
        plan(
            UPLOAD, reference=reference(without()), policy=policy, work_dir=work, samples=SAMPLES, candidates=wishes
        )  # fmt: skip


def test_reasons_are_told_by_name() -> None:
    """Whatever is not named, it can."""
    none = Capabilities()
    assert all(none.has(one) for one in Capability)
    some = Capabilities(missing={Capability.DRIFT: WHY})
    assert [one for one in Capability if not some.has(one)] == [Capability.DRIFT]
    assert some.as_dict() == {"drift": WHY}


def test_an_anchor_of_another_backend_is_refused() -> None:
    """Its numbers would be compared with nothing."""
    with pytest.raises(TypeError):
        chat_of(Character()).drift(Anchor(pairs=(), log_probs=()))
