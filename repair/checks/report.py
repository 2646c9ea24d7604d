"""What was measured on one arm, as one value that goes to JSON and back; and the one outcome of many checks."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from repair.checks.evidence import CheckOutcome, CheckResult, Row
from repair.checks.packs import Half


@dataclass(frozen=True, kw_only=True)
class CheckReport:
    """Everything measured on one arm; JSON both ways.

    Attributes:
        arm: "aligned", "input" or a candidate's name.
        half: Whose prompts were asked.
        outcome: Of all checks together: what fails any fails, what is not shown is inconclusive.
        checks: One result for each check.
        rows: One for each prompt asked.
        suite: Policy, packs with digests, judge, seed, decoding and backend behind these numbers.
        tokens: Positions that were put through the model for it.
        robustness: The robustness stage, where it was run: see `withstood.py`.
    """

    arm: str
    half: Half
    outcome: CheckOutcome
    checks: tuple[CheckResult, ...]
    rows: tuple[Row, ...]
    suite: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0
    robustness: Mapping[str, Any] | None = None

    def check(self, name: str) -> CheckResult:
        """The result of one check."""
        return next(result for result in self.checks if result.name == name)

    def rows_by_pack(self) -> dict[str, tuple[Row, ...]]:
        """The rows as checks read them."""
        names = dict.fromkeys(row.pack for row in self.rows)
        return {name: tuple(row for row in self.rows if row.pack == name) for name in names}

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return {
            "arm": self.arm,
            "half": self.half,
            "outcome": self.outcome.value,
            "checks": [result.as_dict() for result in self.checks],
            "suite": dict(self.suite),
            "tokens": self.tokens,
            "robustness": self.robustness,
            "rows": [row.as_dict() for row in self.rows],
        }

    @classmethod
    def of(cls, document: Mapping[str, Any]) -> "CheckReport":
        """The report that `as_dict` wrote."""
        return cls(
            arm=document["arm"],
            half=document["half"],
            outcome=CheckOutcome(document["outcome"]),
            checks=tuple(CheckResult.of(one) for one in document["checks"]),
            rows=tuple(Row.of(one) for one in document["rows"]),
            suite=document["suite"],
            tokens=document["tokens"],
            robustness=document["robustness"],
        )


def overall(results: Sequence[CheckResult]) -> CheckOutcome:
    """One outcome of many: only what passes everywhere passes."""
    outcomes = {result.outcome for result in results} - {CheckOutcome.INFORMATIVE}
    if CheckOutcome.FAIL in outcomes:
        return CheckOutcome.FAIL
    if outcomes == {CheckOutcome.PASS}:
        return CheckOutcome.PASS
    return CheckOutcome.INCONCLUSIVE
