"""Rows to judge and rows that people have labelled, from JSON lines or from a pinned wheel that holds such labels.

A row is one JSON object in a line: `prompt`, `completion`, and where wanted `id` and `harmful`. A labelled one has at
least one of `label` (an outcome), `achieved` (the harmful objective) and `refusal`. Whether a prompt asks for harm is
read from its words where a row does not say. Texts live in memory only.
"""

import csv
import hashlib
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from pydantic import BaseModel, ConfigDict, StrictBool, StrictInt, StrictStr, ValidationError, model_validator

from repair.checks.asks import is_harmful
from repair.checks.errors import RowsInvalid
from repair.checks.judge import Exchange, Outcome

PYRIT: Final = "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a"  # pyrit-1.1.0-py3-none-any.whl, MIT
_OBJECTIVE: Final = "pyrit/datasets/scorer_evals/objective/"  # people said whether the objective was achieved
_REFUSAL: Final = "pyrit/datasets/scorer_evals/refusal_scorer/"  # people said whether it was a refusal
_TRUE: Final = frozenset({"1", "1.0", "true"})

Origin = Literal["row", "prompt"]
"""Who says whether a prompt asks for harm: the row, or the words of the prompt (`repair/checks/asks.py`)."""


class _Row(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    prompt: StrictStr
    completion: StrictStr
    id: StrictStr | StrictInt | None = None
    harmful: StrictBool | None = None

    @property
    def says_harmful(self) -> bool | None:
        """Whether the prompt asks for harm, as far as the row tells."""
        return self.harmful

    @property
    def harmful_from(self) -> Origin:
        return "prompt" if self.says_harmful is None else "row"

    @property
    def exchange(self) -> Exchange:
        harmful = is_harmful(self.prompt) if self.says_harmful is None else self.says_harmful
        return Exchange(prompt=self.prompt, reply=self.completion, harmful=harmful)


class _Labelled(_Row):
    label: Outcome | None = None
    achieved: StrictBool | None = None
    refusal: StrictBool | None = None

    @property
    def says_harmful(self) -> bool | None:
        """People who were asked whether a harmful objective was achieved had one before them."""
        had_one = self.achieved is not None or self.label is Outcome.HARMFUL_COMPLIANCE
        return True if self.harmful is None and had_one else self.harmful

    @model_validator(mode="after")
    def _one_label(self) -> "_Labelled":
        if self.label is None and self.achieved is None and self.refusal is None:
            raise ValueError("no label: give one of label, achieved, refusal")
        if self.label is not None and (self.achieved is not None or self.refusal is not None):
            raise ValueError("label says all; give no achieved or refusal beside it")
        if self.label is Outcome.JUDGE_ERROR:
            raise ValueError("people label what a reply was; judge_error is no such label")
        if self.harmful is False and (self.achieved or self.label is Outcome.HARMFUL_COMPLIANCE):
            raise ValueError("harmful is false: such a prompt has no harmful objective that could be achieved")
        return self


@dataclass(frozen=True, kw_only=True)
class Given:
    """One row as it was given: what a judge may read of it and who says whether it asks for harm, or why none can."""

    line: int
    id: str | int | None = None
    exchange: Exchange | None = None
    harmful_from: Origin | None = None
    problem: RowsInvalid | None = None


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """One reply with what people said of it; None where they were not asked."""

    exchange: Exchange
    achieved: bool | None  # None also where the prompt asks for no harm: there is nothing to achieve
    refused: bool | None
    harmful_from: Origin = "row"

    @property
    def held_out(self) -> bool:
        """Whether the row was kept from the eyes that wrote the rule judge: its hash is odd."""
        return hashlib.sha256((self.exchange.prompt + self.exchange.reply).encode()).digest()[0] % 2 == 1


@dataclass(frozen=True, kw_only=True)
class LabelledSet:
    """Labelled rows with where they come from."""

    source: str
    sha256: str
    rows: tuple[Labelled, ...]

    def held_out(self) -> "LabelledSet":
        """The rows whose hash is odd."""
        return LabelledSet(source=self.source, sha256=self.sha256, rows=tuple(row for row in self.rows if row.held_out))


def read_rows(path: Path) -> list[Given]:
    """One `Given` for each line that is not blank, in order; a bad one carries its problem instead of an exchange."""
    found = []
    for number, line in _lines(path):
        try:
            row = _Row.model_validate_json(line)
        except ValidationError as error:
            found.append(Given(line=number, problem=_problem(path, number, error)))
        else:
            found.append(Given(line=number, id=row.id, exchange=row.exchange, harmful_from=row.harmful_from))
    return found


def read_labelled(path: Path) -> LabelledSet:
    """Labelled rows of a file; raises RowsInvalid naming the first bad line and its field."""
    rows = []
    for number, line in _lines(path):
        try:
            row = _Labelled.model_validate_json(line)
        except ValidationError as error:
            raise _problem(path, number, error) from None  # the cause quotes the row
        rows.append(_labelled(row))
    if not rows:
        raise RowsInvalid("no rows", file=path.name)
    return LabelledSet(source=path.name, sha256=hashlib.sha256(path.read_bytes()).hexdigest(), rows=tuple(rows))


def read_wheel(path: Path, *, sha256: str = PYRIT) -> LabelledSet:
    """The label sets of the pinned wheel, read as data and never imported; raises RowsInvalid for any other file."""
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != sha256:
        raise RowsInvalid(f"not the wheel that is known: its sha256 is {found}, wanted {sha256}", file=path.name)
    try:
        with zipfile.ZipFile(path) as wheel:
            rows = [*_sheets(wheel, _OBJECTIVE), *_sheets(wheel, _REFUSAL)]
    except (zipfile.BadZipFile, KeyError, StopIteration, UnicodeDecodeError) as error:
        raise RowsInvalid(f"holds no labels as expected: {type(error).__name__}", file=path.name) from error
    return LabelledSet(source="pyrit 1.1.0 scorer_evals", sha256=found, rows=tuple(rows))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, line


def _problem(path: Path, number: int, error: ValidationError) -> RowsInvalid:
    """Line, field and rule; never the text of the row, which may be harmful."""
    first = error.errors(include_input=False, include_context=False, include_url=False)[0]
    field = str(first["loc"][0]) if first["loc"] else ""
    detail = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] in {"json_invalid", "model_type"}:
        detail = "no JSON object"
    return RowsInvalid(detail, field=": ".join(part for part in (f"line {number}", field) if part), file=path.name)


def _labelled(row: _Labelled) -> Labelled:
    achieved, refused = row.achieved, row.refusal
    if row.label is not None:
        achieved, refused = row.label is Outcome.HARMFUL_COMPLIANCE, row.label is Outcome.REFUSAL
    exchange = row.exchange
    return Labelled(
        exchange=exchange,
        achieved=achieved if exchange.harmful else None,
        refused=refused,
        harmful_from=row.harmful_from,
    )


def _sheets(wheel: zipfile.ZipFile, folder: str) -> Iterator[Labelled]:
    """The rows of all label sheets in one folder; lines before the header that begin with # are remarks."""
    for name in sorted(wheel.namelist()):
        if not (name.startswith(folder) and name.endswith(".csv")):
            continue
        lines = wheel.read(name).decode("utf-8-sig").splitlines(keepends=True)
        body = "".join(lines[next(at for at, line in enumerate(lines) if not line.startswith("#")) :])
        for row in csv.DictReader(io.StringIO(body)):
            said = row["human_score"].strip().lower() in _TRUE
            yield Labelled(
                exchange=Exchange(prompt=row["objective"], reply=row["assistant_response"] or "", harmful=True),
                achieved=said if folder == _OBJECTIVE else None,
                refused=said if folder == _REFUSAL else None,
            )
