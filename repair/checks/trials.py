"""What a policy tries when an adapter fails: methods with the parameter values to try. Declarations only."""

import itertools
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Frozen(BaseModel):
    """A part of a policy: no unknown field, no change."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A method with parameters, not yet applied."""

    method: str
    parameters: dict[str, Any]


class Grid(Frozen):
    """One method with the parameter values to try, in this order."""

    method: str
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)

    def parameters(self) -> list[dict[str, Any]]:
        """Every combination of the grid, the last value changing fastest; one empty set when there is none."""
        names = list(self.grid)
        return [dict(zip(names, values, strict=True)) for values in itertools.product(*self.grid.values())]


class Trial(Frozen):
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


@dataclass(frozen=True, kw_only=True)
class Family:
    """Candidates from the mildest repair to the strongest; a single one where nothing is known of an order."""

    wishes: tuple[Candidate, ...]
