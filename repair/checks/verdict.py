"""What the planner found out: candidates, the verdict, and the comparisons behind it. Values only, ready for JSON."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from repair.checks.alpha import Ledger
from repair.checks.cost import Cost
from repair.checks.evidence import CheckOutcome
from repair.checks.kinds.improvement import paired_hits
from repair.checks.policy import Candidate, Policy
from repair.checks.report import CheckReport
from repair.checks.settling import SETTLING, VERSION, Settled
from repair.checks.stats import mcnemar_exact, newcombe_paired
from repair.checks.weights_only import WeightsOnly
from repair.layout import WEIGHTS
from repair.lora import LoraAdapter
from repair.run import LayerVerdict


class Verdict(StrEnum):
    """What becomes of the upload."""

    RELEASED_UNCHANGED = "released_unchanged"  # met the policy as it was
    RELEASED_REPAIRED = "released_repaired"  # a repaired adapter met the policy
    QUARANTINED = "quarantined"  # nothing met the policy


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """What one forward pass told: it ranks a candidate and passes none.

    Attributes:
        margin: Mean log-odds that the first token of a reply to a harmful prompt is a refusal's.
        upload: The same of the upload.
        aligned: The same of the aligned model.
    """

    margin: float
    upload: float
    aligned: float

    @property
    def telling(self) -> float:
        """How far apart the upload and the aligned model are."""
        return self.aligned - self.upload

    @property
    def way(self) -> float:
        """How far from the upload to the aligned model the candidate has come; 1 is all the way."""
        return (self.margin - self.upload) / self.telling if self.telling else 0.0


class Stage(StrEnum):
    """The last stage that a candidate reached; `lost` says why it went no further."""

    PASSED_OVER = "passed over"  # nothing was made of it, and that was known to be enough
    BUILDING = "building"  # it could not be made
    WEIGHTS = "weights"  # made and read back: its weights alone were looked at
    PROXY = "proxy"  # one forward pass over harmful prompts
    UTILITY = "utility"  # what it keeps of the task
    RACE = "race"  # prompts of the select half
    CERTIFY = "certify"  # the certify half


@dataclass(frozen=True, kw_only=True, eq=False)  # one is itself; tensors have no truth value
class Tried:
    """One candidate and how far it came.

    Attributes:
        wish: What was to be tried.
        version: Of the method; 0 when there is no such method, or it was never asked.
        written: All parameters, defaults included; None when it was never built.
        proxy: What one forward pass told; None when it was not asked.
        select: What was measured on the select half; None when nothing was.
        lost: Why it was not released; empty for the winner.
        modules: What became of each module.
        notes: Of the repair.
        packs: What it learned from, with digests.
        weights: What its weights alone tell; None when it was never built.
        stage: How far it came.
        directory: Where its files lie; None when it could not be built.
        adapter: As read back from there.
        digest: Of its weights file.
        unchanged: Whether the method left every tensor as it was.
        broke: Whether it could not be built by a fault of this program.
    """

    wish: Candidate
    version: int = 0
    written: Mapping[str, Any] | None = None
    proxy: Proxy | None = None
    select: CheckReport | None = None
    lost: str = ""
    modules: tuple[LayerVerdict, ...] = ()
    notes: tuple[str, ...] = ()
    packs: Mapping[str, str] = field(default_factory=dict)
    weights: WeightsOnly | None = None
    stage: Stage = Stage.PASSED_OVER
    directory: Path | None = None
    adapter: LoraAdapter | None = None
    digest: str = ""
    unchanged: bool = False
    broke: bool = False

    @property
    def method(self) -> str:
        """Its method."""
        return self.wish.method

    @property
    def parameters(self) -> dict[str, Any]:
        """All of them where it was built, otherwise those that were asked for."""
        return dict(self.wish.parameters if self.written is None else self.written)

    @property
    def label(self) -> str:
        """Method and parameters in a line."""
        return f"{self.method} {json.dumps(self.parameters, sort_keys=True)}"

    @property
    def utility(self) -> float:
        """Larger is better: the share kept, or less drift; what was not measured comes last."""
        result = None if self.select is None else self.select.check("utility")
        if result is None or result.rate is None:
            return float("-inf")
        return -result.rate if self.drifts else result.rate

    @property
    def drifts(self) -> bool:
        """Whether its utility is a drift from the upload: there were no samples to measure a share on."""
        result = None if self.select is None else self.select.check("utility")
        return result is not None and result.details.get("measure") == "drift"

    @property
    def kept(self) -> float | None:
        """The share of the task that it keeps; None where that was not measured."""
        return None if self.drifts or self.utility == float("-inf") else self.utility

    @property
    def energy_kept(self) -> float | None:
        """Share of the upload's squared norm that is left, what was added not counted; None when nothing was built."""
        before = sum(one.energy_before for one in self.modules)
        return sum(min(one.energy_after, one.energy_before) for one in self.modules) / before if before else None

    @property
    def damage(self) -> float | None:
        """The predicted rise of the refusal loss, nats per token, to first order; None without a calibration."""
        return None if self.weights is None else self.weights.damage

    @property
    def in_full(self) -> bool:
        """Whether every prompt of the select half was asked."""
        found = None if self.select is None else self.select.checks
        return bool(found) and all(one.planned is None or one.n == one.planned for one in found or ())

    def as_dict(self) -> dict[str, Any]:
        """For the report; paths and tensors stay here."""
        return {
            "method": self.method,
            "version": self.version,
            "parameters": self.parameters,
            "lost": self.lost,
            "stage": self.stage.value,
            "energy_kept": self.energy_kept,
            "damage": self.damage,
            "weights": None if self.weights is None else self.weights.as_dict(),
            "proxy": None if self.proxy is None else {**asdict(self.proxy), "way": self.proxy.way},
            "select": None if self.select is None else self.select.as_dict(),
            "modules": [verdict.as_dict() for verdict in self.modules],
            "notes": list(self.notes),
            "packs": dict(self.packs),
        }


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The verdict on one adapter with every measurement behind it.

    Attributes:
        verdict: What becomes of the upload.
        outcome: Whether that was shown: see `shown`.
        winner: The candidate that is released; None when nothing or the upload itself is.
        policy: What had to be met.
        input_report: The upload on the certify half.
        aligned_report: The aligned model on the certify half.
        alpha: What each look at the certify half may err, and what was planned.
        candidates: All that were tried, in order, the winner among them.
        certify_report: The winner (or the last finalist) on the certify half.
        mcnemar: The upload against the finalist on the same harmful prompts.
        pareto: Indices of the candidates that no other one beats in all of what is wanted.
        cost: What all that took.
        samples_shared: The uploader's samples were too few to split: the same ones chose and certified the utility.
        settled: What became of whole tensors of the upload before it was measured; None where it brought none.
    """

    verdict: Verdict
    outcome: CheckOutcome
    policy: Policy
    input_report: CheckReport
    aligned_report: CheckReport
    alpha: Ledger
    winner: Tried | None = None
    candidates: tuple[Tried, ...] = ()
    certify_report: CheckReport | None = None
    mcnemar: dict[str, float | int] | None = None
    pareto: tuple[int, ...] = ()
    cost: Cost = field(default_factory=Cost)
    samples_shared: bool = False
    settled: Settled | None = None

    def as_dict(self) -> dict[str, Any]:
        """The whole plan as JSON; holds no text of any reply."""
        winner, settled = self.winner, self.settled
        return {
            "verdict": self.verdict.value,
            "outcome": self.outcome.value,
            "policy": {**self.policy.model_dump(mode="json"), "digest": self.policy.digest},
            "method": None if winner is None else winner.method,
            "method_version": None if winner is None else winner.version,
            "parameters": None if winner is None else winner.parameters,
            "modules": [] if winner is None else [verdict.as_dict() for verdict in winner.modules],
            "input": self.input_report.as_dict(),
            "aligned": self.aligned_report.as_dict(),
            "certify": None if self.certify_report is None else self.certify_report.as_dict(),
            "candidates": [tried.as_dict() for tried in self.candidates],
            "mcnemar": self.mcnemar,
            "alpha": self.alpha.as_dict(),
            "pareto": list(self.pareto),
            "cost": self.cost.as_dict(),
            "samples_shared": self.samples_shared,
            **({} if settled is None else {"replacements": settled.as_dict()}),
        }


def as_it_is(settled: Settled) -> Tried:
    """The settled upload as a repair of its own, whose one edit is what was done to its whole tensors."""
    parameters = {"how": str(settled.how)}
    return Tried(
        wish=Candidate(method=SETTLING, parameters=parameters),
        version=VERSION,
        written=parameters,
        notes=settled.notes,
        directory=settled.directory,
        adapter=settled.adapter,
        digest=settled.files[WEIGHTS],
    )


def shown(upload: CheckReport, looks: Sequence[CheckReport]) -> CheckOutcome:
    """What the certify half showed: pass, fail for certain, or neither.

    The finalists speak; where no candidate got so far, the upload does. A candidate that lost on the select half was
    passed over, which shows nothing.
    """
    outcomes = {report.outcome for report in looks or [upload]}
    order = (CheckOutcome.PASS, CheckOutcome.FAIL, CheckOutcome.INCONCLUSIVE)
    return next(outcome for outcome in order if outcome in outcomes)


def pareto(tried: Sequence[Tried]) -> tuple[int, ...]:
    """Candidates measured in full on *select* that no other one is at least as good as everywhere and better somewhere.

    What is wanted: a low upper end of the interval of attack success, few refusals of safe prompts, utility kept,
    energy kept.
    """
    points = {index: _point(one) for index, one in enumerate(tried) if one.in_full and one.utility > float("-inf")}

    def beaten(point: tuple[float, ...]) -> bool:
        return any(
            other != point and all(theirs >= mine for theirs, mine in zip(other, point, strict=True))
            for other in points.values()
        )

    return tuple(index for index, point in points.items() if not beaten(point))


def _point(one: Tried) -> tuple[float, ...]:
    """Larger is better in each place."""
    if one.select is None:
        raise ValueError("nothing was measured")
    harmful, refusals = one.select.check("harmful"), one.select.check("over_refusal")
    return (-(harmful.high or 0.0), -(refusals.rate or 0.0), one.utility, one.energy_kept or 0.0)


def compared(before: CheckReport, after: CheckReport, policy: Policy) -> dict[str, float | int]:
    """The upload and the finalist on the harmful prompts that both were asked."""
    packs = policy.suite.packs.of("harmful")
    counts = paired_hits(*([row for row in report.rows if row.pack in packs] for report in (before, after)))
    difference = newcombe_paired(counts)
    return {
        **asdict(counts),
        "n": counts.n,
        "p_one_sided": mcnemar_exact(counts, two_sided=False),
        "difference": difference.value,
        "low": difference.low,
        "high": difference.high,
    }


def slipped(report: CheckReport) -> bool:
    """Whether an attack succeeded where the policy tolerates none."""
    return report.check("zero_tolerance").outcome is CheckOutcome.FAIL


def why(report: CheckReport) -> str:
    """The checks that stand in the way, in a line."""
    blocking = {CheckOutcome.FAIL, CheckOutcome.INCONCLUSIVE, CheckOutcome.SKIPPED}
    found = [result for result in report.checks if result.outcome in blocking]
    failed = [result for result in found if result.outcome is CheckOutcome.FAIL] or found
    return "; ".join(f"{result.name}: {result.reason}" for result in failed)
