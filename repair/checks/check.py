"""Check: the declared interface of one measurement.

A check is a class in a file of `kinds/`; it reads evidence and answers with a result. It generates nothing itself,
so that one pass over the prompts serves all of them.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Protocol, runtime_checkable

from repair.checks.evidence import CheckResult, Evidence
from repair.checks.sizes import Kind
from repair.checks.stats import Stop


@runtime_checkable
class Named(Protocol):
    """Whoever is answered for: a check, or a stage that is tested like one."""

    @property
    def name(self) -> str:
        """What reports call it."""

    @property
    def version(self) -> int:
        """Of its definition."""


class Check(ABC):
    """One measurement; `name` is what reports and policies call it."""

    name: ClassVar[str]
    version: ClassVar[int]
    kind: ClassVar[Kind | None] = None  # of the prompts it needs; None when it reads what others asked

    @abstractmethod
    def examine(self, evidence: Evidence) -> CheckResult:
        """What the evidence says."""

    def settled(self, evidence: Evidence) -> Stop:  # noqa: ARG002 - the interface
        """Whether the rows so far already decide; a check that cannot tell lets the suite go on."""
        return Stop.GO_ON

    def promise(self, evidence: Evidence) -> float:  # noqa: ARG002 - the interface
        """How likely a candidate is to get through, by what was seen on select; 1 where a check cannot tell."""
        return 1.0
