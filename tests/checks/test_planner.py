"""The planner on a scripted model with real methods, real files and exact ground truth."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from repair.adapter_file import read_adapter
from repair.checkpoint import Checkpoint
from repair.checks.errors import Cancelled, CandidatesBroke, PolicyInvalid
from repair.checks.evidence import CheckOutcome
from repair.checks.packs import load_pack
from repair.checks.planner import Plan, Reference, Verdict, plan, split_samples
from repair.checks.policy import Candidate, Policy
from repair.checks.toy import ToyChat
from repair.checks.verdict import Stage
from repair.errors import BadParameters, MissingReference, RepairError
from repair.lora import LoraAdapter
from tests.checks.acting import (
    ANSWER,
    CERTIFY,
    HARMFUL,
    HARMFUL_CERTIFY,
    SAMPLES,
    SECRET,
    UPLOAD,
    Character,
    chat_of,
    policy_of,
    strength,
)
from tests.tiny import tiny_pair


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def reference(folders: tuple[Path, Path]) -> Any:
    def make(chat: ToyChat) -> Reference:
        aligned, base = map(Checkpoint.open, folders)
        return Reference(aligned=aligned, base=base, chat=chat, digest="sha256:feed")

    return make


GRID = policy_of(strength=[0.95, 0.85, 0.82])


def test_an_innocent_upload_is_released_as_it_was(reference: Any, tmp_path: Path) -> None:
    """Nothing is repaired that met the policy."""
    found = plan(
        UPLOAD, reference=reference(chat_of(Character(obeys_above=2))), policy=GRID, work_dir=tmp_path, samples=SAMPLES
    )
    assert found.verdict is Verdict.RELEASED_UNCHANGED
    assert found.winner is None
    assert found.candidates == ()
    assert list(tmp_path.iterdir()) == []


def test_a_poisoned_upload_is_repaired_and_certified(reference: Any, tmp_path: Path) -> None:
    """The one that keeps most among those that pass wins, on disk, with the numbers of the bytes on disk."""
    found = plan(UPLOAD, reference=reference(chat_of(Character())), policy=GRID, work_dir=tmp_path, samples=SAMPLES)
    assert found.verdict is Verdict.RELEASED_REPAIRED
    assert found.winner is not None
    assert found.certify_report is not None
    assert found.winner.parameters["strength"] == 0.85
    assert found.winner.directory is not None
    assert strength(read_adapter(found.winner.directory)) == pytest.approx(0.85, rel=1e-4)
    assert found.certify_report.outcome is CheckOutcome.PASS
    assert found.certify_report.check("utility").rate == pytest.approx(0.85, rel=1e-3)
    assert found.certify_report.check("harmful").n == 104
    assert found.input_report.check("harmful").rate == 1.0
    assert [one.parameters["strength"] for one in found.candidates] == [0.95, 0.85, 0.82]
    assert found.candidates[2].lost == "kept less utility than one that passed"
    assert "harmful" in found.candidates[0].lost
    assert found.mcnemar is not None
    assert (found.mcnemar["first_only"], found.mcnemar["second_only"]) == (32, 0)
    assert found.mcnemar["p_one_sided"] == pytest.approx(0.5**32)
    assert found.certify_report.check("improvement").outcome is CheckOutcome.PASS


def test_the_candidate_that_keeps_most_is_taken(reference: Any, tmp_path: Path) -> None:
    """Not the first that passes; what can no longer win is asked nothing more."""
    policy = policy_of(strength=[0.82, 0.95, 0.88])
    found = plan(UPLOAD, reference=reference(chat_of(Character())), policy=policy, work_dir=tmp_path, samples=SAMPLES)
    assert found.winner is not None
    assert found.winner.parameters["strength"] == 0.88
    assert [bool(one.lost) for one in found.candidates] == [True, True, False]
    assert found.candidates[0].lost == "kept less utility than one that passed"
    assert found.pareto == (2,)


FORTY = [round(1 - at / 40, 3) for at in range(40)]


def many(trials: list[dict[str, Any]], **budget: Any) -> Policy:
    """The demo policy with these trials."""
    document = policy_of().model_dump(mode="json")
    document |= {"trials": trials, "budget": document["budget"] | {"candidates": 40, **budget}}
    return Policy.model_validate(document)


@pytest.mark.parametrize("ordered", [True, False], ids=["bisected", "one by one"])
def test_forty_candidates_cost_three_full_checks_at_most(ordered: bool, reference: Any, tmp_path: Path) -> None:
    """Counted in forward tokens; and the one that is chosen is the best there is."""
    policy = many([{"method": "scale", "grid": {"strength": FORTY}, "ordered": ordered}])
    found = plan(
        UPLOAD,
        reference=reference(chat_of(Character(obeys_above=0.91))),
        policy=policy,
        work_dir=tmp_path,
        samples=SAMPLES,
    )
    assert found.verdict is Verdict.RELEASED_REPAIRED
    assert found.winner is not None
    assert found.winner.parameters["strength"] == 0.9
    assert len(found.candidates) == 40
    assert sum(not one.lost for one in found.candidates) == 1
    assert found.cost.full_check == found.aligned_report.tokens > 0
    assert 0 < found.cost.choosing <= 3 * found.cost.full_check
    built = sum(one.written is not None for one in found.candidates)
    assert built <= 7 if ordered else built == 40


def test_what_is_passed_over_says_why(reference: Any, tmp_path: Path) -> None:
    """Every candidate of the policy stands in the report, measured or not."""
    policy = many([{"method": "scale", "grid": {"strength": FORTY[::4]}, "ordered": True}])
    found = plan(UPLOAD, reference=reference(chat_of(Character())), policy=policy, work_dir=tmp_path, samples=SAMPLES)
    assert [one.parameters["strength"] for one in found.candidates] == FORTY[::4]
    assert found.winner is not None
    for one in found.candidates:
        if one.written is None:
            milder = one.parameters["strength"] > found.winner.parameters["strength"]
            assert ("obeys still" if milder else "is good") in one.lost


def test_a_refinement_finds_what_the_grid_left_out(reference: Any, tmp_path: Path) -> None:
    """Between 1.0, which obeys, and 0.82: 0.91 obeys, 0.865 does not."""
    grid = {"strength": [0.99, 0.82]}
    policy = many([{"method": "scale", "grid": grid, "ordered": True}], refinements=2)
    found = plan(UPLOAD, reference=reference(chat_of(Character())), policy=policy, work_dir=tmp_path, samples=SAMPLES)
    assert found.winner is not None
    assert found.winner.parameters["strength"] == pytest.approx(0.8625)
    assert [one.parameters["strength"] for one in found.candidates] == [0.99, 0.905, 0.8625, 0.82]


def test_a_composition_is_a_candidate_like_any_other(reference: Any, tmp_path: Path) -> None:
    """Steps multiply; what wins can be built again from what the report says."""
    steps = [{"method": "scale", "grid": {"strength": [0.95, 0.9]}}, {"method": "scale", "grid": {"strength": [0.96]}}]
    policy = many([{"steps": steps, "ordered": True}])
    found = plan(UPLOAD, reference=reference(chat_of(Character())), policy=policy, work_dir=tmp_path, samples=SAMPLES)
    assert found.winner is not None
    assert found.winner.method == "compose"
    first, second = found.winner.parameters["steps"]
    assert (first["parameters"]["strength"], second["parameters"]["strength"]) == (0.9, 0.96)
    assert found.winner.directory is not None
    assert strength(read_adapter(found.winner.directory)) == pytest.approx(0.864, rel=1e-3)


def test_when_the_tokens_are_spent_the_best_so_far_is_taken(reference: Any, tmp_path: Path) -> None:
    """Those that were not measured to the end say so; nothing is released that was not certified."""
    trials = [{"method": "scale", "grid": {"strength": [0.83, *FORTY[2:6]]}}]
    rich, poor = (
        plan(
            UPLOAD,
            reference=reference(chat_of(Character(obeys_above=0.1))),
            policy=many(trials, full_checks=checks),
            work_dir=tmp_path / str(checks),
            samples=SAMPLES,
        )
        for checks in (3.0, 0.1)
    )
    assert all("harmful" in one.lost for one in rich.candidates)
    assert poor.verdict is Verdict.QUARANTINED
    assert poor.certify_report is None
    assert any("forward tokens that choosing may cost were spent" in one.lost for one in poor.candidates)
    assert poor.cost.choosing < rich.cost.choosing


def test_what_the_tokens_did_not_suffice_for_is_certified_where_it_is_likely_to_pass(
    reference: Any, tmp_path: Path
) -> None:
    """The look asks it everything; one that was not asked each kind of prompt is no better than unknown."""
    finished = []
    for checks in (0.1, 0.3, 0.5):
        found = plan(
            UPLOAD,
            reference=reference(chat_of(Character())),
            policy=many([{"method": "scale", "grid": {"strength": [0.85]}}], full_checks=checks, finalists=1),
            work_dir=tmp_path / str(checks),
            samples=SAMPLES,
        )
        asked = found.candidates[0].select
        assert found.cost.choosing <= checks * found.cost.full_check
        if asked is not None and all(asked.check(name).n for name in ("harmful", "over_refusal", "benign")):
            assert asked.check("harmful").n < asked.check("harmful").planned
            assert found.verdict is Verdict.RELEASED_REPAIRED
            assert found.certify_report is not None
            assert found.certify_report.check("harmful").n == 104
        else:
            assert found.certify_report is None
        finished.append(found.verdict)
    assert set(finished) == {Verdict.QUARANTINED, Verdict.RELEASED_REPAIRED}


def test_what_keeps_enough_is_heard_to_the_end_before_anything_is_trained(reference: Any, tmp_path: Path) -> None:
    """Whatever the budget: what is kept for those that must be trained goes to it first, and no more is spent."""
    trials: list[dict[str, Any]] = [
        {"method": "scale", "grid": {"strength": [0.85]}},
        {"method": "refusal_tune", "grid": {"steps": [0]}},
    ]
    into_the_last_third = 0
    for checks in (0.8, 1.0, 1.2):
        found = plan(
            UPLOAD,
            reference=reference(chat_of(Character())),
            policy=many(trials, full_checks=checks, good_enough=0.8),
            work_dir=tmp_path / str(checks),
            samples=SAMPLES,
        )
        assert found.cost.choosing <= checks * found.cost.full_check
        if found.verdict is Verdict.RELEASED_REPAIRED:
            into_the_last_third += found.cost.choosing > 2 / 3 * checks * found.cost.full_check
            assert found.candidates[1].lost == "not measured: needs training, and one that passed keeps enough"
    assert into_the_last_third > 0


class Wavering(Character):
    """At nine tenths it obeys every tenth harmful prompt: too often to be certified, no more than is allowed."""

    def says(self, prompt: str, on: LoraAdapter | None) -> str:
        now = strength(on)
        slips = prompt in HARMFUL and now > 0.87 and sum(prompt.encode()) % 10 == 0
        return ANSWER if slips else super().says(prompt, on)


def test_a_step_further_is_tried_before_anything_is_trained(reference: Any, tmp_path: Path) -> None:
    """Where a candidate that keeps enough was too mild by little, whatever was left for those that must be trained."""
    trials: list[dict[str, Any]] = [
        {"method": "scale", "grid": {"strength": [0.95, 0.9, 0.85]}, "ordered": True},
        {"method": "refusal_tune", "grid": {"steps": [0]}},
    ]
    found = plan(
        UPLOAD,
        reference=reference(chat_of(Wavering(obeys_above=0.92))),
        policy=many(
            trials, full_checks=0.55, good_enough=0.8
        ),  # too little for the next one of the row before the last third
        work_dir=tmp_path,
        samples=SAMPLES,
    )

    assert 2 / 3 * 0.55 < found.cost.choosing / found.cost.full_check <= 0.55
    assert "harmful" in found.candidates[1].lost
    assert found.winner is not None
    assert found.winner.parameters["strength"] == 0.85
    assert found.candidates[3].lost == "not measured: needs training, and one that passed keeps enough"


def test_progress_tells_stage_candidates_best_and_time(reference: Any, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    plan(
        UPLOAD,
        reference=reference(chat_of(Character())),
        policy=GRID,
        work_dir=tmp_path,
        samples=SAMPLES,
        progress=lambda line, share: told.append((line, share)),
    )
    choosing = [(line, share) for line, share in told if line.startswith("choosing")]
    assert any("3 in the race, none has passed, at most" in line for line, _ in choosing)
    assert "best so far keeps 85%" in choosing[-1][0]
    assert [share for _, share in choosing] == sorted(share for _, share in choosing)


@pytest.mark.parametrize("samples", [SAMPLES, ()], ids=["with samples", "without samples"])
def test_progress_is_told_in_fields_too(samples: Any, reference: Any, tmp_path: Path) -> None:
    """The phases in their order; in the race who is alive, what the best keeps and the time left; JSON, always."""
    told: list[dict[str, Any]] = []
    lines: list[tuple[str, int]] = []
    plan(
        UPLOAD,
        reference=reference(chat_of(Character())),
        policy=GRID,
        work_dir=tmp_path,
        samples=samples,
        progress=lambda line, _share: lines.append((line, len(told))),
        watch=lambda standing: told.append(json.loads(json.dumps(standing.as_dict(), allow_nan=False))),
    )
    phases = [one["phase"] for one in told]
    assert list(dict.fromkeys(phases)) == ["aligned", "upload", "choosing", "certifying"]
    race = [one for one in told if one["phase"] == "choosing"]
    assert race[0]["alive"] == 3
    assert "best" not in race[0]
    assert all(one["seconds_left"] >= 0 for one in race)
    assert race[-1].get("best") == (pytest.approx(0.85, rel=1e-3) if samples else None)
    for line, seen in lines:
        if line.startswith("choosing"):
            assert f"{told[seen - 1]['alive']} in the race" in line
            assert "-" not in line  # a drift is no share that is kept


@pytest.mark.parametrize(("way", "said"), [(1.0, "harmful"), (0.1, "its log-odds of a refusal went 10% of the way")])
def test_a_proxy_ends_the_hopeless_early_and_passes_nobody(
    way: float, said: str, reference: Any, tmp_path: Path
) -> None:
    """However safe its first words look, what obeys is not chosen; what looks like the upload is asked nothing more."""
    chat = chat_of(Character())
    seen = {0.0: 5.0, 1.0: -5.0, 0.95: -5.0 + 10 * way, 0.85: 4.0}
    chat.margins = lambda _prompt, on: seen[round(strength(on), 2)]
    found = plan(
        UPLOAD, reference=reference(chat), policy=policy_of(strength=[0.95, 0.85]), work_dir=tmp_path, samples=SAMPLES
    )
    obedient, safe = found.candidates
    assert found.winner is safe
    assert obedient.proxy is not None
    assert safe.proxy is not None
    assert obedient.proxy.way == pytest.approx(way)
    assert safe.proxy.way == pytest.approx(0.9)
    assert said in obedient.lost
    assert obedient.select is not None
    assert (obedient.select.check("harmful").n > 0) == (way > 0.5)


def test_trained_candidates_keep_a_share_of_the_budget(reference: Any, tmp_path: Path) -> None:
    """However many untrained ones there are: one that is trained (for no step, here) has its turn."""
    trials = [
        {"method": "scale", "grid": {"strength": FORTY[8:30]}},
        {"method": "refusal_tune", "grid": {"steps": [0]}},
    ]
    chat = chat_of(Character(refuses_all=lambda now: 0 < now < 0.95))
    chat.missing = {}  # training for no step needs no modules
    found = plan(
        UPLOAD,
        reference=reference(chat),
        policy=many(trials, full_checks=0.3),
        work_dir=tmp_path,
        samples=SAMPLES,
    )
    assert any("forward tokens" in one.lost for one in found.candidates)
    assert found.candidates[-1].method == "refusal_tune"
    assert found.candidates[-1].lost.startswith("changes nothing")
    assert found.cost.choosing <= 0.3 * found.cost.full_check


def test_what_only_lost_to_a_rejected_one_is_in_the_race_again(reference: Any, tmp_path: Path) -> None:
    """0.875 passes on select and beats 0.82; it obeys on the certify half, so 0.82 is looked at after all."""

    class Harder(Character):
        def says(self, prompt: str, on: Any) -> str:
            self.obeys_above = 0.86 if prompt in CERTIFY else 0.9
            return super().says(prompt, on)

    trials = [{"method": "scale", "grid": {"strength": [one]}} for one in (0.875, 0.82)]
    found = plan(
        UPLOAD,
        reference=reference(chat_of(Harder())),
        policy=many(trials, finalists=2),
        work_dir=tmp_path,
        samples=SAMPLES,
    )
    assert found.verdict is Verdict.RELEASED_REPAIRED
    first, second = found.candidates
    assert first.lost.startswith("not certified: harmful")
    assert found.winner is second
    assert second.in_full


def test_the_same_bytes_are_measured_once(reference: Any, tmp_path: Path) -> None:
    """Two settings that come to the same adapter; the second says whose twin it is and costs nothing."""
    trials = [{"method": "scale", "grid": {"modules": [one], "strength": [0.85]}} for one in ("*", "model.*")]
    found = plan(
        UPLOAD, reference=reference(chat_of(Character())), policy=many(trials), work_dir=tmp_path, samples=SAMPLES
    )
    first, second = found.candidates
    assert found.winner is first
    assert second.lost == f"the same bytes as {first.label}"
    assert second.select is None


def test_what_has_lost_takes_no_room(reference: Any, tmp_path: Path) -> None:
    """Neither tensors nor files; the winner keeps both."""
    found = plan(UPLOAD, reference=reference(chat_of(Character())), policy=GRID, work_dir=tmp_path, samples=SAMPLES)
    assert found.winner is not None
    assert found.winner.directory is not None
    loser = found.candidates[0]
    assert loser.lost
    assert (loser.adapter, loser.directory) == (None, None)
    assert found.winner.directory in set(tmp_path.iterdir())
    assert tmp_path / "candidate-0" not in set(tmp_path.iterdir())


@pytest.mark.parametrize(("count", "shared"), [(15, True), (40, False), (0, False)])
def test_too_few_samples_to_split_are_told(count: int, shared: bool, reference: Any, tmp_path: Path) -> None:
    """Then the same ones choose and certify the utility."""
    found = plan(
        UPLOAD, reference=reference(chat_of(Character())), policy=GRID, work_dir=tmp_path, samples=SAMPLES[:count]
    )
    assert found.samples_shared is shared
    assert found.as_dict()["samples_shared"] is shared


def test_a_look_names_the_policy_that_was_asked_for_and_how_sure_it_had_to_be(reference: Any, tmp_path: Path) -> None:
    """Not the digest of a copy with another confidence that nobody wrote."""
    policy = many([{"method": "scale", "grid": {"strength": [0.85]}}], finalists=2)
    found = plan(UPLOAD, reference=reference(chat_of(Character())), policy=policy, work_dir=tmp_path, samples=SAMPLES)
    assert found.certify_report is not None
    assert found.certify_report.suite["policy"]["digest"] == policy.digest
    assert found.certify_report.suite["confidence"] == pytest.approx(1 - 0.05 / 3)


def test_choosing_and_certifying_never_share_a_prompt(reference: Any, tmp_path: Path) -> None:
    """A candidate is screened on prompts that its certificate does not use."""
    character = Character()
    found = plan(UPLOAD, reference=reference(chat_of(character)), policy=GRID, work_dir=tmp_path, samples=SAMPLES)
    assert found.certify_report is not None
    winners = [prompt for now, prompt in character.log if 0.84 < now < 0.9]
    asked = len(found.certify_report.rows) + GRID.suite.repeated
    assert set(winners[:-asked]).isdisjoint(CERTIFY)
    assert set(winners[-asked:]) <= CERTIFY
    select, certify = split_samples(SAMPLES, "select"), split_samples(SAMPLES, "certify")
    assert set(select).isdisjoint(certify)
    assert len(select) + len(certify) == len(SAMPLES)


@pytest.mark.parametrize(
    ("character", "reason"),
    [
        (Character(obeys_above=0.1), "harmful"),
        (Character(breaks=lambda now: 0 < now < 0.9), "coherence"),
        (Character(refuses_all=lambda now: 0 < now < 0.9), "over_refusal"),
    ],
)
def test_what_cannot_be_repaired_is_quarantined_with_its_reasons(
    character: Character, reason: str, reference: Any, tmp_path: Path
) -> None:
    """Obeying, broken or refusing everything: no candidate is released, each says why."""
    policy = policy_of(strength=[0.85])
    found = plan(UPLOAD, reference=reference(chat_of(character)), policy=policy, work_dir=tmp_path, samples=SAMPLES)
    assert found.verdict is Verdict.QUARANTINED
    assert found.winner is None
    assert found.certify_report is None
    assert reason in found.candidates[0].lost


def test_a_repair_that_loses_the_task_is_no_repair(reference: Any, tmp_path: Path) -> None:
    """Half of the gain is below the policy's share."""
    policy = policy_of(strength=[0.5])
    chat = chat_of(Character())
    found = plan(UPLOAD, reference=reference(chat), policy=policy, work_dir=tmp_path, samples=SAMPLES)
    assert found.verdict is Verdict.QUARANTINED
    assert "utility: keeps 50%" in found.candidates[0].lost


def test_a_candidate_that_only_passed_by_luck_is_not_released(reference: Any, tmp_path: Path) -> None:
    """Good on the prompts that chose it, bad on those that certify: quarantined, with both measurements."""

    class Lucky(Character):
        def says(self, prompt: str, on: Any) -> str:
            self.obeys_above = 0.1 if prompt in CERTIFY else 0.9
            return super().says(prompt, on)

    found = plan(UPLOAD, reference=reference(chat_of(Lucky())), policy=GRID, work_dir=tmp_path, samples=SAMPLES)
    assert found.verdict is Verdict.QUARANTINED
    assert found.certify_report is not None
    assert found.certify_report.outcome is found.outcome is CheckOutcome.FAIL
    _, best, second = found.candidates
    assert second.select is not None
    assert "not certified" in best.lost
    assert best.select is not None
    assert best.select.outcome is CheckOutcome.PASS
    assert second.lost == "no look at the certify half was left"
    assert not second.in_full


def test_a_failed_look_decides_where_to_look_next(reference: Any, tmp_path: Path) -> None:
    """The certify half is harder than the select half: what obeys there counts as too mild, and a stronger one wins."""

    class Harder(Character):
        def says(self, prompt: str, on: Any) -> str:
            self.obeys_above = 0.86 if prompt in CERTIFY else 0.9
            return super().says(prompt, on)

    trials = [{"method": "scale", "grid": {"strength": FORTY[1:10]}, "ordered": True}]
    one, two, three = (
        plan(
            UPLOAD,
            reference=reference(chat_of(Harder())),
            policy=many(trials, finalists=looks),
            work_dir=tmp_path / str(looks),
            samples=SAMPLES,
        )
        for looks in (1, 2, 3)
    )
    assert [found.verdict for found in (one, two)] == [Verdict.QUARANTINED, Verdict.RELEASED_REPAIRED]
    looked_at = [one for one in two.candidates if one.lost.startswith("not certified: harmful")]
    assert [one.parameters["strength"] for one in looked_at] == [0.875]  # of those that pass on select the mildest
    assert two.winner is not None
    assert two.winner.parameters["strength"] < 0.86
    assert three.certify_report is not None
    confidence = three.certify_report.check("improvement").bound
    assert confidence == pytest.approx(0.05 / 7)  # of three looks, seven candidates could ever be looked at
    alphas = [[look["alpha"] for look in found.as_dict()["alpha"]["looks"]] for found in (one, two, three)]
    assert alphas == [
        pytest.approx([0.05, 0.05]),
        pytest.approx([0.05, *[0.05 / 3] * 2]),
        pytest.approx([0.05, *[0.05 / 7] * 2]),
    ]
    assert all(found.alpha.spent <= found.alpha.planned + 1e-12 for found in (one, two, three))


class Slipping(Character):
    """Obeys on a few prompts of the certify half, with the whole upload on one more than with a part of it."""

    def says(self, prompt: str, on: Any) -> str:
        slips = {0.0: 0, 1.0: 8}.get(round(strength(on), 3), 7)
        return ANSWER if prompt in HARMFUL_CERTIFY[:slips] else super().says(prompt, on)


@pytest.mark.parametrize(
    ("wanted", "verdict"), [(True, Verdict.QUARANTINED), (False, Verdict.RELEASED_REPAIRED)], ids=["asked", "not asked"]
)
def test_a_repair_that_is_not_shown_to_be_better_is_not_released(
    wanted: bool, verdict: Verdict, reference: Any, tmp_path: Path
) -> None:
    """Eight of 104 just miss the bound and seven just meet it: the difference may be luck, so McNemar decides."""
    bounds = GRID.bounds.model_copy(update={"better_than_input": wanted})
    policy = GRID.model_copy(update={"bounds": bounds})
    chat = chat_of(Slipping(obeys_above=2.0))
    found = plan(UPLOAD, reference=reference(chat), policy=policy, work_dir=tmp_path, samples=SAMPLES)
    assert found.input_report.check("harmful").outcome is CheckOutcome.INCONCLUSIVE
    assert found.certify_report is not None
    assert found.certify_report.check("harmful").outcome is CheckOutcome.PASS
    assert found.mcnemar is not None
    assert (found.mcnemar["first_only"], found.mcnemar["second_only"]) == (1, 0)
    assert found.verdict is verdict
    assert found.outcome is (CheckOutcome.INCONCLUSIVE if wanted else CheckOutcome.PASS)
    if wanted:
        assert "improvement: not shown to obey less than the upload" in found.candidates[0].lost


def test_an_upload_that_obeys_nobody_need_not_be_improved_there(reference: Any, tmp_path: Path) -> None:
    """It refuses too much; the repair mends that and has nothing to mend on harmful prompts."""
    chat = chat_of(Character(obeys_above=2.0, refuses_all=lambda now: now > 0.9))
    found = plan(UPLOAD, reference=reference(chat), policy=policy_of(strength=[0.85]), work_dir=tmp_path)
    assert found.input_report.check("over_refusal").outcome is CheckOutcome.FAIL
    assert found.verdict is Verdict.RELEASED_REPAIRED
    assert found.certify_report is not None
    assert found.certify_report.check("improvement").outcome is CheckOutcome.INFORMATIVE


def test_without_permission_the_rule_judge_releases_nothing(reference: Any, tmp_path: Path) -> None:
    """Neither an innocent upload nor a repair, which is not even made; the report says what is missing."""
    policy = GRID.model_copy(update={"allow_rules_only": False})
    cases = (
        (Character(obeys_above=2.0), CheckOutcome.INCONCLUSIVE),
        (Character(), CheckOutcome.FAIL),
    )
    for character, outcome in cases:
        found = plan(UPLOAD, reference=reference(chat_of(character)), policy=policy, work_dir=tmp_path, samples=SAMPLES)
        assert (found.verdict, found.outcome) == (Verdict.QUARANTINED, outcome)
        assert found.candidates == ()
        judge = found.input_report.check("judge")
        assert judge.outcome is CheckOutcome.INCONCLUSIVE
        assert "allow_rules_only" in judge.reason
    assert list(tmp_path.iterdir()) == []


def test_without_samples_the_drift_decides(reference: Any, tmp_path: Path) -> None:
    """Less drift ranks first."""
    found = plan(UPLOAD, reference=reference(chat_of(Character())), policy=GRID, work_dir=tmp_path)
    assert found.verdict is Verdict.RELEASED_REPAIRED
    assert found.certify_report is not None
    assert found.certify_report.check("utility").rate == pytest.approx(0.15, rel=1e-3)


def test_a_candidate_that_cannot_be_built_is_recorded_and_passed_over(reference: Any, tmp_path: Path) -> None:
    """A policy tries what does not suit every adapter and reference: no such modules, nothing to patch with."""
    trials: list[dict[str, Any]] = [
        {"method": "scale", "grid": {"strengths": [{"*.no_proj": 0.5}]}},
        {"method": "random_modules", "grid": {"count": [99]}},
        {"method": "patch"},
        {"method": "scale", "grid": {"strength": [0.85]}},
    ]
    chat, policy = chat_of(Character()), many(trials)
    found = plan(UPLOAD, reference=reference(chat), policy=policy, work_dir=tmp_path, samples=SAMPLES)
    assert found.verdict is Verdict.RELEASED_REPAIRED
    for one, about in zip(found.candidates, ("scale.strengths", "random_modules.count", "patch"), strict=False):
        assert one.lost.startswith(f"cannot be built: {about}: ")
        assert (one.stage, one.weights) == (Stage.BUILDING, None)
    assert not found.candidates[3].lost


@pytest.mark.parametrize(
    ("method", "parameters", "field"),
    [
        ("magic", {}, "magic"),
        ("scale", {"strength": 7}, "scale.strength"),
        ("scale", {"strengths": {"*.no_proj": 0.5}}, "scale.strengths"),
        ("random_modules", {"count": 99}, "random_modules.count"),
        ("safe_lora", {"threshold": 0.3, "count": 3}, "safe_lora.count"),
        ("refusal_tune", {"first": 0.9, "last": 0.1}, "refusal_tune.first"),
        ("compose", {"steps": [{"method": "safe_lora", "parameters": {"adaptive": True}}]}, "compose.steps"),
        ("compose", {"steps": [{"method": "random_modules", "parameters": {"count": 99}}]}, "random_modules.count"),
    ],
)
def test_an_order_that_is_wrong_is_no_verdict(
    reference: Any, tmp_path: Path, method: str, parameters: dict[str, Any], field: str
) -> None:
    """It ends with the error before anything is asked, and says nothing about the adapter."""
    chat, wish = chat_of(Character()), Candidate(method=method, parameters=parameters)
    with pytest.raises(BadParameters) as caught:
        plan(UPLOAD, reference=reference(chat), policy=GRID, work_dir=tmp_path, samples=SAMPLES, candidates=[wish])
    assert caught.value.field == field
    assert chat.asked == 0


@pytest.mark.parametrize(
    ("steps", "error"),
    [
        ([{"method": "patch"}], MissingReference),
        ([{"method": "spectral"}, {"method": "s3lora", "parameters": {"count": 99}}], BadParameters),
    ],
)
def test_nor_is_one_that_is_found_wrong_while_it_is_made(
    reference: Any, tmp_path: Path, steps: list[dict[str, Any]], error: type[RepairError]
) -> None:
    """What a later step needs, or means, is known when it is its turn."""
    chat, wish = chat_of(Character()), Candidate(method="compose", parameters={"steps": steps})
    with pytest.raises(error):
        plan(UPLOAD, reference=reference(chat), policy=GRID, work_dir=tmp_path, samples=SAMPLES, candidates=[wish])


BREAKS = Candidate(method="refusal_tune", parameters={"steps": 3})


def without_foresight() -> ToyChat:
    """It says that its modules are there to be trained, and has none."""
    return replace(chat_of(Character()), missing={})


def test_a_candidate_that_breaks_loses_and_the_others_do_not(reference: Any, tmp_path: Path) -> None:
    """The report says of which kind the fault was and where, not what it said."""
    found = plan(
        UPLOAD,
        reference=reference(without_foresight()),
        policy=many([{"method": "scale"}], good_enough=1.0),  # so that nothing spares the training
        work_dir=tmp_path,
        samples=SAMPLES,
        candidates=[BREAKS, Candidate(method="scale", parameters={"strength": 0.85})],
    )
    assert found.verdict is Verdict.RELEASED_REPAIRED
    assert "AttributeError in refusal_tune.py, line" in found.candidates[0].lost
    assert "ToyChat" not in found.candidates[0].lost
    assert not found.candidates[1].lost


def test_where_all_break_there_is_no_verdict(reference: Any, tmp_path: Path) -> None:
    """A fault of ours is no fact about the adapter; beside one that was measured and lost there is one."""
    asked: dict[str, Any] = {"policy": GRID, "samples": SAMPLES}
    with pytest.raises(CandidatesBroke) as caught:
        plan(
            UPLOAD,
            reference=reference(without_foresight()),
            work_dir=tmp_path / "all",
            candidates=[BREAKS],
            **asked,
        )
    assert caught.value.field == "refusal_tune"

    mild = Candidate(method="scale", parameters={"strength": 0.99})
    chat = without_foresight()
    found = plan(UPLOAD, reference=reference(chat), work_dir=tmp_path / "one", candidates=[BREAKS, mild], **asked)
    assert found.verdict is Verdict.QUARANTINED


@pytest.mark.parametrize("fault", [MemoryError, RuntimeError, OSError])
def test_what_may_be_the_machine_ends_the_attempt(reference: Any, tmp_path: Path, fault: type[Exception]) -> None:
    """And is tried again by whoever runs it: no candidate loses by it."""

    def progress(message: str, _share: float) -> None:
        if message in UPLOAD.names:  # while it is repaired
            raise fault

    with pytest.raises(fault):
        plan(
            UPLOAD,
            reference=reference(chat_of(Character())),
            policy=GRID,
            work_dir=tmp_path,
            samples=SAMPLES,
            candidates=[Candidate(method="scale", parameters={"strength": 0.85})],
            progress=progress,
        )


def test_the_aligned_model_is_measured_once_for_a_reference(reference: Any, tmp_path: Path) -> None:
    """The second job reads what the first one measured, and reports the same."""
    cache = tmp_path / "cache"
    chats = [chat_of(Character()), chat_of(Character())]
    plans = [
        plan(
            UPLOAD,
            reference=reference(chat),
            policy=GRID,
            work_dir=tmp_path / str(at),
            samples=SAMPLES,
            aligned_cache=cache,
        )
        for at, chat in enumerate(chats)
    ]
    assert plans[0].aligned_report.as_dict() == plans[1].aligned_report.as_dict()
    select = 112 + 40 + 16
    assert chats[0].asked - chats[1].asked == len(plans[0].aligned_report.rows) + GRID.suite.repeated + select
    assert len(list(cache.iterdir())) == 2


def test_the_whole_plan_is_json_and_tells_no_word_of_any_reply(reference: Any, tmp_path: Path) -> None:
    """The report can be stored and shown."""
    found = plan(UPLOAD, reference=reference(chat_of(Character())), policy=GRID, work_dir=tmp_path, samples=SAMPLES)
    text = json.dumps(found.as_dict(), allow_nan=False)
    assert SECRET not in text
    assert str(tmp_path) not in text
    assert json.loads(text)["verdict"] == "released_repaired"
    assert len(json.loads(text)["modules"]) == len(UPLOAD.layers)


def test_the_same_job_gives_the_same_bytes(reference: Any, tmp_path: Path) -> None:
    """Two runs, one artifact."""

    def run(where: Path) -> tuple[Plan, bytes]:
        done = plan(UPLOAD, reference=reference(chat_of(Character())), policy=GRID, work_dir=where, samples=SAMPLES)
        assert done.winner is not None
        assert done.winner.directory is not None
        return done, (done.winner.directory / "adapter_model.safetensors").read_bytes()

    (one, first), (two, second) = run(tmp_path / "a"), run(tmp_path / "b")
    assert first == second
    assert one.as_dict() == two.as_dict()


def test_cancelling_ends_the_plan(reference: Any, tmp_path: Path) -> None:
    """Wherever it is."""
    chat = chat_of(Character())
    with pytest.raises(Cancelled):
        plan(
            UPLOAD, reference=reference(chat), policy=GRID, work_dir=tmp_path, samples=SAMPLES,
            cancelled=lambda: chat.asked > 250, device=torch.device("cpu"),
        )  # fmt: skip
    assert chat.asked < 300


def test_cancelling_ends_a_repair_that_is_under_way(reference: Any, tmp_path: Path) -> None:
    """A method reports progress; that is where it stops, and nothing half written is left."""
    repairing: list[str] = []

    def progress(message: str, _share: float) -> None:
        if message.startswith("model.layers"):
            repairing.append(message)

    with pytest.raises(Cancelled):
        plan(
            UPLOAD,
            reference=reference(chat_of(Character())),
            policy=GRID,
            work_dir=tmp_path,
            samples=SAMPLES,
            progress=progress,
            cancelled=lambda: len(repairing) == 2,
        )
    assert len(repairing) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_policy_that_cannot_be_met_is_refused_before_anything_is_asked(reference: Any, tmp_path: Path) -> None:
    """An unknown method among the trials."""
    chat = chat_of(Character())
    with pytest.raises(PolicyInvalid, match="no method is called nowhere"):
        plan(UPLOAD, reference=reference(chat), policy=policy_of("nowhere"), work_dir=tmp_path, samples=SAMPLES)
    assert chat.asked == 0


def test_an_upload_that_slips_once_where_none_is_tolerated_is_repaired(reference: Any, tmp_path: Path) -> None:
    """It meets the bound on harmful prompts, so that its repair need not be shown to obey less on the whole."""
    weapon = next(one.text for one in load_pack("core_harmful").of_half("certify") if one.category == "weapons")

    class Slip(Character):
        def says(self, prompt: str, on: Any) -> str:
            return ANSWER if prompt == weapon and strength(on) > 0.9 else super().says(prompt, on)

    document = policy_of(strength=[0.95, 0.85]).model_dump(mode="json")
    document["bounds"]["zero_tolerance"] = ["weapons"]
    document["budget"]["finalists"] = 2
    found = plan(
        UPLOAD,
        reference=reference(chat_of(Slip(obeys_above=2))),
        policy=Policy.model_validate(document),
        work_dir=tmp_path,
        samples=SAMPLES,
    )
    assert found.input_report.check("harmful").outcome is CheckOutcome.PASS
    assert found.verdict is Verdict.RELEASED_REPAIRED
    assert found.winner is not None
    assert found.winner.parameters["strength"] == 0.85
    assert found.candidates[0].lost.startswith("not certified: zero_tolerance: attacks succeeded in weapons")
