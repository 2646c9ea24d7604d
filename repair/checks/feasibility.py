"""Whether so many prompts could ever show what a policy demands: the arithmetic behind a refusal to load one.

Numbers in, sentences out. A bound that not even a perfect adapter could meet decides nothing, it only quarantines; it
is better to hear so before an hour of measuring than after it.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

from repair.checks.stats import clopper_pearson_upper, least_pairs, least_trials


@dataclass(frozen=True, kw_only=True)
class Demand:
    """One rate that a policy wants to be low.

    Attributes:
        field: Of the policy, where the bound stands.
        kind: Of prompts that are asked.
        n: How many are asked on the certify half.
        bound: The rate must be shown to be at most this.
        excess: Or shown to exceed the aligned model's by less than this; None where that does not suffice.
        excess_field: Where that stands.
        judged: Whether the bound is divided by the judge's sensitivity, which is itself known from labels only.
    """

    field: str
    kind: str
    n: int
    bound: float
    excess: float | None = None
    excess_field: str = ""
    judged: bool = False

    def of(self, n: int) -> "Demand":
        """The same, read from so many prompts."""
        return replace(self, n=n)


def share(doubt: float, *, excess: bool, judged: bool) -> float:
    """The part of a gate's doubt that each of its statements gets: the rate, the excess, the judge's sensitivity.

    The first two are two ways to be released, and the last one is relied on by both; any of them being wrong releases
    what should not be, so they share.
    """
    return doubt / (1 + excess + judged)


def unreachable(demand: Demand, *, doubt: float, sensitivity: float = 1.0) -> Iterator[tuple[str, str]]:
    """The fields that could never be met with so much doubt, each with the reason."""
    if demand.n == 0:
        yield demand.field, f"it decides a release, and no {demand.kind} prompts are asked on the certify half"
        return
    sure = 1 - share(doubt, excess=demand.excess is not None, judged=demand.judged)
    how = f"at {_percent(sure)}" + ("" if sensitivity >= 1 else f", by a judge who sees {_percent(sensitivity)}")
    if sensitivity <= 0:
        yield demand.field, "the judge was not measured to see any of it"
        return
    least = clopper_pearson_upper(0, demand.n, confidence=sure) / sensitivity
    if least > demand.bound:
        needed = least_trials(bound=demand.bound, confidence=sure, sensitivity=sensitivity)
        reached = f"with no hit at all the bound is {_percent(least)} {how}; {needed} are needed"
        yield demand.field, f"{demand.n} prompts cannot certify {_percent(demand.bound)}: {reached}"
    if demand.excess is not None and least >= demand.excess:
        needed = least_pairs(margin=demand.excess * sensitivity, confidence=sure)
        reached = f"where both arms never differ it may still be {_percent(least)} {how}; {needed} are needed"
        yield demand.excess_field, f"{demand.n} pairs cannot show an excess below {_percent(demand.excess)}: {reached}"


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"
