"""What a policy would try, read out of its TOML without the engine: each method with each set of its parameters."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from gate.schema_check import Fault


class _Grid(BaseModel):
    """One method with the values to try; a grid that is not given is the defaults alone."""

    model_config = ConfigDict(frozen=True)

    method: str
    grid: dict[str, tuple[Any, ...]] = {}


class _Trial(BaseModel):
    """One method, or several that are applied one after the other."""

    model_config = ConfigDict(frozen=True)

    method: str | None = None
    grid: dict[str, tuple[Any, ...]] = {}
    steps: tuple[_Grid, ...] = ()


class _Trials(BaseModel):
    model_config = ConfigDict(frozen=True)

    trials: tuple[_Trial, ...] = ()


class NoTrials(Exception):
    """What a policy would try cannot be read."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.detail)
        self.fault = fault


def tried(policy: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Where in the policy it stands, the method and its parameters, for each that alone or as a step is tried.

    A step is judged by itself, so combinations of steps are not gone through. Raises NoTrials.
    """
    try:
        trials = _Trials.model_validate({"trials": policy.get("trials", ())}).trials
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        pointer = "".join(f"/{step}" for step in first["loc"])
        raise NoTrials(Fault(pointer=pointer, detail=str(first["msg"]))) from error
    for place, trial in enumerate(trials):
        alone = () if trial.method is None else (_Grid(method=trial.method, grid=trial.grid),)
        for at, grid in enumerate(alone or trial.steps):
            where = f"trials.{place}" if alone else f"trials.{place}.steps.{at}"
            for values in itertools.product(*grid.grid.values()):
                yield where, grid.method, dict(zip(grid.grid, values, strict=True))
