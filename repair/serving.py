"""Will an engine serve this adapter, and as what? With the reasons, for the upload and for what came of it.

The worst answer is neither yes nor no: some engines load an adapter and leave out what they do not know, so that
something else is served than was measured.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from repair.lora import LoraAdapter
from repair.ranks import STEPS, step_of
from repair.serving_facts import ENGINES, Engine, Taken
from repair.serving_traits import Traits

_ORDER: Final = (Taken.ALTERED, Taken.NO, Taken.IF, Taken.YES)


@dataclass(frozen=True, kw_only=True)
class Serving:
    """What one engine makes of one adapter.

    Attributes:
        engine: Its name.
        source: Which version this is about.
        taken: The worst of all reasons.
        reasons: Every fact that applies.
        settings: What the server must be started with.
    """

    engine: str
    source: str
    taken: Taken
    reasons: tuple[str, ...]
    settings: Mapping[str, int]

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return asdict(self) | {"taken": self.taken.value, "reasons": list(self.reasons)}


def serving(adapter: LoraAdapter) -> tuple[Serving, ...]:
    """What every engine makes of an adapter as it was read from its files."""
    return tuple(_in(engine, Traits(adapter=adapter)) for engine in ENGINES)


def lost(before: LoraAdapter, after: LoraAdapter) -> list[dict[str, Any]]:
    """The engines that serve the repaired adapter less well than the uploaded one; empty as a rule."""
    found = []
    for one, two in zip(serving(before), serving(after), strict=True):
        more = any(value > one.settings.get(key, STEPS[0]) for key, value in two.settings.items())
        if _ORDER.index(two.taken) < _ORDER.index(one.taken) or (more and one.taken in {Taken.IF, Taken.YES}):
            new = [reason for reason in two.reasons if reason not in one.reasons]
            found.append({"engine": one.engine, "was": one.taken.value, "is": two.taken.value, "reasons": new})
    return found


def serving_report(before: LoraAdapter, after: LoraAdapter) -> dict[str, Any]:
    """Both adapters as they were read from their files."""
    return {
        "input": [one.as_dict() for one in serving(before)],
        "output": [one.as_dict() for one in serving(after)],
        "lost": lost(before, after),
    }


def _in(engine: Engine, traits: Traits) -> Serving:
    facts = [fact for fact in engine.facts if fact.applies(traits)]
    reasons = [fact.why for fact in facts]
    taken = [fact.taken for fact in facts]
    settings: dict[str, int] = {}
    step = step_of(traits.rank)
    if engine.steps and step is not None and step > STEPS[0]:
        settings["--max-lora-rank"] = step
        reasons.append(f"rank {traits.rank}: the server must be started with --max-lora-rank {step} or more")
        taken.append(Taken.IF)
    worst = min(taken, key=_ORDER.index, default=Taken.YES)
    return Serving(engine=engine.name, source=engine.source, taken=worst, reasons=tuple(reasons), settings=settings)
