"""Parameters that speak of the adapter's modules: what they say can only be held against an adapter.

A schema marks them with ``x-modules``: *names* for a path or shell pattern, or for a mapping (or pairs) of which every
key is one, and each must fit a module; *count* for a number of modules, which cannot be larger than there are. The API
asks with the modules that an upload was inspected to have, `repair.run` with those of the adapter at that stage.
"""

from collections.abc import Collection, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any, Final

from gate.schema_check import Fault, Schema

MARK: Final = "x-modules"
NAMES: Final = "names"
COUNT: Final = "count"


def misfits(given: Mapping[str, Any], schema: Schema, modules: Collection[str], *, pointer: str = "") -> list[Fault]:
    """What cannot be meant for an adapter with these modules; ``given`` must have the schema's form."""
    found: list[Fault] = []
    for name, value in given.items():
        meaning = schema.get("properties", {}).get(name, {}).get(MARK)
        at = f"{pointer}/{name}"
        if meaning == NAMES:
            found += [Fault(pointer=at, detail=_unknown(one)) for one in _keys(value) if not _fits_any(one, modules)]
        if meaning == COUNT and value is not None and value > len(modules):
            found.append(Fault(pointer=at, detail=f"{value} modules were asked for, the adapter has {len(modules)}"))
    return found


def speaks_of_modules(given: Mapping[str, Any], schema: Schema) -> bool:
    """Whether anything that was given can only be held against an adapter."""
    return any(schema.get("properties", {}).get(name, {}).get(MARK) for name in given)


def fits(module: str, pattern: str) -> bool:
    """Whether a path or shell pattern means this module."""
    return module == pattern or fnmatchcase(module, pattern)


def names_of(inspection: Mapping[str, Any]) -> frozenset[str] | None:
    """The modules of an inspected upload as methods see them, each expert one; None where none were written down."""
    if not inspection.get("modules"):
        return None
    return frozenset(name for module in inspection["modules"] for name in _of(module))


def expert_name(parameter: str, expert: int) -> str:
    """What one matrix of a fused parameter is called: as if its expert were a module."""
    home, _, leaf = parameter.rpartition(".")
    return f"{home}.{expert}.{leaf}"


def _of(module: Mapping[str, Any]) -> Iterator[str]:
    name, experts = str(module["name"]), module.get("experts")
    if experts is None:
        yield name
    else:
        yield from (expert_name(name, expert) for expert in range(experts))


def _keys(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    else:
        yield from (str(key) for key in value) if isinstance(value, Mapping) else (str(pair[0]) for pair in value)


def _fits_any(pattern: str, modules: Collection[str]) -> bool:
    return any(fits(module, pattern) for module in modules)


def _unknown(pattern: str) -> str:
    return f"no module of the adapter is called, or matches, {pattern!r}"
