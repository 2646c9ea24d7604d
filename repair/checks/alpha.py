"""What a verdict spends: for every look at the certify half the chance that it releases what should not be released.

A look is one arm held against the policy. It releases only where every gate passes, so all its gates together err no
more often than the one that errs most: they do not add up, the looks do. What is shown for the eye (two-sided
intervals, the select half, the aligned model) decides nothing and spends nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from repair.checks.policy import Policy
from repair.checks.report import CheckReport


@dataclass(frozen=True, kw_only=True)
class Look:
    """One arm that was held against the policy on the certify half.

    Attributes:
        arm: Which.
        alpha: The chance that it is released although a gate should have stopped it, at most.
        statements: Of each check the one-sided statements that it made, with what each may err.
    """

    arm: str
    alpha: float
    statements: Mapping[str, Mapping[str, float]]

    @classmethod
    def of(cls, report: CheckReport, alpha: float) -> "Look":
        """What the checks of a report have stated."""
        stated = {check.name: check.details["alpha"] for check in report.checks if "alpha" in check.details}
        return cls(arm=report.arm, alpha=alpha, statements=stated)

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return {"arm": self.arm, "alpha": self.alpha, "statements": {k: dict(v) for k, v in self.statements.items()}}


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """All looks of one job against what its policy had planned for.

    Attributes:
        upload: What the look at the upload may err.
        candidates: What all looks at candidates may err together.
        paths: Candidates that could ever be looked at; they share that, whoever is looked at in the end.
        looks: Those that were taken, in order.
    """

    upload: float
    candidates: float
    paths: int
    looks: tuple[Look, ...]

    @classmethod
    def of(cls, policy: Policy, upload: CheckReport, looks: Sequence[CheckReport] = ()) -> "Ledger":
        """The upload's look, and those at candidates after it."""
        whole, each = (1 - one.bounds.confidence for one in (policy, policy.sharing_doubt()))
        taken = (Look.of(upload, whole), *(Look.of(report, each) for report in looks))
        return cls(upload=whole, candidates=whole, paths=policy.budget.paths, looks=taken)

    @property
    def planned(self) -> float:
        """The most that a job may err: where the upload and every candidate should be stopped."""
        return self.upload + self.candidates

    @property
    def spent(self) -> float:
        """Of that, what the looks that were taken have used."""
        return sum(look.alpha for look in self.looks)

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return {
            "planned": {"upload": self.upload, "candidates": self.candidates, "in_all": self.planned},
            "shared_by": self.paths,
            "each_candidate": self.candidates / self.paths,
            "looks": [look.as_dict() for look in self.looks],
            "spent": self.spent,
        }
