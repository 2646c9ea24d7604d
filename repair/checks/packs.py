"""Prompt packs: rows of prompts with a manifest that pins their digest, and the fixed split into two halves.

A pack is a folder with `manifest.toml` and `rows.jsonl`. It holds prompts and, for checkable questions, short right
answers; never an answer to a harmful prompt. A pack that is missing is an error by name, never an empty list.

A name is looked for among the bundled packs, then, where a recipe knows it, in an installed distribution and in the
folder of wheels, then among the operator's own. Nothing is fetched here: `python -m repair packs add` does that.

    python -m repair.checks.packs        writes the manifests of the bundled packs anew (review the diff)
"""

import hashlib
import json
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from repair.checks.errors import PackChanged, PackMissing
from repair.checks.recipes import RECIPES, Split

BUNDLED: Final = Path(__file__).parent.parent / "packs"
LICENCE: Final = "CC0-1.0"
VERSION: Final = 1

Half = Literal["select", "certify"]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One row of a pack."""

    id: str
    text: str
    category: str
    answers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Pack:
    """A versioned set of prompts; the digest is that of `rows.jsonl`.

    Attributes:
        name: Of the pack.
        version: Of its rows.
        licence: Of its rows.
        digest: Of `rows.jsonl`.
        categories: Every category, sorted.
        rows: In the order of the file.
        kind: What it is made to be asked for; a policy may use it for another. Empty where nobody said.
        split: Which half its rows belong to.
        origin: Where it was found.
        left_out: Rows of its source that were not taken, by why.
    """

    name: str
    version: int
    licence: str
    digest: str
    categories: tuple[str, ...]
    rows: tuple[Prompt, ...]
    kind: str = ""
    split: Split = "hash"
    origin: str = "bundled"
    left_out: Mapping[str, int] = field(default_factory=dict)

    def of_half(self, half: Half) -> tuple[Prompt, ...]:
        """The rows that may be used to choose, or those that may be used to certify."""
        if self.split != "hash":
            return self.rows if self.split == half else ()
        return tuple(row for row in self.rows if half_of(row.id) == half)


def half_of(row_id: str) -> Half:
    """Which half a row belongs to, for ever: the first bit of its id's SHA-256."""
    return "select" if hashlib.sha256(row_id.encode()).digest()[0] < 128 else "certify"  # noqa: PLR2004 -- one bit


@dataclass
class Home:
    """Where this installation keeps prompts that are not bundled: own packs by name, and `wheels/` of others.

    Set once by whoever starts a process; None where there is no such folder.
    """

    path: Path | None = None


HOME: Final = Home()


def load_pack(name: str, *, home: Path | None = None) -> Pack:
    """Find a pack, read it and verify its digest. Raises PackMissing, PackChanged, PackInvalid."""
    home = home or HOME.path
    if (BUNDLED / name / "manifest.toml").is_file():
        return read_pack(BUNDLED / name, origin="bundled")
    if name in RECIPES:
        from repair.checks.donors import from_recipe  # noqa: PLC0415 - reads YAML and archives only when asked

        if (found := from_recipe(RECIPES[name], home / "wheels" if home else None)) is not None:
            return found
    elif home is not None and (home / name / "manifest.toml").is_file():
        return read_pack(home / name, origin="operator")
    raise PackMissing(f"is not installed; `lora-repair packs add {name}` makes it so", field=name)


def read_pack(folder: Path, *, origin: str) -> Pack:
    """The pack in a folder of that name. Raises PackChanged."""
    name = folder.name
    try:
        manifest = tomllib.loads((folder / "manifest.toml").read_text(encoding="utf-8"))
        content = (folder / "rows.jsonl").read_bytes()
    except (OSError, ValueError) as error:
        raise PackChanged("manifest.toml or rows.jsonl cannot be read", field=name) from error
    digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
    if manifest.get("sha256") != digest:
        raise PackChanged(
            file="rows.jsonl",
            field=name,
            detail=f"it is {digest}, the manifest says {manifest.get('sha256')}",
        )
    found = pack_of(
        name,
        tuple(_parse(name, content)),
        digest=digest,
        version=int(manifest["version"]),
        licence=str(manifest["licence"]),
        kind=str(manifest.get("kind", "")),
        split=manifest.get("split", "hash"),
        left_out=dict(manifest.get("left_out", {})),
        origin=origin,
    )
    if manifest.get("id") != name or list(found.categories) != manifest.get("categories"):
        raise PackChanged("id or categories differ", file="manifest.toml", field=name)
    if found.split not in {"select", "certify", "hash"}:
        raise PackChanged("split is select, certify or hash", file="manifest.toml", field=name)
    return found


def pack_of(name: str, rows: tuple[Prompt, ...], *, version: int = VERSION, **about: Any) -> Pack:
    """A pack of these rows."""
    return Pack(
        name=name, version=version, categories=tuple(sorted({row.category for row in rows})), rows=rows, **about
    )


def jsonl(rows: Iterable[Prompt]) -> bytes:
    """`rows.jsonl`: the bytes that a pack's digest is of."""
    return b"".join(json.dumps(_row(row), ensure_ascii=False, sort_keys=True).encode() + b"\n" for row in rows)


def _row(row: Prompt) -> dict[str, Any]:
    found: dict[str, Any] = {"id": row.id, "text": row.text, "category": row.category}
    return found | ({"answers": list(row.answers)} if row.answers else {})


def _parse(name: str, content: bytes) -> Iterable[Prompt]:
    seen: set[str] = set()
    for line in content.decode("utf-8").splitlines():
        row = json.loads(line)
        if row["id"] in seen:
            raise PackChanged(f"id {row['id']} occurs twice", file="rows.jsonl", field=name)
        seen.add(row["id"])
        yield Prompt(id=row["id"], text=row["text"], category=row["category"], answers=tuple(row.get("answers", ())))


def ordered(rows: Iterable[Prompt], *, seed: int) -> list[Prompt]:
    """A recorded random order in which every prefix holds the categories in equal parts."""

    def lot(*parts: str) -> bytes:
        return hashlib.sha256("\n".join((str(seed), *parts)).encode()).digest()

    by_category: dict[str, list[Prompt]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: lot(row.category, row.id)):
        by_category[row.category].append(row)
    ranked = [
        (place, lot("round", str(place), category), row)
        for category, members in by_category.items()
        for place, row in enumerate(members)
    ]
    return [row for _, _, row in sorted(ranked, key=lambda one: one[:2])]


def manifest_of(name: str, content: bytes) -> str:
    """The manifest text that belongs to these rows."""
    rows = list(_parse(name, content))
    categories = json.dumps(sorted({row.category for row in rows}))
    return (
        f'id = "{name}"\nversion = {VERSION}\nlicence = "{LICENCE}"\nrows = {len(rows)}\n'
        f'sha256 = "sha256:{hashlib.sha256(content).hexdigest()}"\ncategories = {categories}\n'
    )


def pack_digests(names: Iterable[str]) -> dict[str, str]:
    """The digest of each pack; raises PackMissing."""
    return {name: load_pack(name).digest for name in names}


def main() -> None:
    """Write the manifest of every bundled pack."""
    for path in sorted(BUNDLED.glob("*/rows.jsonl")):
        text = manifest_of(path.parent.name, path.read_bytes())
        (path.parent / "manifest.toml").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
