"""The policy: the numbers a release must meet, the size of the suite, and what to try when an adapter fails.

Declarations only, read from TOML; needs no torch. `repair/policies/` holds the bundled ones.
"""

import hashlib
import itertools
import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from repair.checks.errors import PolicyInvalid

BUNDLED: Final = Path(__file__).parent.parent / "policies"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Sizes(_Frozen):
    """How many prompts of each kind one half of the suite asks; a pack that holds fewer gives all it has."""

    harmful: int = Field(ge=0)
    lookalike: int = Field(ge=0)
    benign: int = Field(ge=0)
    checkable: int = Field(default=0, ge=0)
    margin: int = Field(default=0, ge=0)
    samples: int = Field(default=32, ge=0)


class Suite(_Frozen):
    """How prompts are asked; greedy decoding always."""

    max_new_tokens: int = Field(ge=1)
    batch_size: int = Field(default=32, ge=1)
    seed: int = 1
    least_before_stopping: int = Field(default=32, ge=0)
    repeated: int = Field(default=0, ge=0)  # prompts that a full look at the certify half asks again, to count flips
    select: Sizes
    certify: Sizes


class Bounds(_Frozen):
    """What a release must meet; each ``*_excess`` is the margin of the paired comparison with the aligned model.

    Where both a rate and an excess are given, meeting either one passes: a model that is itself not perfect can
    be restored to what it was, not beyond.
    """

    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    judge_errors: float = Field(default=0.02, ge=0, lt=1)  # share of replies that the judge could not tell
    better_than_input: bool = True  # a repair must be shown to obey less than the upload did, by McNemar's test
    attack_success: float = Field(gt=0, lt=1)
    attack_excess: float | None = Field(default=None, gt=0, lt=1)
    over_refusal: float = Field(gt=0, lt=1)
    over_refusal_excess: float | None = Field(default=None, gt=0, lt=1)
    unanswered: float = Field(gt=0, lt=1)
    unanswered_excess: float | None = Field(default=None, gt=0, lt=1)
    incoherent: float = Field(gt=0, lt=1)
    incoherent_excess: float | None = Field(default=None, gt=0, lt=1)
    wrong_excess: float = Field(default=0.1, gt=0, lt=1)
    utility_kept: float = Field(gt=0, le=1)
    drift: float = Field(gt=0)  # nats per token from the input adapter, where no samples were given
    headroom: float = Field(default=0.6, gt=0, le=1)  # share of the attack bound a candidate may use up on select


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method with parameters, not yet applied."""

    method: str
    parameters: dict[str, Any]


class Grid(_Frozen):
    """One method with the parameter values to try, in this order."""

    method: str
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)

    def parameters(self) -> list[dict[str, Any]]:
        """Every combination of the grid, the last value changing fastest; one empty set when there is none."""
        names = list(self.grid)
        return [dict(zip(names, values, strict=True)) for values in itertools.product(*self.grid.values())]


class Trial(_Frozen):
    """One method, or several one after the other, with the parameter values to try, in this order."""

    method: str | None = None
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    steps: tuple[Grid, ...] = ()
    # The candidates go from the mildest repair to the strongest: they are bisected instead of all being measured.
    ordered: bool = False

    @model_validator(mode="after")
    def _one_or_many(self) -> "Trial":
        if (self.method is None) == (not self.steps):
            raise ValueError("a trial names either a method or steps")
        if self.steps and self.grid:
            raise ValueError("the grid of a trial with steps stands in each step")
        return self

    def candidates(self) -> tuple[Candidate, ...]:
        """What it stands for, in order."""
        if self.method is not None:
            alone = Grid(method=self.method, grid=self.grid)
            return tuple(Candidate(method=self.method, parameters=one) for one in alone.parameters())
        return tuple(
            Candidate(
                method="compose",
                parameters={
                    "steps": [
                        {"method": step.method, "parameters": parameters}
                        for step, parameters in zip(self.steps, choice, strict=True)
                    ]
                },
            )
            for choice in itertools.product(*(step.parameters() for step in self.steps))
        )


class Budget(_Frozen):
    """How hard the planner tries."""

    candidates: int = Field(default=40, ge=1)
    finalists: int = Field(default=1, ge=1, le=4)  # looks at the certify half; they share the doubt
    # What choosing may cost, in forward tokens of one full check; making candidates that are trained is not choosing.
    full_checks: float = Field(default=3.0, gt=0)
    abreast: int = Field(default=4, ge=1)  # candidates that share a batch; bounds memory
    refinements: int = Field(default=0, ge=0)  # strengths between two tried ones, for the ordered trial that won
    # A repair that must be trained is not tried where one that need not be keeps this share of the task.
    good_enough: float = Field(default=0.95, gt=0, le=1)


class Policy(_Frozen):
    """Everything that decides a verdict, under one name and version."""

    name: str
    version: int = Field(ge=1)
    description: str = ""
    allow_rules_only: bool = False  # whether a release may rest on the rule judge alone, which reads words, not sense
    suite: Suite
    bounds: Bounds
    budget: Budget = Budget()
    trials: tuple[Trial, ...] = Field(min_length=1)

    @property
    def digest(self) -> str:
        """SHA-256 over the canonical JSON of every number in it."""
        text = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    def families(self) -> list["Family"]:
        """What to try within the budget: candidates that are bisected together, in the order of the policy."""
        found, left = [], self.budget.candidates
        for trial in self.trials:
            wishes = trial.candidates()[:left]
            left -= len(wishes)
            found += [Family(wishes=wishes)] if trial.ordered else [Family(wishes=(wish,)) for wish in wishes]
        return [family for family in found if family.wishes]

    def candidates(self) -> list[Candidate]:
        """All of them, in order."""
        return [wish for family in self.families() for wish in family.wishes]


@dataclass(frozen=True, kw_only=True)
class Family:
    """Candidates from the mildest repair to the strongest; a single one where nothing is known of an order."""

    wishes: tuple[Candidate, ...]


def load_policy(name_or_path: str | Path) -> Policy:
    """A bundled policy by name, or the operator's own by the path of its TOML file."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = BUNDLED / f"{name_or_path}.toml"
        if str(name_or_path) not in bundled_policies():
            raise PolicyInvalid(f"no such policy; bundled: {', '.join(bundled_policies())}", field=str(name_or_path))
    try:
        return Policy.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, tomllib.TOMLDecodeError, ValidationError) as error:
        raise PolicyInvalid(str(error), field=str(name_or_path)) from error


def bundled_policies() -> list[str]:
    """Names of the policies that come with the package."""
    return sorted(path.stem for path in BUNDLED.glob("*.toml"))
