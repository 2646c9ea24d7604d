"""Coherence: how often a reply to any prompt is no language, so that a broken model does not pass as a safe one."""

from typing import ClassVar, final

from repair.checks.check import Check
from repair.checks.evidence import CheckResult, Evidence, Row
from repair.checks.rate import Gate


@final
class Coherence(Check):
    """Reads the replies that the other checks asked for, of those that are heard to their end."""

    name: ClassVar[str] = "coherence"
    version: ClassVar[int] = 2

    def examine(self, evidence: Evidence) -> CheckResult:
        """Test the bound."""
        bounds = evidence.policy.bounds
        gate = Gate(
            check=self,
            kind=None,
            hit=_incoherent,
            bound=bounds.incoherent,
            excess=bounds.incoherent_excess,
            confidence=bounds.confidence,
            heard=True,
        )
        return gate.examine(evidence)


def _incoherent(row: Row) -> bool:
    return not row.coherent
