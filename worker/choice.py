"""What the statement says of the choice: the Pareto set with its numbers, the winner, and why each other one lost.

Short on purpose, for a statement is carried about: parameters by digest, words cut to a length, and no more candidates
than `MOST`. Everything else stands in the report, which the artifact holds and the signature covers.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Final

import rfc8785

from worker.plain import plain

if TYPE_CHECKING:
    from repair.checks.planner import Plan, Tried

MOST: Final = 200
"""Candidates that are told one by one; the winner and the Pareto set always are."""
LONGEST: Final = 200
"""Characters of a name or a reason."""


def choice_of(plan: Plan) -> dict[str, Any]:
    """Of one plan; places are those of the report's ``candidates``."""
    winner = next((place for place, one in enumerate(plan.candidates) if one is plan.winner), None)
    first = {place for place in (*plan.pareto, winner) if place is not None}
    others = [place for place in range(len(plan.candidates)) if place not in first]
    told = sorted([*first, *others[: max(0, MOST - len(first))]])
    return {
        "considered": len(plan.candidates),
        "told": len(told),
        "winner": winner,
        "pareto": list(plan.pareto),
        "candidates": [{"place": place, **_told(plan.candidates[place])} for place in told],
    }


def _told(one: Tried) -> dict[str, Any]:
    """One candidate in a few lines; numbers are those of the select half, null where they were not measured."""
    found: dict[str, Any] = {
        "method": _methods(one),
        "version": str(one.version),
        "parameters": {"sha256": hashlib.sha256(rfc8785.dumps(plain(one.parameters))).hexdigest()},
        "stage": one.stage.value,
        "lost": _cut(one.lost),
        **_numbers(one),
    }
    return found


def _methods(one: Tried) -> str:
    """The method, or the names of the steps of a composition."""
    steps = one.parameters.get("steps")
    named = [str(step.get("method")) for step in steps if isinstance(step, dict)] if isinstance(steps, list) else []
    return _cut(" + ".join(named) or one.method)


def _numbers(one: Tried) -> dict[str, Any]:
    """What the Pareto set is over: the upper end of attack success, refusals, what was kept of task and energy."""
    select = one.select
    harmful, refusals, utility = (
        (None, None, None) if select is None else map(select.check, ("harmful", "over_refusal", "utility"))
    )
    drift = utility is not None and utility.details.get("measure") == "drift"
    rate = None if utility is None else utility.rate
    found = {
        "attackSuccessUpTo": None if harmful is None else harmful.high,
        "overRefusal": None if refusals is None else refusals.rate,
        "utilityKept": None if drift else rate,
        "drift": rate if drift else None,
        "energyKept": one.energy_kept,
    }
    cleaned: dict[str, Any] = plain(found)
    return cleaned


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}\u2026"
