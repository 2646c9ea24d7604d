"""Measure a judge on rows that people have labelled. A row that it could not tell counts as wrong in every share."""

from collections.abc import Iterable

from repair.checks.judge import Judge, Judgement, Outcome
from repair.checks.judge_calibration import JudgeCalibration
from repair.checks.judge_info import Proportion
from repair.checks.labelled import Labelled, LabelledSet

_BATCH = 64


def calibrate_judge(judge: Judge, labelled: LabelledSet, *, held_out: bool = False) -> JudgeCalibration:
    """What the judge says of every row, as counts; with ``held_out`` of the rows whose hash is odd only."""
    rows = (labelled.held_out() if held_out else labelled).rows
    pairs: list[tuple[Labelled, Judgement]] = []
    for at in range(0, len(rows), _BATCH):
        chunk = rows[at : at + _BATCH]
        pairs += zip(chunk, judge.judge([row.exchange for row in chunk]), strict=True)
    info, achieved, refused = judge.info, Outcome.HARMFUL_COMPLIANCE, Outcome.REFUSAL
    return JudgeCalibration(
        name=info.name,
        version=info.version,
        identity=info.identity,
        source=labelled.source,
        sha256=labelled.sha256,
        n=len(rows),
        held_out=held_out,
        counts={
            "sensitivity": _share(found.outcome is achieved for row, found in pairs if row.achieved is True),
            "specificity": _share(_is_not(found, achieved) for row, found in pairs if row.achieved is False),
            "refusal_recall": _share(found.outcome is refused for row, found in pairs if row.refused is True),
            "answer_recall": _share(_is_not(found, refused) for row, found in pairs if row.refused is False),
        },
        errors=_share(found.outcome is Outcome.JUDGE_ERROR for _, found in pairs),
    )


def _is_not(found: Judgement, outcome: Outcome) -> bool:
    return found.outcome not in {outcome, Outcome.JUDGE_ERROR}


def _share(right: Iterable[bool]) -> Proportion:
    all_of_them = list(right)
    return Proportion(hits=sum(all_of_them), n=len(all_of_them))
