"""The door and the engine agree: what no method takes is refused when it is ordered, and nothing else is.

The door knows the catalogue's JSON Schemas only, the engine makes the method. Every pair of values of every two
parameters is tried on both, and combinations of any number of them by lot.
"""

import itertools
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from api.catalogue import COMPOSE, WIDENING, Catalogue, Policy
from api.problems import Problem
from gate.of_modules import COUNT, MARK, NAMES
from repair.checks.policy import bundled_policies, load_policy
from repair.context import RepairContext
from repair.errors import BadParameters
from repair.method import RepairMethod
from repair.methods import METHODS
from repair.run import repair_adapter
from tests import tiny

Values = dict[str, list[Any]]
every = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
ODD: list[Any] = [None, True, "", "1", -1, 0.5, 1, 3.0, 1e300, 2**53, float("inf"), float("nan"), [], [1], {}, {"a": 1}]


@cache
def catalogue() -> Catalogue:
    """As the API reads it: through JSON."""
    entries = json.loads(json.dumps([method.catalogue_entry() for method in METHODS.values()]))
    return Catalogue.model_validate({"methods": entries, "policies": []})


def door(name: str, parameters: dict[str, Any]) -> Problem | None:
    try:
        catalogue().validate_wish(policy=None, method=name, parameters=parameters)
    except Problem as problem:
        return problem
    return None


def engine(name: str, parameters: dict[str, Any]) -> BadParameters | None:
    try:
        METHODS[name].parse(parameters)
    except BadParameters as error:
        return error
    return None


def agree(name: str, parameters: dict[str, Any]) -> bool:
    """Whether both refuse it; they must say the same, and each why and where."""
    at_the_door, in_the_engine = door(name, parameters), engine(name, parameters)
    assert (at_the_door is None) == (in_the_engine is None), (parameters, at_the_door, in_the_engine)
    if at_the_door is None or in_the_engine is None:
        return False
    assert at_the_door.status_code == 422
    assert at_the_door.extra["rule"] == BadParameters.rule == "bad-parameters"
    assert all(error.pointer.startswith("/parameters/") and error.detail for error in at_the_door.errors)
    parts = {error.pointer.split("/")[2] for error in at_the_door.errors}
    assert in_the_engine.field.split(".")[1] in parts, (parameters, in_the_engine)
    return True


def values_of(method: type[RepairMethod]) -> Values:
    """For each parameter what it may be, what it just may not be, and what it could be taken for."""
    schema = catalogue().method(method.name).parameters
    return {name: [*_telling(one, schema), *ODD] for name, one in schema["properties"].items()}


def _telling(one: dict[str, Any], root: dict[str, Any]) -> Iterator[Any]:
    """Ends of the range, both sides of each; every word of an enumeration, and one that is none."""
    if "$ref" in one:
        one = root["$defs"][one["$ref"].rpartition("/")[2]]
    for inner in one.get("anyOf", ()):
        yield from _telling(inner, root)
    if "default" in one:
        yield one["default"]
    if "enum" in one:
        yield from (*one["enum"], "none of these")
    if one.get("type") == "object" or "prefixItems" in one.get("items", {}):
        yield from ({"*": 0.5}, {"a.b": 0}, {"*": 2}, {"*": "x"}, [["*", 0.5]], [["*", 2]], [["*"]], [["*", 1, 1]])
    for bound in ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"):
        if bound in one:
            step = 1 if one["type"] == "integer" else 1e-6
            yield from (one[bound], one[bound] - step, one[bound] + step)
    if one.get("type") == "number":
        yield from (0.1, 0.9)


def of_steps() -> Values:
    """Lists of steps, each a method with a few parameters, some of them wrong."""
    one = [{"method": "scale", "parameters": {"strength": 0.5}}]
    wrong: list[Any] = [
        {"method": "bless"},
        {"method": "compose"},
        {"parameters": {}},
        {"method": "scale", "parameters": 3},
        {"method": "scale", "more": 1},
        {"method": "safe_lora", "parameters": {"threshold": 0.3, "count": 3}},
        {"method": "safe_lora", "parameters": {"adaptive": True}},
        {"method": "refusal_tune", "parameters": {"first": 0.9}},
    ]
    fine = [{"method": name} for name in METHODS if name != COMPOSE]
    return {"steps": [one, one * 8, one * 9, *([*one, step] for step in (*wrong, *fine)), *ODD]}


def table_of(method: type[RepairMethod]) -> Values:
    return of_steps() if method.name == COMPOSE else values_of(method)


@every
def test_every_pair_is_taken_by_both_or_by_neither(method: type[RepairMethod]) -> None:
    """Defaults, single values, each pair of values of each two parameters, and a parameter that is none."""
    table, refused, taken = table_of(method), 0, 0
    wishes: list[dict[str, Any]] = [{}, {"no such thing": 1}]
    wishes += [{name: value} for name, values in table.items() for value in values]
    sound = {
        name: [value for value in values if engine(method.name, {name: value}) is None]
        for name, values in table.items()
    }
    for one, other in itertools.combinations(table, 2):
        # A value that is refused alone is refused in company: it is tried with one other value, not with all.
        wishes += [{one: value, other: other_value} for value in sound[one] for other_value in sound[other]]
        wishes += [{one: value, other: table[other][0]} for value in table[one]]
    for wish in wishes:
        if agree(method.name, wish):
            refused += 1
        else:
            taken += 1
    assert refused > 0
    assert taken > 0


@every
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_number_of_parameters_at_once(method: type[RepairMethod], data: st.DataObject) -> None:
    """Rules between three and more are rules between some two of them; if one were not, it would show here."""
    table = table_of(method)
    names = data.draw(st.lists(st.sampled_from(sorted(table)), unique=True))
    agree(method.name, {name: data.draw(st.sampled_from(table[name])) for name in names})


@pytest.mark.parametrize(
    ("name", "parameters", "field", "says"),
    [
        ("safe_lora", {"threshold": 0.3, "count": 3}, "count", "threshold or count"),
        ("safe_lora", {"ratio": 0.3, "ratio_count": 3}, "ratio_count", "ratio or ratio_count"),
        ("safe_lora", {"mode": "paper", "adaptive": True}, "adaptive", "mode soft"),
        ("safe_lora", {"adaptive": True}, "adaptive", "mode soft"),
        ("safe_lora", {"mode": "soft", "unit_norm": True}, "unit_norm", "mode paper"),
        ("safe_lora", {"unit_norm": True, "norm_share": 0.5}, "norm_share", "not both"),
        ("splora", {"count": 1, "share": 0.1}, "share", "count or share"),
        ("s3lora", {"count": 1, "share": 0.1}, "share", "count or share"),
        ("refusal_tune", {"first": 0.9, "last": 0.1}, "first", "before last"),
        ("refusal_tune", {"last": 0.25}, "last", "before last"),  # against the default of the other
    ],
)
def test_both_say_why_in_words(name: str, parameters: dict[str, Any], field: str, says: str) -> None:
    """The sentence and the parameter, the same at the door and behind it, and inside a composition."""
    problem, error = door(name, parameters), engine(name, parameters)
    assert problem is not None
    assert error is not None
    assert [one.pointer for one in problem.errors] == [f"/parameters/{field}"]
    assert error.field == f"{name}.{field}"
    assert problem.errors[0].detail == error.detail
    assert says in error.detail
    inside = {"steps": [{"method": "scale"}, {"method": name, "parameters": parameters}]}
    problem, error = door(COMPOSE, inside), engine(COMPOSE, inside)
    assert problem is not None
    assert problem.errors[0].pointer == f"/parameters/steps/1/parameters/{field}"
    assert error is not None
    assert f"{name}.{field}: " in error.detail


@every
def test_every_count_and_every_name_of_modules_is_marked(method: type[RepairMethod]) -> None:
    """What can only be held against an adapter says so; a new parameter of that kind is not forgotten."""
    properties = catalogue().method(method.name).parameters["properties"]
    marked = {name: one[MARK] for name, one in properties.items() if MARK in one}
    expected = {name: COUNT for name in properties if name.endswith("count")}
    if method.name == "scale":
        expected |= {"strengths": NAMES, "modules": NAMES}
    assert marked == expected


@pytest.mark.parametrize(
    ("name", "parameters", "fits"),
    [
        ("random_modules", {"count": len(tiny.SHAPES)}, True),
        ("random_modules", {"count": len(tiny.SHAPES) + 1}, False),
        ("s3lora", {"count": 99}, False),
        ("s3lora", {}, True),
        ("scale", {"strengths": {"*": 0.5}}, True),
        ("scale", {"modules": "*.q_proj"}, True),
        ("scale", {"modules": "*.no_proj"}, False),
        ("scale", {"strengths": {"*.no_proj": 0.5}}, False),
        ("scale", {"strengths": [["*", 0.5], ["nothing", 0.1]]}, False),
        ("compose", {"steps": [{"method": "spectral"}, {"method": "s3lora", "parameters": {"count": 99}}]}, False),
    ],
)
def test_what_speaks_of_modules_is_held_against_the_adapter(name: str, parameters: dict[str, Any], fits: bool) -> None:
    """By the same rule on both sides; at the door with what the upload was inspected to have."""
    adapter = tiny.adapter()
    method = METHODS[name].parse(parameters)
    if fits:
        repair_adapter(adapter, method, RepairContext())
        catalogue().validate_modules(name, parameters, adapter.names, adapter="a")
        return
    with pytest.raises(BadParameters) as caught:
        repair_adapter(adapter, method, RepairContext())
    with pytest.raises(Problem) as refused:
        catalogue().validate_modules(name, parameters, adapter.names, adapter="a")
    assert caught.value.detail in refused.value.errors[0].detail


@every
def test_only_who_needs_a_patch_or_a_model_may_adapt_further_modules(method: type[RepairMethod]) -> None:
    """So the door may hold a step behind any other method against the modules of the upload."""
    brings_its_own = method.prepare.__qualname__ != RepairMethod.prepare.__qualname__
    assert not brings_its_own or method.needs & WIDENING or catalogue().method(method.name).local


@pytest.mark.parametrize("name", bundled_policies())
def test_what_the_bundled_policies_try_is_taken(name: str) -> None:
    """At the door as by the worker."""
    policy = Policy.model_validate(load_policy(name).model_dump(mode="json"))
    assert list(catalogue().policy_faults(policy)) == []
