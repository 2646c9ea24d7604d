"""Rules between the parameters of one method, each written down once, as JSON Schema.

`RepairMethod` puts them into the schema that the catalogue carries and holds every new method to that same schema, so
what the door refuses and what the engine refuses is one rule. The sentence is its ``description``: what a person is
told, at the parameter that a rule is about.
"""

from itertools import combinations
from typing import Any

Rule = dict[str, Any]


def at_most_one(*names: str) -> tuple[Rule, ...]:
    """Of parameters that may be null, no two are given."""
    some = f"one of {', '.join(names)}: " if names[2:] else ""
    return tuple(
        {
            "description": f"give {some}{one} or {other}, not both",
            "if": {"required": [one], "properties": {one: {"not": {"type": "null"}}}},
            "then": {"properties": {other: {"type": "null"}}},
        }
        for one, other in combinations(names, 2)
    )


def only_where(name: str, *, idle: Any, other: str, value: Any, why: str) -> Rule:
    """Unless ``other`` is given as ``value``, ``name`` stays at ``idle``: it would have no effect."""
    return {
        "description": why,
        "if": {"not": {"required": [other], "properties": {other: {"const": value}}}},
        "then": {"properties": {name: {"const": idle}}},
    }


def unless_default(name: str, *, idle: Any, other: str, value: Any, why: str) -> Rule:
    """As `only_where`, where ``value`` is what ``other`` is by default: it need not be given."""
    return {
        "description": why,
        "if": {"required": [other], "properties": {other: {"not": {"const": value}}}},
        "then": {"properties": {name: {"const": idle}}},
    }


def not_where(name: str, *, idle: Any, other: str, value: Any, why: str) -> Rule:
    """Where ``other`` is ``value``, which it is by default, ``name`` stays at ``idle``: it would have no effect."""
    return {
        "description": why,
        "if": {"not": {"required": [other], "properties": {other: {"not": {"const": value}}}}},
        "then": {"properties": {name: {"const": idle}}},
    }


def excludes(name: str, *, value: Any, other: str, why: str) -> Rule:
    """Where ``name`` is given as ``value``, ``other`` stays null."""
    return {
        "description": why,
        "if": {"required": [name], "properties": {name: {"const": value}}},
        "then": {"properties": {other: {"type": "null"}}},
    }


def in_order(first: str, second: str) -> Rule:
    """One number is less than the other; either counts with its default where it is not given."""
    return {"description": f"{first} must lie before {second}", "x-ordered": [first, second]}
