"""The declared interface of a repair method. `run.py` drives it; the files in `methods/` fill it in.

A method looks at one layer at a time (`assess`), then picks among all of them (`choose`). A method that brings weights
of its own (a patch, a trained refusal LoRA) returns them from `prepare`; they are added by concatenation.
"""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from gate.of_modules import misfits
from gate.schema_check import Fault, Schema, check
from repair.context import RepairContext
from repair.errors import BadParameters
from repair.layer_basis import BasisNeed
from repair.lora import LayerReference, LoraAdapter, LoraLayer
from repair.parameter_rules import Rule

MOST_MODULES = 100_000
"""More than any adapter has: an upper end for counts of modules."""


class Need(StrEnum):
    """What a method must be given besides the adapter."""

    ALIGNED = "aligned"
    """The weights of the aligned model."""
    BASE = "base"
    """The weights of its unaligned base."""
    PATCH = "patch"
    """A refusal LoRA trained for the aligned model."""
    TWIN = "twin"
    """A LoRA for the aligned model that obeys harmful requests."""
    CALIBRATION = "calibration"
    """What the aligned model does on harmful and benign prompts, measured once (`python -m repair calibrate`)."""
    CHAT = "chat"
    """The aligned model loaded, to train on or to listen to."""


class Cost(StrEnum):
    """What a repair of a 7B adapter takes, in one word."""

    SECONDS = "seconds"
    """Reads the adapter only."""
    CHECKPOINTS = "checkpoints"
    """Reads two checkpoints once from disk."""
    TRAINING = "training"
    """Minutes of training on the loaded model."""


class Decision(StrEnum):
    """What became of one module."""

    KEPT = "kept"
    """Looked at and left alone."""
    UNJUDGED = "unjudged"
    """Left alone because nothing could be said about it; the reason tells why."""
    SCALED = "scaled"
    PROJECTED = "projected"
    DROPPED = "dropped"
    """Reverted to the aligned model."""
    PATCHED = "patched"
    """Kept, with a patch concatenated."""
    ADDED = "added"
    """Adapted by the patch only."""


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """What a method thinks of one layer, and what it would put in its place.

    Attributes:
        layer: As uploaded.
        edited: What replaces it when the module is chosen.
        action: What that replacement is called.
        score: What `choose` ranks by; None when the method has no opinion.
        null: The score of an update without any preference, to read the score against.
        unjudged: Why the module cannot be judged; such a module is never chosen.
        added: What is concatenated to the replacement when the module is chosen.
        note: What the verdict says besides, whatever is decided.
    """

    layer: LoraLayer
    edited: LoraLayer
    action: Decision
    score: float | None = None
    null: float | None = None
    unjudged: str | None = None
    added: LoraLayer | None = None
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The modules to edit, and why the others are left alone.

    Attributes:
        names: Modules to edit.
        reason: What the verdict of the others says.
        scores: Scores that could only be told once all modules were known; they replace those of the assessments.
        patched: Modules that get the weights of `prepare`; None for all that those weights name.
    """

    names: frozenset[str]
    reason: str = "not chosen"
    scores: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    patched: frozenset[str] | None = None


@dataclass(frozen=True, kw_only=True)
class Laws:
    """Parameters under which a method promises something; the test suite holds it to each.

    Attributes:
        noop: With these, every tensor stays bit for bit what it was.
        revert: With these, every module goes back to the aligned model; None when the method has no such setting.
        idempotent: With these, a second run changes nothing more; None when it may.
        never_grows: With these, no module gets a larger norm; None when it may.
        trial: What the test suite tries it with where its defaults would train for minutes.
    """

    noop: Mapping[str, Any]
    revert: Mapping[str, Any] | None = None
    idempotent: Mapping[str, Any] | None = None
    never_grows: Mapping[str, Any] | None = field(default_factory=lambda: MappingProxyType({}))
    trial: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, kw_only=True)
class Otherwise:
    """Other needs than the declared ones, where one parameter is not at its default."""

    parameter: str
    needs: frozenset[Need]


class Impossible(ValueError):
    """Parameters that cannot be given together."""

    def __init__(self, fault: Fault) -> None:
        self.fault = fault
        super().__init__(fault.detail)


def _with_rules(schema: dict[str, Any], kind: type["RepairMethod"]) -> None:
    if kind.rules:
        schema["allOf"] = [*schema.get("allOf", ()), *kind.rules]


class RepairMethod(BaseModel, ABC):
    """A way to edit an adapter. Its fields are its parameters; each works with its defaults."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, json_schema_extra=_with_rules)

    name: ClassVar[str]
    version: ClassVar[int]
    paper: ClassVar[str]
    needs: ClassVar[frozenset[Need]]
    cost: ClassVar[Cost]
    laws: ClassVar[Laws]
    otherwise: ClassVar[tuple[Otherwise, ...]] = ()
    rules: ClassVar[tuple[Rule, ...]] = ()
    """What its parameters may not be together; part of the schema that the catalogue carries."""

    @model_validator(mode="after")
    def _rules_hold(self) -> "RepairMethod":
        if self.rules:
            given = self.model_dump(mode="json", exclude_unset=True)
            for fault in check(given, {"allOf": self.rules}, pointer="", root=_schema_of(type(self))):
                raise Impossible(fault)
        return self

    @property
    def demands(self) -> frozenset[Need]:
        """What these parameters need: the declared needs, unless a parameter asks for other ones."""
        fields = type(self).model_fields
        others = (one.needs for one in self.otherwise if getattr(self, one.parameter) != fields[one.parameter].default)
        return next(others, self.needs)

    @property
    def basis_need(self) -> BasisNeed | None:
        """What of a basis pack stands in for both models; None when only their weights will do."""
        return None

    @property
    def packs(self) -> tuple[str, ...]:
        """Prompt packs that these parameters learn from: they are inputs, so provenance names them with digests."""
        return ()

    @property
    def stages(self) -> tuple["RepairMethod", ...]:
        """What is applied, one after the other; a plain method is its own only stage."""
        return (self,)

    def look(self, adapter: LoraAdapter, context: RepairContext) -> RepairContext:  # noqa: ARG002 - interface
        """What the layers are judged in: the context, with what has to be seen of the whole adapter first."""
        return context

    def prepare(self, adapter: LoraAdapter, context: RepairContext) -> LoraAdapter | None:  # noqa: ARG002 - interface
        """Weights to concatenate to the edited adapter, at full strength; None for none."""
        return None

    @abstractmethod
    def assess(self, layer: LoraLayer, reference: LayerReference) -> Assessment:
        """Judge one layer and say what would replace it; must not change its arguments."""

    @abstractmethod
    def choose(self, assessments: Sequence[Assessment]) -> Choice:
        """Pick the modules to edit among those that could be judged."""

    def must_mean(self, modules: Collection[str]) -> None:
        """Raise BadParameters when a parameter speaks of modules that an adapter of these does not have."""
        for fault in misfits(self.model_dump(mode="json"), _schema_of(type(self)), modules):
            raise BadParameters(fault.detail, field=self._field(fault))

    @classmethod
    def parse(cls, parameters: Mapping[str, Any]) -> "RepairMethod":
        """The method with these parameters; raises BadParameters naming the field.

        Held to the schema that it offers first: what would be refused at the door is not taken here either.
        """
        for fault in check(_plain(parameters), _schema_of(cls), pointer=""):
            raise BadParameters(fault.detail, field=cls._field(fault))
        try:
            return cls.model_validate(dict(parameters))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            cause = first.get("ctx", {}).get("error")
            where = ".".join(str(part) for part in first["loc"]) or "parameters"
            raise BadParameters(first["msg"] if cause is None else str(cause), field=f"{cls.name}.{where}") from error

    @classmethod
    def _field(cls, fault: Fault) -> str:
        return f"{cls.name}{fault.pointer.replace('/', '.')}"

    @classmethod
    def catalogue_entry(cls) -> dict[str, Any]:
        """What the service offers about this method, as JSON."""
        whole = _schema_of(cls)
        offered = {key: value for key, value in whole.get("properties", {}).items() if not value.get("local")}
        others = [{"parameter": one.parameter, "needs": sorted(one.needs)} for one in cls.otherwise]
        return {
            **({"otherwise": others} if others else {}),
            "name": cls.name,
            "version": cls.version,
            "summary": (cls.__doc__ or "").strip().split("\n", 1)[0],
            "paper": cls.paper,
            "needs": sorted(cls.needs),
            "local": sorted(whole.get("properties", {}).keys() - offered.keys()),
            "cost": cls.cost.value,
            "parameters": {**whole, "properties": offered},
        }


def _plain(value: Any) -> Any:
    """As JSON has it: a declaration may hold tuples and read-only mappings, a command line paths."""
    if isinstance(value, Mapping):
        return {str(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return str(value) if isinstance(value, Path | Enum) else value


@cache
def _schema_of(kind: type[RepairMethod]) -> Schema:
    """Of all its parameters, those among them that are for this machine only."""
    return kind.model_json_schema()


def untouched(layer: LoraLayer) -> Assessment:
    """The assessment of a method that only concatenates."""
    return Assessment(layer=layer, edited=layer, action=Decision.KEPT)


def unjudged(layer: LoraLayer, why: str) -> Assessment:
    """The assessment of a module that nothing can be said about."""
    return Assessment(layer=layer, edited=layer, action=Decision.KEPT, unjudged=why)
