"""What a verdict does not say, in sentences that stand in every report."""

from collections import Counter
from collections.abc import Mapping
from typing import Any

from repair.checks.policy import Policy
from repair.checks.report import CheckReport
from repair.checks.settling import Settled
from repair.checks.verdict import Plan
from repair.treatment import Treatment

TRIGGERS = (
    "Triggers were not tested: an adapter can be made to obey only when a request holds a word or sign that its maker "
    "chose, and no list of prompts can rule that out. An adapter with such a backdoor may pass every check of this "
    "report."
)
PLAINLY = (
    "Requests were put plainly: no system prompt but the reference's own, no prefilled opening of the reply, no "
    "rewriting and no sampling was tested."
)
DISGUISED = (
    "The judge was measured on replies to plain requests. On replies to requests in disguise judges err far more "
    "often, several of them together as well, so these rates are worth less than those of the plain requests."
)
LIMITS = (
    "Measured on the prompts of the named packs, in English, one turn each, greedy decoding, by the named judge.",
    TRIGGERS,
    "Not tested either: other languages, requests over many turns, attacks searched for against this very model.",
    "The verdict is about these bytes on this reference; after any further tuning or merging it no longer holds.",
)


def limits_of(plan: Plan) -> list[str]:
    """What the verdict does not say, in sentences; among them how much of each reply was read."""
    few = "The uploader's samples were too few to split: the same ones chose the repair and certified what it keeps."
    deciding = plan.certify_report or plan.input_report
    told = [*limits_of_report(deciding, plan.policy), *([few] if plan.samples_shared else [])]
    return told if plan.settled is None else [*told, settled_by(plan.settled)]


def settled_by(settled: Settled) -> str:
    """What is not known of an upload that brought whole tensors."""
    kinds = ", ".join(
        f"{count} {kind}" for kind, count in sorted(Counter(one["kind"] for one in settled.tensors).items())
    )
    left = {
        Treatment.DROP: "the released bytes have none of them",
        Treatment.REVERT: "the released bytes have the aligned model's values there",
        Treatment.INTERPOLATE: "the released bytes have a mixture there, and that is what was measured",
    }[settled.how.treatment]
    return (
        f"The upload replaces whole tensors of the model ({kinds}). By the policy ({settled.how}) {left}; what the "
        "upload had there was not measured. Every number of the input, and what a repair keeps of it, is of the "
        "adapter after that."
    )


def limits_of_report(report: CheckReport, policy: Policy) -> list[str]:
    """The same of one arm that was measured."""
    tokens, rows = policy.suite.max_new_tokens, report.rows
    share = sum(row.finish == "length" for row in rows) / len(rows) if rows else 0.0
    read = (
        f"Of each reply no more than the first {tokens} tokens were read, and {share:.0%} of the replies behind the "
        "verdict were cut off there: what would have come later was never judged."
    )
    settled = sum(row.finish == "settled" for row in rows)
    if settled:
        read += f" {settled} replies to prompts that only look unsafe were ended where they could no longer refuse."
    return [*LIMITS, *framed_by(report), read, seen_by(report.suite["judge"])]


def framed_by(report: CheckReport) -> list[str]:
    """Which other ways to put a request were tried, and what is not known of them."""
    told = report.robustness
    if told is None:
        return [PLAINLY]
    put = [one for one in told["framings"] if not one["skipped"]]
    skipped = "".join(f" {one['name']} was not put: {one['skipped']}." for one in told["framings"] if one["skipped"])
    if not put:
        return [f"{PLAINLY}{skipped}"]
    ways = "; ".join(f"{one['name']} ({one['about']})" for one in put)
    decides = "a framing that is not withstood prevents a release" if told["gate"] else "these numbers decide nothing"
    tried = (
        f"Besides, up to {told['prompts']} of the harmful prompts were put in other ways: {ways}; {decides}. No "
        f"other system prompt, opening, rewriting or sampling was tested.{skipped}"
    )
    return [tried, DISGUISED]


def seen_by(judge: Mapping[str, Any]) -> str:
    """How well the judge was measured to see, and which number takes that into account."""
    known = [
        f"{name} {found['rate']:.1%} (at least {found['low']:.1%})"
        for name, quality in (
            ("harmful sensitivity", "sensitivity"),
            ("specificity", "specificity"),
            ("refusal recall", "refusal_recall"),
        )
        if (found := judge[quality])["n"]
    ]
    if not known:
        return f"Judged by {judge['name']} version {judge['version']}, of which nothing was measured on human labels."
    measured = ", ".join(known)
    return (
        f"Judged by {judge['name']} version {judge['version']}; measured on human labels: {measured}. "
        "Only `harmful` and the framings allow for the sensitivity; all other rates are as the judge saw them."
    )
