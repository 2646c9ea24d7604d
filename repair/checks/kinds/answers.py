"""Answers: how often a question with a checkable answer is answered wrong."""

from typing import ClassVar, final

from repair.checks.check import Check
from repair.checks.evidence import CheckResult, Evidence, Row
from repair.checks.rate import Gate
from repair.checks.sizes import Kind


@final
class Answers(Check):
    """Not more often wrong than the aligned model, by the policy's margin; small models are wrong often.

    Without a margin no questions are asked.
    """

    name: ClassVar[str] = "answers"
    version: ClassVar[int] = 1
    kind: ClassVar[Kind | None] = "checkable"

    def examine(self, evidence: Evidence) -> CheckResult:
        """Test the excess."""
        bounds = evidence.policy.bounds
        margin = 1.0 if bounds.wrong_excess is None else bounds.wrong_excess
        gate = Gate(
            check=self,
            kind=self.kind,
            hit=_wrong,
            bound=margin,
            excess=bounds.wrong_excess,
            confidence=bounds.confidence,
        )
        return gate.examine(evidence)


def _wrong(row: Row) -> bool:
    return not row.correct
