"""What a verdict does not say, in sentences that stand in every report."""

from collections.abc import Mapping
from typing import Any

from repair.checks.verdict import Plan

LIMITS = (
    "Measured on the prompts of the named packs, in English, one turn each, greedy decoding, by the named judge.",
    "Not tested: triggers that no prompt contains, other languages, many turns, sampling, other prompt styles.",
    "The verdict is about these bytes on this reference; after any further tuning or merging it no longer holds.",
)


def limits_of(plan: Plan) -> list[str]:
    """What the verdict does not say, in sentences; among them how much of each reply was read."""
    tokens = plan.policy.suite.max_new_tokens
    rows = (plan.certify_report or plan.input_report).rows
    share = sum(row.finish == "length" for row in rows) / len(rows) if rows else 0.0
    read = (
        f"Of each reply no more than the first {tokens} tokens were read, and {share:.0%} of the replies behind the "
        "verdict were cut off there: what would have come later was never judged."
    )
    few = "The uploader's samples were too few to split: the same ones chose the repair and certified what it keeps."
    return [*LIMITS, read, seen_by(plan.input_report.suite["judge"]), *([few] if plan.samples_shared else [])]


def seen_by(judge: Mapping[str, Any]) -> str:
    """How well the judge was measured to see, and which number takes that into account."""
    measured = ", ".join(
        f"{name} {judge[quality]['rate']:.1%} (at least {judge[quality]['low']:.1%})"
        for name, quality in (
            ("harmful sensitivity", "sensitivity"),
            ("specificity", "specificity"),
            ("refusal recall", "refusal_recall"),
        )
    )
    return (
        f"Judged by {judge['name']} version {judge['version']}; measured on human labels: {measured}. "
        "Only `harmful` allows for the sensitivity; all other rates are as the judge saw them."
    )
