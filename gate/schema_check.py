"""Check a value against the JSON Schemas that our own pydantic models print; nothing more of JSON Schema.

The schema is ours and trusted, the value is not. The API asks at the door, `repair.method` when a method is made: both
hold parameters to the same words. A keyword that this file does not know is an error when the catalogue is loaded, so
no constraint is ever skipped in silence.

One keyword is our own: ``x-ordered: [a, b]``, a must be less than b; JSON Schema has no word for two properties that
are compared. One that was not given counts with the default that the root schema names for it.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Schema = Mapping[str, Any]
_ANNOTATIONS = {
    "title",
    "description",
    "default",
    "examples",
    "deprecated",
    "$defs",
    "discriminator",
    "format",
    "x-modules",  # enforced in `of_modules.py`, once the adapter is known
}
_TYPES: dict[str, Callable[[Any], bool]] = {
    "object": lambda value: isinstance(value, dict),
    "array": lambda value: isinstance(value, list),
    "string": lambda value: isinstance(value, str),
    "boolean": lambda value: isinstance(value, bool),
    "null": lambda value: value is None,
    # NaN and infinity pass every comparison below the wrong way round, so they are no numbers here.
    "number": lambda value: _is_number(value) and math.isfinite(value),
    "integer": lambda value: _is_number(value) and math.isfinite(value) and value == int(value),
}
_SCHEMAS = ("items", "additionalProperties", "not", "if", "then")
_BOUNDS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "minimum": (lambda value, bound: value >= bound, "must be at least {}"),
    "maximum": (lambda value, bound: value <= bound, "must be at most {}"),
    "exclusiveMinimum": (lambda value, bound: value > bound, "must be more than {}"),
    "exclusiveMaximum": (lambda value, bound: value < bound, "must be less than {}"),
    "multipleOf": (lambda value, bound: value % bound == 0, "must be a multiple of {}"),
    "minLength": (lambda value, bound: len(value) >= bound, "must have at least {} characters"),
    "maxLength": (lambda value, bound: len(value) <= bound, "must have at most {} characters"),
    "pattern": (lambda value, bound: re.search(bound, value) is not None, "must match {}"),
    "minItems": (lambda value, bound: len(value) >= bound, "must have at least {} items"),
    "maxItems": (lambda value, bound: len(value) <= bound, "must have at most {} items"),
    "uniqueItems": (lambda value, bound: not bound or _unique(value), "must not repeat an item"),
}
_KNOWN = {
    "type", "enum", "const", "$ref", "anyOf", "oneOf", "allOf", "properties", "required", "not", "if", "then",
    "additionalProperties", "items", "prefixItems", "x-ordered", *_BOUNDS,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that is wrong, as a JSON pointer and a sentence."""

    pointer: str
    detail: str


def unknown_keywords(schema: Any) -> set[str]:
    """Keywords in a schema, at any depth, that `check` would not enforce."""
    if not isinstance(schema, dict):
        return set()
    found = set(schema) - _KNOWN - _ANNOTATIONS
    for name in ("properties", "$defs"):
        for inner in schema.get(name, {}).values():
            found |= unknown_keywords(inner)
    for name in ("anyOf", "oneOf", "allOf", "prefixItems"):
        for inner in schema.get(name, []):
            found |= unknown_keywords(inner)
    return found.union(*(unknown_keywords(schema.get(name)) for name in _SCHEMAS))


def check(value: Any, schema: Schema, *, pointer: str, root: Schema | None = None) -> list[Fault]:
    """Everything that is wrong with ``value``, each with a JSON pointer below ``pointer``."""
    return list(_errors(value, schema, pointer, schema if root is None else root))


def _errors(value: Any, schema: Schema, at: str, root: Schema) -> Iterator[Fault]:
    if "$ref" in schema:
        yield from _errors(value, root["$defs"][str(schema["$ref"]).rpartition("/")[2]], at, root)
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not any(_TYPES[kind](value) for kind in kinds):
        yield Fault(pointer=at, detail=f"must be of type {' or '.join(kinds)}")
        return
    if "enum" in schema and not any(_same(value, allowed) for allowed in schema["enum"]):
        yield Fault(pointer=at, detail=f"must be one of {schema['enum']}")
    if "const" in schema and not _same(value, schema["const"]):
        yield Fault(pointer=at, detail=f"must be {schema['const']!r}")
    yield from _combined(value, schema, at, root)
    yield from _conditional(value, schema, at, root)
    yield from _bounded(value, schema, at)
    if isinstance(value, dict):
        yield from _object_errors(value, schema, at, root)
    if isinstance(value, list):
        yield from _array_errors(value, schema, at, root)


def _combined(value: Any, schema: Schema, at: str, root: Schema) -> Iterator[Fault]:
    for inner in schema.get("allOf", []):
        yield from _errors(value, inner, at, root)
    choices = schema.get("anyOf") or schema.get("oneOf") or []
    found = [list(_errors(value, inner, at, root)) for inner in choices]
    if found and all(found):
        # The branch with the deepest complaint is the one the caller most likely meant.
        yield from max(found, key=lambda errors: max(error.pointer.count("/") for error in errors))


def _conditional(value: Any, schema: Schema, at: str, root: Schema) -> Iterator[Fault]:
    """Rules between properties. Their own description is what is said: what broke is the sentence, not one value."""
    says = schema.get("description")
    if "not" in schema and not any(_errors(value, schema["not"], at, root)):
        yield Fault(pointer=at, detail=says or "must not be this")
    if "if" in schema and not any(_errors(value, schema["if"], at, root)):
        for fault in _errors(value, schema.get("then", {}), at, root):
            yield Fault(pointer=fault.pointer, detail=says or fault.detail)
    if "x-ordered" in schema and isinstance(value, dict):
        first, second = schema["x-ordered"]
        low, high = (_given(value, name, root) for name in (first, second))
        if _is_number(low) and _is_number(high) and not low < high:
            last = first if first in value else second
            yield Fault(pointer=f"{at}/{_escape(last)}", detail=says or f"{first} must be less than {second}")


def _given(value: Mapping[str, Any], name: str, root: Schema) -> Any:
    return value.get(name, root.get("properties", {}).get(name, {}).get("default"))


def _bounded(value: Any, schema: Schema, at: str) -> Iterator[Fault]:
    for keyword, (holds, sentence) in _BOUNDS.items():
        if keyword in schema and _applies(keyword, value) and not holds(value, schema[keyword]):
            yield Fault(pointer=at, detail=sentence.format(schema[keyword]))


def _applies(keyword: str, value: Any) -> bool:
    if keyword in {"minLength", "maxLength", "pattern"}:
        return isinstance(value, str)
    if keyword in {"minItems", "maxItems", "uniqueItems"}:
        return isinstance(value, list)
    return _is_number(value)


def _object_errors(value: dict[str, Any], schema: Schema, at: str, root: Schema) -> Iterator[Fault]:
    properties = schema.get("properties", {})
    for name in schema.get("required", []):
        if name not in value:
            yield Fault(pointer=f"{at}/{_escape(name)}", detail="is missing")
    for name, inner in value.items():
        place = f"{at}/{_escape(name)}"
        others = schema.get("additionalProperties", True)
        if name in properties:
            yield from _errors(inner, properties[name], place, root)
        elif others is False:
            yield Fault(pointer=place, detail=f"is not known here; known are {sorted(properties)}")
        elif isinstance(others, dict):
            yield from _errors(inner, others, place, root)


def _array_errors(value: list[Any], schema: Schema, at: str, root: Schema) -> Iterator[Fault]:
    first = schema.get("prefixItems", [])
    for index, item in enumerate(value):
        inner = first[index] if index < len(first) else schema.get("items", {})
        if inner is not False:
            yield from _errors(item, inner or {}, f"{at}/{index}", root)
        else:
            yield Fault(pointer=f"{at}/{index}", detail="is one item too many")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _same(value: Any, other: Any) -> bool:
    """Equality of JSON: `true` is not 1."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _unique(values: list[Any]) -> bool:
    return all(item not in values[:index] for index, item in enumerate(values))


def _escape(name: str) -> str:
    return name.replace("~", "~0").replace("/", "~1")
