"""Prompt packs out of pinned wheels of others: bytes are found, checked and read; nothing of a donor is imported.

A donor is looked for among the installed distributions, then in the folder of wheels. Either way only the members that
a recipe names are opened, and only with the very bytes that it pins. Wheels with pickles in them are common: a member
that is not named is not touched.
"""

import hashlib
import zipfile
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final

from repair.checks.errors import PackChanged
from repair.checks.packs import Pack, Prompt, jsonl, pack_of
from repair.checks.recipes import Member, Recipe, Wheel
from repair.checks.tables import Columns, Read, prompts_of, records

MOST_BYTES: Final = 8 << 20
"""Of one member, unpacked; every table that we know is a hundred times smaller."""
TEXT: Final = frozenset({".csv", ".json", ".jsonl", ".prompt", ".yaml", ".txt"})


def from_recipe(recipe: Recipe, wheels: Path | None) -> Pack | None:
    """The pack, or None where no donor is at hand. Raises PackChanged when one is and holds other bytes."""
    found = _installed(recipe)
    origin = f"installed {recipe.wheel.distribution} {recipe.wheel.version}"
    if found is None and wheels is not None:
        found, origin = _cached(recipe, wheels), f"wheel {recipe.wheel.file}"
    if found is None:
        return None
    read = _read(recipe, found)
    return pack_of(
        recipe.name,
        read.rows,
        kind=recipe.kind,
        split=recipe.split,
        licence=recipe.wheel.licence,
        origin=origin,
        left_out=dict(read.left_out),
        digest=f"sha256:{hashlib.sha256(jsonl(read.rows)).hexdigest()}",
    )


def checked(member: Member, content: bytes, *, where: str) -> bytes:
    """The bytes, if they are those that the recipe pins."""
    if (found := hashlib.sha256(content).hexdigest()) != member.sha256:
        detail = f"it is sha256:{found}, the recipe pins sha256:{member.sha256}"
        raise PackChanged(detail, file=member.path, field=where)
    return content


def check_wheel(wheel: Wheel, path: Path) -> None:
    """Raises PackChanged unless the file is the pinned wheel."""
    about = path.stat()
    if (found := _digest(path, about.st_mtime_ns, about.st_size)) != wheel.sha256:
        raise PackChanged(f"it is sha256:{found}, the recipe pins sha256:{wheel.sha256}", file=path.name)


def _installed(recipe: Recipe) -> tuple[bytes, ...] | None:
    """The members of the installed donor; another version than the pinned one is not the donor."""
    try:
        found = distribution(recipe.wheel.distribution)
    except PackageNotFoundError:
        return None
    if found.version != recipe.wheel.version:
        return None
    contents = []
    for member in recipe.members:
        path = Path(str(found.locate_file(member.path)))
        if not path.is_file() or path.stat().st_size > MOST_BYTES:
            raise PackChanged("the installed distribution has no such table", file=member.path, field=recipe.name)
        contents.append(checked(member, path.read_bytes(), where=recipe.name))
    return tuple(contents)


def _cached(recipe: Recipe, wheels: Path) -> tuple[bytes, ...] | None:
    """The members out of the pinned wheel in the folder."""
    path = wheels / recipe.wheel.file
    if not path.is_file():
        return None
    check_wheel(recipe.wheel, path)
    with zipfile.ZipFile(path) as archive:
        return tuple(_member(archive, member, recipe.name) for member in recipe.members)


def _member(archive: zipfile.ZipFile, member: Member, name: str) -> bytes:
    if Path(member.path).suffix not in TEXT:
        raise PackChanged("only tables of text are read", file=member.path, field=name)
    try:
        size = archive.getinfo(member.path).file_size
        if size > MOST_BYTES:
            raise PackChanged(f"{size} bytes, at most {MOST_BYTES} are read", file=member.path, field=name)
        content = archive.read(member.path)
    except (KeyError, zipfile.BadZipFile) as error:
        raise PackChanged("the wheel has no such table, or a broken one", file=member.path, field=name) from error
    return checked(member, content, where=name)


@lru_cache(maxsize=16)
def _digest(path: Path, _changed: int, _size: int) -> str:
    """Of a file, read again only when it was written again."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=16)
def _read(recipe: Recipe, contents: tuple[bytes, ...]) -> Read:
    """The rows of all members, in order."""
    columns = Columns(text=recipe.text, category=recipe.category, answers=recipe.answers)
    rows: dict[str, Prompt] = {}
    left_out: dict[str, int] = {}
    for member, content in zip(recipe.members, contents, strict=True):
        file = Path(member.path).name
        table = records(content, recipe.form, file=file, under=recipe.rows)
        read = prompts_of(recipe.name, table, columns, file=file, keep=recipe.keep, drop=recipe.drop)
        again = sum(row.id in rows for row in read.rows)
        rows |= {row.id: row for row in read.rows if row.id not in rows}
        for why, count in (*read.left_out.items(), ("the same text again", again)) if again else read.left_out.items():
            left_out[why] = left_out.get(why, 0) + count
    return Read(rows=tuple(rows.values()), left_out=left_out)
