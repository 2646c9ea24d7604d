"""What is in a weights file, once it was judged, and what its names look like."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from gate.config_rules import is_module
from gate.errors import Refused, Rule
from gate.names import WEIGHTS_FILE as FILE

PREFIX = "base_model.model."
Shapes = Mapping[str, tuple[int, ...]]
# Names that PEFT's own wrappers use: within a path they would let one tensor pose as another.
_RESERVED = frozenset({"base_model", "base_layer", "modules_to_save", "original_module", "token_adapter"})


class ModuleKind(StrEnum):
    """Which kind of module is adapted."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    """In = vocabulary, out = dimension; the base model stores the transpose."""


class ExtraKind(StrEnum):
    """What a tensor that is no low-rank factor replaces."""

    MODULE = "module"
    """A whole weight: `modules_to_save`, or an adapted embedding saved with its base weight."""
    BIAS = "bias"
    """A bias of the base model."""
    TOKENS = "tokens"
    """Rows of an embedding."""


@dataclass(frozen=True, kw_only=True)
class ModuleRecord:
    """One adapted module, or one parameter that holds a matrix for each expert.

    Attributes:
        name: Path in the base model, without ``.weight``.
        rank: Inner dimension of the factors.
        out_features: Rows of the update.
        in_features: Columns of the update.
        dtype: Number format of the factors.
        kind: Linear or embedding.
        scale: What ``B @ A`` is multiplied with.
        experts: How many matrices a fused parameter holds, each with factors of its own; None for one matrix.
    """

    name: str
    rank: int
    out_features: int
    in_features: int
    dtype: str
    kind: ModuleKind
    scale: float
    experts: int | None = None


@dataclass(frozen=True, kw_only=True)
class ExtraRecord:
    """A tensor that replaces something of the base model as a whole."""

    key: str
    kind: ExtraKind
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Everything that is in a weights file, in the order of the names."""

    modules: tuple[ModuleRecord, ...]
    extras: tuple[ExtraRecord, ...]


def module_of(name: str, ending: str, *, key: str = "") -> str:
    """The module that a name belongs to; ``key`` is the whole of it, for messages."""
    path = name.removesuffix(ending)
    module = path.removeprefix(PREFIX)
    segments = module.split(".")
    reserved = any(part in _RESERVED or part.startswith("lora_") for part in segments)
    if module == path or not is_module(module) or reserved:
        raise refusal(Rule.UNEXPECTED_TENSOR, key or name, "the name is not of the form that PEFT writes")
    return module


def refusal(rule: Rule, key: str, detail: str) -> Refused:
    """Of the weights file, naming a tensor or module of it."""
    return Refused(rule, detail, file=FILE, field=key)
