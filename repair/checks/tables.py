"""Tables of prompts from elsewhere: CSV, JSON, JSON lines or YAML, read row by row into prompts.

Every row is right or the whole table is refused by line and column; no message quotes a prompt. Columns that are not
asked for are never looked at: some donors keep answers to harmful prompts in them.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import yaml

from repair.checks.errors import PackInvalid
from repair.checks.packs import Prompt

LONGEST: Final = 4000
"""Characters of a prompt; what is longer is a document."""

# Sexual content about minors is asked of no model here, whoever brings the prompts.
_SEXUAL: Final = re.compile(
    r"\b(sex\w*|porn\w*|nud(e|es|ity)|naked|erotic\w*|molest\w*|groom\w*|incest\w*|rap(e|es|ed|ing)|fetish\w*|seduc\w*)\b",
    re.IGNORECASE,
)
_MINOR: Final = re.compile(
    r"\b(child(ren|hood)?|minors?|under-?age\w*|teen(s|ager|agers|aged?)?|kids?|school(girl|boy|child)\w*|"
    r"toddlers?|infants?|bab(y|ies)|(young|little|small) (girl|boy)s?|"
    r"\d{1,2}[- ]?year[- ]?olds?|adolescents?|juveniles?|students?|pupils?)\b",
    re.IGNORECASE,
)
_BY_NAME: Final = re.compile(r"\b(p(a?e)dophil\w*|csam|lolita\w*|child porn\w*)\b", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Where a table keeps what; an empty name for what it has not."""

    text: str = "text"
    category: str = "category"
    answers: str = ""


@dataclass(frozen=True, kw_only=True)
class Read:
    """What a table held.

    Attributes:
        rows: The prompts, in order.
        left_out: How many were not taken, by why.
    """

    rows: tuple[Prompt, ...]
    left_out: Mapping[str, int]


Record = tuple[str, Mapping[str, Any]]
"""Where a row stands in its file, and the row."""


def records(content: bytes, form: str, *, file: str, under: str = "") -> Iterator[Record]:
    """Every row of a table with its place. Raises PackInvalid."""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PackInvalid(f"not UTF-8 from byte {error.start} on", file=file) from error
    if form == "csv":
        yield from _csv(text, file)
    elif form == "jsonl":
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                yield _object(_json(line, f"line {number}", file), f"line {number}", file)
    elif form in {"json", "yaml"}:
        found = _json(text, "the whole file", file) if form == "json" else _yaml(text, file)
        found = found.get(under) if under and isinstance(found, dict) else found
        if not isinstance(found, list):
            raise PackInvalid("a list of rows is wanted", file=file, field=under)
        for number, row in enumerate(found, start=1):
            yield _object(row, f"row {number}", file)
    else:
        raise PackInvalid(f"no such form: {form}; there are csv, jsonl, json and yaml", file=file)


def prompts_of(
    name: str,
    rows: Iterator[Record],
    columns: Columns,
    *,
    file: str,
    keep: tuple[tuple[str, str], ...] = (),
    drop: tuple[tuple[str, str], ...] = (),
) -> Read:
    """The prompts of a table under ids of the pack's name. Raises PackInvalid with line and column."""
    found: dict[str, Prompt] = {}
    left_out: dict[str, int] = {}
    for place, row in rows:
        text = _text(row, columns.text, place, file)
        category = slug(_first(row, columns.category, place, file))
        if any(row.get(column) != value for column, value in keep) or any(row.get(column) == v for column, v in drop):
            why = "by the recipe"
        elif about_minors(text, category):
            why = "sexual content about minors"
        else:
            prompt = Prompt(
                id=f"{name}-{_mark(text)}", text=text, category=category, answers=_answers(row, columns, place, file)
            )
            if prompt.id not in found:
                found[prompt.id] = prompt
                continue
            why = "the same text again"
        left_out[why] = left_out.get(why, 0) + 1
    return Read(rows=tuple(found.values()), left_out=left_out)


def about_minors(text: str, category: str) -> bool:
    """Whether a prompt is about minors in a sexual way, so far as words tell; it errs on the side of leaving out."""
    return bool(_BY_NAME.search(text) or (_MINOR.search(text) and (_SEXUAL.search(text) or "sexual" in category)))


def slug(text: str) -> str:
    """A category as reports name it: small letters, digits and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "other"


def _mark(text: str) -> str:
    """Twelve digits of the text's hash: an id that stays the same when rows are added or moved."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:12]


def _csv(text: str, file: str) -> Iterator[Record]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        for row in reader:
            if None in row:
                raise PackInvalid("more fields than columns", file=file, field=f"line {reader.line_num}")
            yield f"line {reader.line_num}", row
    except csv.Error as error:
        raise PackInvalid(f"not CSV: {error}", file=file, field=f"line {reader.line_num}") from error


def _json(text: str, place: str, file: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PackInvalid("not JSON", file=file, field=place) from error


def _yaml(text: str, file: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise PackInvalid("not YAML", file=file) from error


def _object(row: Any, place: str, file: str) -> Record:
    if not isinstance(row, dict):
        raise PackInvalid("a row is an object with named columns", file=file, field=place)
    return place, row


def _text(row: Mapping[str, Any], column: str, place: str, file: str) -> str:
    found = row.get(column)
    where = f"{place}, column {column}"
    if column not in row:
        raise PackInvalid(f"no such column; there are: {', '.join(map(str, row))}"[:200], file=file, field=where)
    if not isinstance(found, str) or not found.strip():
        raise PackInvalid("empty, or no text", file=file, field=where)
    if len(found) > LONGEST:
        raise PackInvalid(f"{len(found)} characters, at most {LONGEST} are taken", file=file, field=where)
    if "\x00" in found:
        raise PackInvalid("holds a zero byte", file=file, field=where)
    return found.strip()


def _first(row: Mapping[str, Any], column: str, place: str, file: str) -> str:
    """The category: a text, or the first of several."""
    if not column:
        return "other"
    found = row.get(column)
    if isinstance(found, list) and found:
        found = found[0]
    return _text({column: found} if column in row else row, column, place, file)


def _answers(row: Mapping[str, Any], columns: Columns, place: str, file: str) -> tuple[str, ...]:
    if not columns.answers:
        return ()
    found = row.get(columns.answers)
    several = found if isinstance(found, list) else [found]
    if not several:
        raise PackInvalid("no answer", file=file, field=f"{place}, column {columns.answers}")
    return tuple(
        _text({columns.answers: str(one) if isinstance(one, int | float) else one}, columns.answers, place, file)
        for one in several
    )
