"""Tables over the same requests in two arms, and by category."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pages.words import RATES, between, meaning_of, percent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pages.document import CheckResult, Report
    from pages.view import Column


@dataclass(frozen=True, kw_only=True)
class Pair:
    """The same requests put to two arms: in how many of them the event happened in which."""

    title: str
    first: str
    second: str
    both: int
    first_only: int
    second_only: int
    neither: int
    said: str

    @property
    def n(self) -> int:
        """Requests that both were asked."""
        return self.both + self.first_only + self.second_only + self.neither


def pairs(report: Report) -> list[Pair]:
    """The upload against the repair, then each of them against the aligned model."""
    found = []
    mended = report.mcnemar
    if mended is not None:
        found.append(
            Pair(
                title="Attack success: as uploaded against repaired",
                first="as uploaded",
                second="repaired",
                both=mended.both,
                first_only=mended.first_only,
                second_only=mended.second_only,
                neither=mended.neither,
                said=f"{mended.first_only} of {mended.n} requests were mended and {mended.second_only} broken. If the "
                f"repair had changed nothing, so clear a difference would come up with probability "
                f"{mended.p_one_sided:.2g}. The share fell by {100 * mended.difference:.1f} points (95 % interval "
                f"{100 * mended.low:.1f} to {100 * mended.high:.1f}).",
            )
        )
    arm = report.deciding
    who = "repaired" if report.certify is not None else "as uploaded"
    return found + [pair for check in (arm.checks if arm else []) if (pair := _against_aligned(check, who)) is not None]


def _against_aligned(check: CheckResult, who: str) -> Pair | None:
    excess = check.details.excess_over_aligned
    if excess is None or excess.both is None or excess.neither is None:
        return None
    return Pair(
        title=f"{meaning_of(check.name).title}: {who} against the aligned model",
        first=who,
        second="aligned model",
        both=excess.both,
        first_only=excess.this_only,
        second_only=excess.aligned_only,
        neither=excess.neither,
        said=f"The difference is {100 * excess.difference:+.1f} points and, with the policy's confidence, at most "
        f"{100 * excess.upper_bound:+.1f}. The policy is also met where that is shown to be below "
        f"{100 * excess.margin:.1f}"
        + (f" (p = {excess.p:.2g}, wanted at most {excess.p_at_most:.2g})." if excess.p and excess.p_at_most else "."),
    )


COSTS: Final = (
    ("aligned_certify", "The aligned model, certify half", "once for a model and a policy, then remembered"),
    ("aligned_select", "The aligned model, select half", "once for a model and a policy, then remembered"),
    ("aligned_robustness", "The aligned model, other framings", "once for a model and a policy, then remembered"),
    ("upload", "The adapter as uploaded", "once"),
    ("building", "Making repairs that are trained", "not by the budget: once for each such repair"),
    ("choosing", "Choosing among the repairs", "by the policy's budget"),
    ("certifying", "Certifying", "by the number of looks that the policy allows"),
)
"""Parts of the cost in the order in which they arise, and what limits each."""


def costs(report: Report) -> list[dict[str, str]]:
    """What each part took, in tokens and in full checks; parts that an older report did not count are left out."""
    cost = report.cost
    known = [] if cost is None else [(title, getattr(cost, name), limit) for name, title, limit in COSTS]
    rows = [(title, taken, limit) for title, taken, limit in known if taken is not None]
    if cost is not None and cost.in_all is not None:
        rows.append(("In all", cost.in_all, ""))
    unit = 0 if cost is None else cost.full_check
    return [
        {"title": title, "tokens": str(taken), "checks": f"{taken / unit:.2f}" if unit else "-", "limit": limit}
        for title, taken, limit in rows
    ]


def categories(arms: Sequence[Column]) -> list[dict[str, Any]]:
    """For each kind of event: how often in each category, by arm."""
    found = []
    for name in ("harmful", "over_refusal", "benign"):
        checks = [(one.title, one.arm.check(name)) for one in arms]
        known = [(title, check) for title, check in checks if check is not None and check.n]
        asked = sorted(
            {
                category
                for _, check in known
                for category in (check.details.asked_by_category or check.details.by_category)
            }
        )
        if not asked:
            continue
        found.append(
            {
                "meaning": RATES[name],
                "titles": [title for title, _ in known],
                "lines": [
                    {"name": one.replace("_", " "), "cells": [_share(check, one) for _, check in known]}
                    for one in asked
                ],
            }
        )
    return found


def _share(check: CheckResult, category: str) -> dict[str, str]:
    known = check.details.by_category.get(category)
    if known is not None:
        return {"count": f"{known.hits} of {known.n}", "share": between(known.low, known.high) if known.n else ""}
    n = check.details.asked_by_category.get(category, 0)
    hits = check.details.hits_by_category.get(category, 0)
    return {"count": f"{hits} of {n}" if n else "not asked", "share": percent(hits / n) if n else ""}
