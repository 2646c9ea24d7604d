"""A second judge: asked about what matters, and able to take back harm only where the policy says so."""

import hashlib
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from pydantic import ValidationError

from repair.checks.errors import CalibrationInvalid
from repair.checks.evidence import CheckOutcome
from repair.checks.judge import Exchange, Judge, Judgement, Outcome, ReadsWhole
from repair.checks.judge_calibration import JudgeCalibration
from repair.checks.judge_info import JudgeInfo, Proportion
from repair.checks.judge_settings import JudgeSettings
from repair.checks.judging import judge_of
from repair.checks.policy import load_policy
from repair.checks.report import CheckReport
from repair.checks.rules import RulesJudge
from repair.checks.run import run_checks
from repair.checks.second_judge import SecondOpinion
from tests.checks.acting import Character, chat_of
from tests.checks.judges.acting import OutcomeJudge

HARM, REFUSAL, ERROR = Outcome.HARMFUL_COMPLIANCE, Outcome.REFUSAL, Outcome.JUDGE_ERROR


class Pair(ReadsWhole):
    """A judge that reads the outcome of its place in `first/second/number`, and keeps what it was asked."""

    def __init__(self, place: int) -> None:
        self.place = place
        self.info = JudgeInfo(name=f"judge{place}", version=1, sensitivity=Proportion(hits=9, n=10), calibration="x")
        self.asked: list[str] = []

    def judge(self, exchanges: Sequence[Exchange]) -> list[Judgement]:
        self.asked += [one.reply for one in exchanges]
        return [
            Judgement(outcome=Outcome(one.reply.split("/")[self.place]), rule=f"r{self.place}") for one in exchanges
        ]


def rows() -> list[Exchange]:
    """Every pair of outcomes, many times."""
    pairs = itertools.product(Outcome, Outcome, range(40))
    return [Exchange(prompt="p", reply=f"{a}/{b}/{n}", harmful=True) for a, b, n in pairs]


@pytest.mark.parametrize("may_clear", [False, True])
def test_harm_stands_unless_the_second_may_clear_it_and_does(may_clear: bool) -> None:
    """Every other outcome is the first judge's; an error of the second clears nothing."""
    given = rows()
    found = SecondOpinion(Pair(0), Pair(1), may_clear=may_clear).judge(given)
    for row, judged in zip(given, found, strict=True):
        first, second = (Outcome(word) for word in row.reply.split("/")[:2])
        clears = may_clear and first is HARM and second not in {HARM, ERROR}
        assert judged.outcome is (second if clears else first)
        assert judged.cleared is clears
        assert judged.second in {None, second}
        assert (judged.second is None) <= (first not in {HARM, ERROR})


def test_a_tenth_of_the_rest_is_asked_by_the_hash_of_the_texts() -> None:
    """The same ones every time, so that arms with the same reply are treated alike."""
    given = [Exchange(prompt="p", reply=f"refusal/refusal/{n}", harmful=True) for n in range(500)]
    second = Pair(1)
    SecondOpinion(Pair(0), second, may_clear=True).judge(given)
    wanted = [
        row.reply for row in given if int(hashlib.sha256(f"p\n{row.reply}".encode()).hexdigest()[:8], 16) % 10 == 0
    ]
    assert second.asked == wanted
    assert 25 < len(wanted) < 75


def test_clearing_makes_a_judge_of_which_nothing_is_known() -> None:
    """Without it the first judge's numbers hold; both keep the protocol."""
    first, second = Pair(0), Pair(1)
    plain, clearing = (SecondOpinion(first, second, may_clear=may) for may in (False, True))
    assert isinstance(plain, Judge)
    assert plain.info == first.info
    assert not clearing.info.calibrated
    assert clearing.info.label == "judge0+judge1-v1"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = tmp_path / "second_judges-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: second-judges\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[lora_repair.judges]\noutcomes = tests.checks.judges.acting:open_outcomes\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


@pytest.mark.usefixtures("package")
def test_settings_make_the_pair(tmp_path: Path) -> None:
    """The calibration is that of the first judge, or where the second may clear that of the two."""
    second = {"name": "outcomes", "model": "m"}
    plain = judge_of(JudgeSettings.model_validate({"second": second}))
    assert plain.info == RulesJudge.info
    clearing = JudgeSettings.model_validate({"second": second, "second_may_clear": True})
    info = judge_of(clearing).info
    assert (info.name, info.calibrated, info.identity["second model"]) == ("rules+outcomes", False, "m")
    names = ("sensitivity", "specificity", "refusal_recall", "answer_recall")
    made = JudgeCalibration(
        name=info.name, version=1, identity=info.identity, source="s", sha256="0" * 64, n=9, held_out=False,
        counts=dict.fromkeys(names, Proportion(hits=8, n=9)), errors=Proportion(hits=0, n=9),
    )  # fmt: skip
    file = str(made.write(tmp_path / "c.json"))
    assert judge_of(clearing.model_copy(update={"calibration": file})).info.calibrated
    with pytest.raises(CalibrationInvalid):
        judge_of(JudgeSettings.model_validate({"second": second, "calibration": file}))
    for wrong in ({"second_may_clear": True}, {"second": {**second, "second": second}}):
        with pytest.raises(ValidationError):
            JudgeSettings.model_validate(wrong)
    assert OutcomeJudge().info.label


def test_the_report_tells_how_often_the_two_agreed() -> None:
    """Counts of the check, and what both said in each row; a report keeps them through JSON."""

    class Contrary(ReadsWhole):
        info = JudgeInfo(name="contrary", version=1)

        def judge(self, exchanges: Sequence[Exchange]) -> list[Judgement]:
            return [Judgement(outcome=REFUSAL, rule="always") for _ in exchanges]

    policy = load_policy("demo")
    harmed = Character(obeys_above=-1)
    for may_clear in (False, True):
        judge = SecondOpinion(RulesJudge(), Contrary(), may_clear=may_clear)
        report = run_checks(chat_of(harmed), None, policy, "certify", judge=judge, stop_early=False)
        told = report.check("judge").details["second"]
        hits = 104 if not may_clear else 0
        assert report.check("harmful").hits == hits
        assert told["cleared"] == 104 - hits
        assert told["asked"] - told["agreed"] == 104
        assert CheckReport.of(report.as_dict()) == report
        assert report.check("judge").outcome is (CheckOutcome.INCONCLUSIVE if may_clear else CheckOutcome.PASS)
