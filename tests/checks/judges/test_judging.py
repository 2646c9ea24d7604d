"""Judges by name, from settings, policies and other packages; and what may rest on them."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from repair.checks.errors import CalibrationInvalid, JudgeUnusable, PolicyInvalid
from repair.checks.evidence import CheckOutcome
from repair.checks.guards.known import GUARDS, REFUSALS
from repair.checks.judge import Exchange, Judge, Judgement, ReadsWhole
from repair.checks.judge_calibration import JudgeCalibration
from repair.checks.judge_info import NOT_MEASURED, JudgeInfo, Proportion
from repair.checks.judge_settings import RULES, JudgeSettings
from repair.checks.judging import OVER_HTTP, judge_names, judge_of
from repair.checks.policy import Policy, load_policy
from repair.checks.rules import RulesJudge
from repair.checks.run import run_checks
from tests.checks.acting import Character, chat_of

POLICY = load_policy("demo")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package on the path that offers judges, found the way an installed one is."""
    metadata = tmp_path / "other_judges-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: other-judges\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        "[lora_repair.judges]\noutcomes = tests.checks.judges.acting:open_outcomes\nlost = no_such_module_x:y\n"
    )
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])


@pytest.mark.usefixtures("package")
def test_a_judge_of_another_package_is_found_by_name() -> None:
    """It takes the settings and keeps the protocol."""
    judge = judge_of(JudgeSettings(name="outcomes", model="m"))
    assert isinstance(judge, Judge)
    assert judge.info.identity == {"model": "m"}
    assert {"rules", "outcomes", "lost"} <= set(judge_names())
    for name in ("lost", "nobody"):
        with pytest.raises(JudgeUnusable) as caught:
            judge_of(JudgeSettings(name=name))
        assert caught.value.field == name


@pytest.mark.usefixtures("package")
def test_a_calibration_file_gives_the_judge_its_qualities(tmp_path: Path) -> None:
    """Made for these settings; for others it is refused."""
    names = ("sensitivity", "specificity", "refusal_recall", "answer_recall")
    made = JudgeCalibration(
        name="outcomes", version=1, identity={"model": "m"}, source="s", sha256="0" * 64, n=20, held_out=False,
        counts=dict.fromkeys(names, Proportion(hits=19, n=20)), errors=Proportion(hits=0, n=20),
    )  # fmt: skip
    file = str(made.write(tmp_path / "c.json"))
    judge = judge_of(JudgeSettings(name="outcomes", model="m", calibration=file))
    assert judge.info.calibrated
    assert judge.info.as_dict(0.95)["calibration"] == made.digest
    exchange = Exchange(prompt="p", reply="refusal", harmful=True)
    assert judge.judge([exchange]) == judge_of(JudgeSettings(name="outcomes", model="m")).judge([exchange])
    with pytest.raises(CalibrationInvalid):
        judge_of(JudgeSettings(name="outcomes", model="another", calibration=file))


class Borrowed(ReadsWhole):
    """The rule judge under another name, with what the test says is known of it."""

    def __init__(self, **known: Any) -> None:
        self.info = JudgeInfo(name="borrowed", version=1, **known)
        self.sanitised = 0

    def judge(self, exchanges: Sequence[Exchange]) -> list[Judgement]:
        found = RulesJudge().judge(exchanges)
        for at in range(min(self.sanitised, len(found))):
            found[at] = replace(found[at], sanitised=True)
        self.sanitised = 0
        return found


def test_nothing_rests_on_a_judge_that_nobody_measured() -> None:
    """Not even where the policy would take the rule judge alone, and however well the adapter does."""
    report = run_checks(chat_of(Character()), None, POLICY, "certify", judge=Borrowed())
    found = report.check("judge")
    assert (found.outcome, found.details["allowed"], found.details["calibration"]) == (
        CheckOutcome.INCONCLUSIVE, False, "",
    )  # fmt: skip
    assert "no calibration" in found.reason
    assert report.check("harmful").details["upper_bound"] == 1.0
    assert report.outcome is CheckOutcome.INCONCLUSIVE
    json.dumps(report.as_dict(), allow_nan=False)
    measured = Borrowed(sensitivity=Proportion(hits=99, n=100), calibration="sha256:x")
    assert run_checks(chat_of(Character()), None, POLICY, "certify", judge=measured).outcome is CheckOutcome.PASS


def test_replies_that_speak_to_the_judge_are_counted() -> None:
    """An adapter that writes a judge's control strings is told of."""
    judge = Borrowed()
    judge.sanitised = 3
    report = run_checks(chat_of(Character()), None, POLICY, "certify", judge=judge)
    assert report.check("judge").details["sanitised"] == 3
    assert sum(row.sanitised for row in report.rows) == 3


def test_the_report_carries_the_digest_of_the_calibration() -> None:
    """Of the judge that was asked, in the suite and in the check."""
    report = run_checks(chat_of(Character()), None, POLICY, "certify")
    assert report.suite["judge"]["calibration"] == report.check("judge").details["calibration"]
    assert report.suite["judge"]["calibration"] == RulesJudge.info.calibration != ""


@pytest.mark.usefixtures("package")
def test_a_policy_names_its_judge(tmp_path: Path) -> None:
    """Every judge in it is part of the policy's digest, and run_checks opens it."""
    document = POLICY.model_dump(mode="json") | {"judge": {"name": "lost"}}
    policy = Policy.model_validate(document)
    assert policy.digest != POLICY.digest
    with pytest.raises(JudgeUnusable):
        run_checks(chat_of(Character()), None, policy, "certify")
    path = tmp_path / "p.toml"
    text = (Path(__file__).parents[3] / "repair" / "policies" / "demo.toml").read_text()
    path.write_text(text.replace("[suite]", '[judge]\nname = "x"\noptions = { strict = true }\n[suite]', 1))
    assert load_policy(path).judge == JudgeSettings(name="x", options=(("strict", True),))
    path.write_text(text.replace("[suite]", '[judge]\nname = "rules"\nurl = "http://x"\n[suite]', 1))
    with pytest.raises(PolicyInvalid):
        load_policy(path)


def test_settings_that_change_nothing_are_refused() -> None:
    """A key without a server, weights for the rules."""
    for given in ({"name": "rules", "model": "m"}, {"name": "x", "key_variable": "K"}, {"name": ""}, {"nam": "x"}):
        with pytest.raises(ValidationError):
            JudgeSettings.model_validate(given)
    assert hash(JudgeSettings.model_validate({"name": "x", "options": {"a": 1}}))
    assert NOT_MEASURED.rate is None


def test_the_page_names_every_judge() -> None:
    """And everything that a policy may say of one."""
    page = (Path(__file__).parents[3] / "docs" / "judges.md").read_text()
    assert all(f"`{name}`" in page for name in {RULES, REFUSALS, OVER_HTTP, *GUARDS})
    assert all(name in page for name in JudgeSettings.model_fields)
