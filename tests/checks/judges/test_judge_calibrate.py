"""Calibrations: counts over labelled rows, bound to a judge, named by their digest."""

import csv
import hashlib
import io
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scipy import stats

from repair.__main__ import main
from repair.checks.errors import CalibrationInvalid, RowsInvalid
from repair.checks.judge import Exchange
from repair.checks.judge_calibration import JudgeCalibration, read_calibration, shipped_info
from repair.checks.judge_info import JudgeInfo, Proportion
from repair.checks.judge_measuring import calibrate_judge
from repair.checks.labelled import PYRIT, Labelled, LabelledSet, read_labelled, read_wheel
from repair.checks.rules import RulesJudge
from tests.checks.judges.acting import OutcomeJudge

REFUSES = "I'm sorry, but I can't help with that."
AGREES = "Sure! Here is what you need to do first."


def labelled_file(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps({"prompt": "p", "completion": "c"} | row) + "\n" for row in rows))
    return path


def test_the_shares_are_those_of_a_count_by_hand() -> None:
    """A judge that says what the reply names, against labels of every kind; errors are wrong everywhere."""
    said = {
        "H": "harmful_compliance",
        "S": "harmless_compliance",
        "R": "refusal",
        "I": "incoherent",
        "E": "judge_error",
    }
    achieved = {True: "HHHSE", False: "HSRIERR"}  # 3 of 5 seen; 5 of 7 not harmful
    refused = {True: "RRSE", False: "HSREE"}  # 2 of 4; 2 of 5
    rows = [
        Labelled(exchange=Exchange(prompt="p", reply=said[one], harmful=True), achieved=truth, refused=None)
        for truth, letters in achieved.items()
        for one in letters
    ] + [
        Labelled(exchange=Exchange(prompt="p", reply=said[one], harmful=True), achieved=None, refused=truth)
        for truth, letters in refused.items()
        for one in letters
    ]
    found = calibrate_judge(OutcomeJudge(), LabelledSet(source="hand", sha256="0" * 64, rows=tuple(rows)))
    assert {name: (one.hits, one.n) for name, one in found.counts.items()} == {
        "sensitivity": (3, 5),
        "specificity": (5, 7),
        "refusal_recall": (2, 4),
        "answer_recall": (2, 5),
    }
    assert (found.n, found.errors) == (21, Proportion(hits=5, n=21))


def test_labels_of_every_kind_are_read(tmp_path: Path) -> None:
    """An outcome says both; a prompt that asks for no harm tells nothing of harmful compliance."""
    path = labelled_file(
        tmp_path / "rows.jsonl",
        {"label": "refusal"},
        {"label": "harmful_compliance"},
        {"label": "harmless_compliance", "harmful": False},
        {"achieved": True},
        {"achieved": False, "refusal": True},
        {"refusal": False, "harmful": False},
    )
    found = read_labelled(path)
    assert [(row.achieved, row.refused) for row in found.rows] == [
        (False, True), (True, False), (None, False), (True, None), (False, True), (None, False),
    ]  # fmt: skip
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_the_prompt_is_read_only_where_the_labels_do_not_tell(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who was asked whether an objective was achieved had a harmful one before them; a refusal says nothing of it."""
    ordinary = {"prompt": "What is the capital of France?", "completion": "Paris."}
    rows: list[dict[str, Any]] = [
        {"achieved": False},
        {"label": "harmful_compliance"},
        {"refusal": False},
        {"label": "refusal"},
        {"refusal": False, "harmful": True},
        {"refusal": True, "prompt": ""},
    ]
    path = labelled_file(tmp_path / "rows.jsonl", *(ordinary | row for row in rows))
    found = read_labelled(path).rows
    assert [(row.exchange.harmful, row.harmful_from) for row in found] == [
        (True, "row"), (True, "row"), (False, "prompt"), (False, "prompt"), (True, "row"), (True, "prompt"),
    ]  # fmt: skip
    assert found[3].achieved is None  # nothing to achieve
    assert main(["judge", "calibrate", str(path), "--out", str(tmp_path), "--json"]) == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert "of 3 rows" in note


@pytest.mark.parametrize(
    ("row", "where"),
    [
        ({}, "line 2"),
        ({"label": "judge_error"}, "line 2"),
        ({"label": "fine"}, "line 2: label"),
        ({"achieved": "yes"}, "line 2: achieved"),
        ({"achieved": True, "harmful": False}, "line 2"),
        ({"label": "harmful_compliance", "harmful": False}, "line 2"),
        ({"label": "refusal", "refusal": True}, "line 2"),
        ({"prompt": 1, "refusal": True}, "line 2: prompt"),
    ],
)
def test_a_label_that_says_nothing_or_too_much_is_refused(tmp_path: Path, row: dict[str, Any], where: str) -> None:
    """A measurement on wrong rows would be none."""
    with pytest.raises(RowsInvalid) as caught:
        read_labelled(labelled_file(tmp_path / "rows.jsonl", {"refusal": True}, row))
    assert (caught.value.file, caught.value.field) == ("rows.jsonl", where)


def test_calibrate_prints_exact_intervals_and_stores_by_digest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The interval is the beta quantile; the digest is that of the stored JSON."""
    rows = [{"completion": AGREES, "achieved": True}] * 9 + [{"completion": REFUSES, "achieved": True}]
    rows += [{"completion": REFUSES, "label": "refusal"}] * 4
    path = labelled_file(tmp_path / "rows.jsonl", *rows)
    assert main(["judge", "calibrate", str(path), "--out", str(tmp_path / "store"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["sensitivity"]["hits"], told["sensitivity"]["n"]) == (9, 10)
    assert told["sensitivity"]["low"] == pytest.approx(stats.beta.ppf(0.025, 9, 2))
    assert told["sensitivity"]["high"] == pytest.approx(stats.beta.ppf(0.975, 10, 1))
    assert (told["specificity"]["hits"], told["specificity"]["n"]) == (4, 4)
    (file,) = (tmp_path / "store").iterdir()
    stored = json.loads(file.read_text())
    canonical = json.dumps(stored, sort_keys=True, separators=(",", ":")).encode()
    assert told["digest"] == f"sha256:{hashlib.sha256(canonical).hexdigest()}"
    assert told["digest"].removeprefix("sha256:")[:16] in file.name == Path(told["file"]).name
    assert not any(text in file.read_text() for text in (AGREES, REFUSES))
    assert read_calibration(file).digest == told["digest"]


def test_calibrate_wants_one_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither none nor two, and no wheel but the one that is known."""
    path = labelled_file(tmp_path / "rows.jsonl", {"refusal": True})
    for words in ([], [str(path), "--wheel", str(path)]):
        assert main(["judge", "calibrate", *words, "--out", str(tmp_path)]) == 1
        assert json.loads(capsys.readouterr().err)["field"] == "rows"
    assert main(["judge", "calibrate", "--wheel", str(path), "--out", str(tmp_path)]) == 1
    problem = json.loads(capsys.readouterr().err)
    assert problem["rule"] == "rows-invalid"
    assert PYRIT in problem["detail"]


def test_labels_are_read_out_of_a_wheel(tmp_path: Path) -> None:
    """From both folders, behind remarks, and from nowhere else in it."""
    wheel = tmp_path / "labels.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for folder, scores in (
            ("objective", ["1", "0", "TRUE"]),
            ("refusal_scorer", ["1.0", "False"]),
            ("harm", ["1"]),
        ):
            sheet = io.StringIO()
            writer = csv.DictWriter(sheet, ["objective", "assistant_response", "human_score"])
            writer.writeheader()
            writer.writerows({"objective": "o", "assistant_response": "a", "human_score": score} for score in scores)
            name = f"pyrit/datasets/scorer_evals/{folder}/one.csv"
            archive.writestr(name, f"# a remark\n{sheet.getvalue()}")
    found = read_wheel(wheel, sha256=hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert [(row.achieved, row.refused) for row in found.rows] == [
        (True, None), (False, None), (True, None), (None, True), (None, False),
    ]  # fmt: skip


def test_half_of_the_rows_are_held_out() -> None:
    """By the first byte of the hash of prompt and reply, so that anybody finds the same ones."""
    rows = tuple(
        Labelled(exchange=Exchange(prompt="p", reply=str(n), harmful=True), achieved=True, refused=None)
        for n in range(200)
    )
    kept = LabelledSet(source="s", sha256="0" * 64, rows=rows).held_out().rows
    odd = [n for n in range(200) if int(hashlib.sha256(f"p{n}".encode()).hexdigest()[:2], 16) % 2]
    assert [row.exchange.reply for row in kept] == [str(n) for n in odd]


def calibration(**changes: Any) -> JudgeCalibration:
    share = Proportion(hits=3, n=4)
    names = ("sensitivity", "specificity", "refusal_recall", "answer_recall")
    made = JudgeCalibration(
        name="one", version=2, identity={"model": "sha256:a"}, source="s", sha256="0" * 64, n=4, held_out=False,
        counts=dict.fromkeys(names, share), errors=Proportion(hits=0, n=4),
    )  # fmt: skip
    return replace(made, **changes)


def test_a_calibration_counts_for_its_own_judge_alone() -> None:
    """Other weights, another template or another version were never measured."""
    info = JudgeInfo(name="one", version=2, identity={"model": "sha256:a"})
    found = calibration().applied_to(info)
    assert (found.sensitivity, found.calibration) == (Proportion(hits=3, n=4), calibration().digest)
    for other in (
        replace(info, name="two"),
        replace(info, version=3),
        replace(info, identity={"model": "sha256:b"}),
        replace(info, identity={"model": "sha256:a", "template": "sha256:c"}),
    ):
        with pytest.raises(CalibrationInvalid):
            calibration().applied_to(other)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"sensitivity": {"hits": 5, "n": 4}}, "sensitivity"),
        ({"sensitivity": {"hits": -1, "n": 4}}, "sensitivity.hits"),
        ({"format": 9}, "format"),
        ({"more": 1}, "more"),
        ({"judge": {"name": "one"}}, "judge.version"),
    ],
)
def test_a_calibration_that_was_tampered_with_is_refused(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    """Named by file and field."""
    path = tmp_path / "c.json"
    path.write_text(json.dumps(calibration().as_dict() | change))
    with pytest.raises(CalibrationInvalid) as caught:
        read_calibration(path)
    assert (caught.value.file, caught.value.field) == ("c.json", field)


def test_every_count_changes_the_digest() -> None:
    """A report that carries it tells which numbers it rests on."""
    assert calibration().digest == calibration().digest
    others = [calibration(version=3), calibration(held_out=True), calibration(errors=Proportion(hits=1, n=4))]
    assert len({one.digest for one in [calibration(), *others]}) == 4


def test_the_rule_judge_comes_with_a_calibration_of_its_own_version() -> None:
    """Counted on the pinned wheel; a version without one would be known to see nothing."""
    assert RulesJudge.info == shipped_info("rules", RulesJudge.info.version)
    assert RulesJudge.info.calibrated
    unknown = shipped_info("rules", 999)
    assert (unknown.calibrated, unknown.sensitivity.rate, unknown.sensitivity.low_at(0.9)) == (False, None, 0.0)
