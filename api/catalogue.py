"""What this service offers: methods, policies and suites, out of the generated `catalogue.json`.

The classes in `repair/` print the file (`python -m repair methods --json`), so the API offers exactly what the worker
can run and needs no torch to say so. A job is checked here, at the door, not an hour later.
"""

import json
import tomllib
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from api.problems import FieldError, Kind, Problem
from api.trials import NoTrials, tried
from gate.of_modules import misfits
from gate.schema_check import Fault, check, unknown_keywords

PATH: Final = Path(__file__).with_name("catalogue.json")
WIDENING: Final = frozenset({"patch", "chat"})
"""Who needs one of these may adapt modules that the upload does not."""
COMPOSE: Final = "compose"
"""The method whose parameters are other methods; each is held against the catalogue like one asked for alone."""
REFUSE: Final = "refuse"
"""What a policy does with whole tensors of an upload unless it says otherwise."""
REMEDIES: Final[Mapping[str, str]] = {
    "base": "register the pair under another name, `lora-repair reference add NAME --aligned DIR --base DIR`",
    "patch": "give it one, `lora-repair reference add {reference} --aligned DIR [--base DIR] --patch DIR`",
    "twin": "give it one, `lora-repair reference add {reference} --aligned DIR [--base DIR] --twin DIR`",
    "calibration": "have it measured once, `lora-repair reference prepare {reference}`",
}
"""What an operator does about a part that a reference is without."""


class Otherwise(BaseModel):
    """Needs in the place of the method's own, where a parameter is not at its default."""

    model_config = ConfigDict(frozen=True)

    parameter: str
    needs: list[str]


class Method(BaseModel):
    """One way to edit an adapter; `parameters` is the JSON Schema of what a job may set."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    version: int | str
    summary: str = ""
    paper: str | None = Field(default=None, description="Where the method is defined")
    needs: list[str] = Field(
        default=[], description="What the method needs: aligned, base, patch, twin, calibration, chat"
    )
    otherwise: list[Otherwise] = Field(default=[], description="Parameters that ask for something else")
    cost: str = Field(
        default="",
        description="Of a 7B adapter: seconds, checkpoints (reads two models once) or training (minutes)",
    )
    local: list[str] = Field(default=[], description="Parameters that only an operator's own files may set: paths")
    parameters: dict[str, Any] = Field(
        default={},
        description="JSON Schema of the parameters, with what they may not be together under `allOf`. `x-modules` "
        "marks a count of the adapter's modules, or names of them; `x-ordered: [a, b]` wants a < b",
    )

    def needs_with(self, given: Mapping[str, Any]) -> list[str]:
        """What it needs with these parameters."""
        known = self.parameters.get("properties", {})
        others = (one for one in self.otherwise if one.parameter in given)
        return next(
            (one.needs for one in others if given[one.parameter] != known.get(one.parameter, {}).get("default")),
            self.needs,
        )


class Policy(BaseModel):
    """The numbers that a release must meet; further keys are the policy's own."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str
    replacements: str = Field(
        default="refuse",
        description="What becomes of whole tensors that travel with an upload: refuse, drop, revert, interpolate=SHARE",
    )


class Suite(BaseModel):
    """A versioned set of checks and prompts; further keys are the suite's own."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str


Named = TypeVar("Named", Method, Policy)


class Catalogue(BaseModel):
    """Everything a job may ask for."""

    model_config = ConfigDict(frozen=True)

    methods: list[Method]
    policies: list[Policy]
    suites: list[Suite] = []

    @classmethod
    def load(cls, path: Path = PATH) -> Self:
        """Read the generated file; raises ValueError when a schema uses what we cannot enforce."""
        catalogue = cls.model_validate(json.loads(path.read_text("utf-8")))
        for method in catalogue.methods:
            unknown = unknown_keywords(method.parameters)
            if unknown:
                raise ValueError(f"{path}: method {method.name}: unknown JSON Schema keywords {sorted(unknown)}")
        return catalogue

    def with_policies_of(self, folder: Path) -> Self:
        """This catalogue and the operator's own policies, `NAME.toml` each; one of a bundled name stands before it.

        Read at every request, so that a new file counts at once. A file that is no TOML, or no policy, is not offered:
        the worker would refuse it too.
        """
        own: dict[str, Policy] = {}
        for path in sorted(folder.glob("*.toml")):
            try:
                numbers = tomllib.loads(path.read_text("utf-8"))
                own[path.stem] = Policy.model_validate({**numbers, "name": path.stem})
            except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, ValidationError):
                continue
        bundled = [policy for policy in self.policies if policy.name not in own]
        return self.model_copy(update={"policies": [*bundled, *own.values()]})

    @property
    def settles(self) -> bool:
        """Whether any policy takes an upload that replaces whole tensors of the model."""
        return any(policy.replacements != REFUSE for policy in self.policies)

    def policy(self, name: str) -> Policy:
        """The policy of this name; raises a 422 problem."""
        return _pick(self.policies, name, pointer="/policy")

    def method(self, name: str) -> Method:
        """The method of this name; raises a 422 problem."""
        return _pick(self.methods, name, pointer="/method")

    def validate_wish(self, *, policy: str | None, method: str | None, parameters: Mapping[str, Any]) -> None:
        """Hold a wish against the catalogue; raises a 422 problem that names every wrong parameter.

        What the policy would try is held to it too: a file of the operator's may ask for what no method takes.
        """
        if policy is not None:
            self._validate_policy(self.policy(policy))
        if method is None:
            if parameters:
                raise _wrong([FieldError(pointer="/parameters", detail="parameters need a method")])
            return
        if errors := self.faults(self.method(method), parameters, pointer="/parameters"):
            raise _wrong([FieldError(pointer=error.pointer, detail=error.detail) for error in errors])

    def validate_whole(self, policy: str, inspection: Mapping[str, Any]) -> None:
        """Refuse an upload that replaces whole tensors where the policy does; ``inspection`` is the gate's account."""
        extras = inspection.get("extras") or ()
        if extras and self.policy(policy).replacements == REFUSE:
            taken = sorted(one.name for one in self.policies if one.replacements != REFUSE)
            others = f"policies that settle them first: {', '.join(taken)}" if taken else "no policy here settles them"
            detail = f"the upload replaces whole tensors ({extras[0]['key']}), which {policy} refuses; {others}"
            raise _wrong([FieldError(pointer="/policy", detail=detail)])

    def faults(self, method: Method, parameters: Mapping[str, Any], *, pointer: str) -> list[Fault]:
        """Everything that is wrong with the parameters of a method, those of its steps among them."""
        wrong = check(dict(parameters), method.parameters, pointer=pointer)
        if wrong or method.name != COMPOSE:
            return wrong
        steps = enumerate(parameters.get("steps", ()))
        return [fault for at, step in steps for fault in self._step_faults(step, f"{pointer}/steps/{at}")]

    def _step_faults(self, step: Mapping[str, Any], pointer: str) -> list[Fault]:
        name = step["method"]
        offered = {entry.name: entry for entry in self.methods if entry.name != COMPOSE}
        if name not in offered:
            known = ", ".join(sorted(offered))
            return [Fault(pointer=f"{pointer}/method", detail=f"{name!r} is no step; offered are: {known}")]
        return check(dict(step.get("parameters", {})), offered[name].parameters, pointer=f"{pointer}/parameters")

    def _validate_policy(self, policy: Policy) -> None:
        """Raise for the first thing among a policy's trials that could never be built."""
        for field, detail in self.policy_faults(policy):
            place = f"{policy.name}.toml: {field}: {detail}"
            extra = {"file": f"{policy.name}.toml", "field": field, "rule": "policy-invalid"}
            raise _wrong([FieldError(pointer="/policy", detail=place)], extra=extra)

    def policy_faults(self, policy: Policy) -> Iterator[tuple[str, str]]:
        """What of a policy's trials no method takes: the field and the reason."""
        offered = {entry.name: entry for entry in self.methods}
        try:
            for field, name, parameters in tried(policy.model_dump()):
                if name not in offered:
                    yield field, f"no method is called {name}; offered are: {', '.join(sorted(offered))}"
                    continue
                local = offered[name].local
                given = {key: value for key, value in parameters.items() if key not in local}
                for fault in self.faults(offered[name], given, pointer=""):
                    yield field, f"{name}{fault.pointer.replace('/', '.')}: {fault.detail}"
        except NoTrials as error:
            yield error.fault.pointer.strip("/").replace("/", "."), error.fault.detail

    def validate_modules(
        self, method: str | None, parameters: Mapping[str, Any], modules: Collection[str], *, adapter: str
    ) -> None:
        """Refuse parameters that speak of modules which the adapter does not have.

        What stands behind a step that may adapt further modules (one with a patch, one that trains) is left to the
        worker, which knows them by then.
        """
        stages = [] if method is None else [(method, parameters, "/parameters")]
        if method == COMPOSE:
            stages = [
                (str(step["method"]), step.get("parameters", {}), f"{where}/parameters")
                for step, where in _steps(method, parameters)
            ]
        for name, given, pointer in stages:
            if wrong := misfits(given, self.method(name).parameters, modules, pointer=pointer):
                told = [FieldError(pointer=one.pointer, detail=f"{one.detail}: adapter {adapter}") for one in wrong]
                raise _wrong(told)
            if WIDENING & set(self.method(name).needs):
                return

    def validate_needs(
        self, method: str | None, parameters: Mapping[str, Any], given: Mapping[str, object], *, reference: str
    ) -> None:
        """Refuse a method that needs what the reference lacks, and say how to give it.

        ``given`` holds a digest, or None, for each part.
        """
        asked = [] if method is None else [(method, parameters)]
        asked += [(str(one["method"]), one.get("parameters", {})) for step in asked for one, _ in _steps(*step)]
        for name, chosen in asked:
            missing = [need for need in self.method(name).needs_with(chosen) if need in given and given[need] is None]
            if missing:
                how = "; ".join(REMEDIES[part].format(reference=reference) for part in missing if part in REMEDIES)
                detail = f"{name} needs {' and '.join(missing)}, which this reference is without: {how}"
                raise _wrong([FieldError(pointer="/method", detail=detail)], rule="missing-reference")


def _steps(method: str, parameters: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]]:
    """What a composition is made of, each with its place in the request; nothing for any other method."""
    if method != COMPOSE:
        return []
    return [(step, f"/parameters/steps/{place}") for place, step in enumerate(parameters.get("steps", ()))]


def _pick(offered: list[Named], name: str, *, pointer: str) -> Named:
    for entry in offered:
        if entry.name == name:
            return entry
    known = ", ".join(sorted(entry.name for entry in offered))
    told = FieldError(pointer=pointer, detail=f"{name!r} is not offered; offered are: {known}")
    raise _wrong([told], rule="not-offered")


def _wrong(
    errors: list[FieldError], *, rule: str = "bad-parameters", extra: Mapping[str, str] | None = None
) -> Problem:
    """422 with the place of the first error, as every refusal names it; a wish comes in no file."""
    field = errors[0].pointer.strip("/").replace("/", ".")
    place = {"file": "", "field": field, "rule": rule} if extra is None else dict(extra)
    detail = f"This cannot be ordered. {place['field']}: {errors[0].detail}"
    return Problem(422, Kind.INVALID_WISH, detail, errors=errors, extra=place)
