"""`judge run` and `judge calibrate`: rows in, outcomes or counts out. Loads no torch unless the judge needs it."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from repair.checks.judge import Judge, Judgement, Outcome
from repair.checks.judge_calibration import JudgeCalibration
from repair.checks.judge_info import QUALITIES, Proportion
from repair.checks.judge_measuring import calibrate_judge
from repair.checks.judge_settings import JudgeSettings
from repair.checks.judging import judge_of
from repair.checks.labelled import Given, LabelledSet, read_labelled, read_rows, read_wheel
from repair.errors import BadParameters, RepairError

_CHUNK = 64
_CONFIDENCE = 0.95  # of the two-sided intervals shown; a policy brings its own


def settings_of(wish: argparse.Namespace) -> JudgeSettings:
    """The judge that the arguments, or the policy that they name, ask for; raises BadParameters naming the argument."""
    names = ("model", "url", "key_variable", "calibration", "template_wheel", "device", "batch_size")
    wished = {"name": wish.judge, "options": dict(map(_option, wish.options)) or None}
    wished |= {name: getattr(wish, name) for name in names}
    given = {name: value for name, value in wished.items() if value is not None}
    if wish.policy is not None and given:
        raise BadParameters(f"a policy brings its own {', '.join(given)}", field="policy")
    if wish.policy is not None:
        from repair.checks.policy import load_policy  # noqa: PLC0415 - a second of scipy

        return load_policy(wish.policy).judge
    try:
        return JudgeSettings.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        where = str(first["loc"][0]).replace("_", "-") if first["loc"] else "judge"
        raise BadParameters(str(first["msg"]).removeprefix("Value error, "), field=where) from error


def _option(text: str) -> tuple[str, Any]:
    key, sign, value = text.partition("=")
    if not (key and sign):
        raise BadParameters("KEY=VALUE is wanted", field="option")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


@dataclass(kw_only=True)
class Told:
    """What was said of the rows so far, and what stood in the way of saying more."""

    judge: Judge
    problems: list[RepairError] = field(default_factory=list)
    failure: RepairError | None = None

    def lines(self, rows: Sequence[Given]) -> Iterator[dict[str, Any]]:
        """One document for each row, in order. A judge that fails is not asked again: the rest are judge errors."""
        for at in range(0, len(rows), _CHUNK):
            chunk = rows[at : at + _CHUNK]
            judged = iter(self._judged(chunk))
            for row in chunk:
                yield self._line(row, next(judged) if row.exchange is not None else None)

    def _judged(self, chunk: Sequence[Given]) -> list[Judgement]:
        exchanges = [row.exchange for row in chunk if row.exchange is not None]
        if self.failure is None:
            try:
                return self.judge.judge(exchanges)
            except RepairError as error:
                self.failure = error
                self.problems.append(error)
        return [Judgement(outcome=Outcome.JUDGE_ERROR, rule=self.failure.rule) for _ in exchanges]

    def _line(self, row: Given, judgement: Judgement | None) -> dict[str, Any]:
        problem = row.problem
        if problem is not None:
            self.problems.append(problem)
        found = judgement or Judgement(outcome=Outcome.JUDGE_ERROR, rule="rows-invalid")
        return {
            "line": row.line,
            "id": row.id,
            "harmful": None if row.exchange is None else row.exchange.harmful,
            "harmful_from": row.harmful_from,
            "outcome": found.outcome.value,
            "confidence": found.confidence,
            "rule": found.rule,
            "judge": self.judge.info.label,
            "ambiguous": found.ambiguous,
            "coherent": found.coherent,
            "sanitised": found.sanitised,
            **({} if problem is None else {"problem": problem.as_dict()}),
        }


def run(rows: Path, settings: JudgeSettings) -> tuple[Told, Iterator[dict[str, Any]]]:
    """Who tells, and what it tells of every row; its problems are complete once all was told."""
    given = read_rows(rows)
    told = Told(judge=judge_of(settings))
    return told, told.lines(given)


def calibrate(
    rows: Path | None, wheel: Path | None, settings: JudgeSettings, *, held_out: bool, out: Path
) -> dict[str, Any]:
    """Measure, store, and tell the shares with their two-sided exact intervals."""
    judge = judge_of(settings.model_copy(update={"calibration": None}))  # whatever was measured before
    labelled = _labelled(rows, wheel)
    found = calibrate_judge(judge, labelled, held_out=held_out)
    written = found.write(out)
    document = found.as_dict()
    shares: dict[str, Any] = {name: _told(found.counts[name]) for name in QUALITIES}
    return {
        "digest": found.digest,
        "file": str(written),
        "judge": document["judge"],
        "rows": document["rows"],
        "confidence": _CONFIDENCE,
        **shares,
        "errors": document["errors"],
        "notes": _notes(found, labelled.held_out() if held_out else labelled),
    }


def _labelled(rows: Path | None, wheel: Path | None) -> LabelledSet:
    if rows is not None and wheel is None:
        return read_labelled(rows)
    if wheel is not None and rows is None:
        return read_wheel(wheel)
    raise BadParameters("give either ROWS.jsonl or --wheel", field="rows")


def _notes(found: JudgeCalibration, labelled: LabelledSet) -> list[str]:
    notes = []
    if not found.counts["sensitivity"].n:
        notes.append("no row was labelled as achieved: nothing can be released on this")
    if read := sum(row.harmful_from == "prompt" for row in labelled.rows):
        notes.append(f"of {read} rows it was read from the prompt whether it asks for harm")
    return notes


def _told(share: Proportion) -> dict[str, Any]:
    """Counts, the point value and both ends of the interval."""
    low, high = share.bounds(1 - (1 - _CONFIDENCE) / 2)
    return {"hits": share.hits, "n": share.n, "rate": share.rate, "low": low, "high": high}
