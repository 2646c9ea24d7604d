"""From a report to what the template shows: every sentence and every table, in the order of the page."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from pages import charts, words
from pages.tables import categories, costs, pairs
from pages.words import RATES, between, label_of, meaning_of, name_of, percent, sentence_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pages.document import Arm, Candidate, CheckResult, Report

UPLOAD, ALIGNED = "the adapter as uploaded", "the aligned model alone"

BANNERS: Final = {
    "released_unchanged": (
        "Released unchanged",
        "The adapter met every rule of the policy as it was uploaded. Its bytes were not touched.",
    ),
    "released_repaired": (
        "Released, repaired",
        (
            "The adapter as uploaded was not shown to meet the policy. A repaired version was, on requests that had no "
            "part in choosing the repair. Only the repaired files may be used."
        ),
    ),
    "quarantined": (
        "Quarantined",
        (
            "Neither the adapter as uploaded nor any repair that was tried was shown to meet the policy. Nothing is "
            "released."
        ),
    ),
    "refused": (
        "Refused",
        "The upload could not be measured, because it is malformed, hostile, or not made for this model.",
    ),
}


SETTLED: Final = (
    "Released, without its whole tensors",
    (
        "The adapter as uploaded puts whole tensors in the place of the model's own, which the policy does not let "
        "through as they are. After that was settled it met every rule of the policy; nothing else was changed. Only "
        "the repaired files may be used."
    ),
)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One arm of the tables."""

    title: str
    kind: str
    who: str
    arm: Arm


def columns(report: Report) -> list[Column]:
    """The arms that were measured on the certify half, from the model alone to the repair."""
    released = report.verdict == "released_repaired"
    found = [
        ("Aligned model", "aligned", ALIGNED, report.aligned),
        ("As uploaded", "input", UPLOAD, report.input)
        if report.replacements is None
        else ("Settled upload", "input", "the adapter after its whole tensors were settled", report.input),
        (
            "Repaired" if released else "Last repair looked at",
            "repaired",
            "the repaired adapter" if released else "the last repair that was looked at",
            report.certify,
        ),
    ]
    return [Column(title=title, kind=kind, who=who, arm=arm) for title, kind, who, arm in found if arm is not None]


def view(report: Report) -> dict[str, Any]:
    """Everything the template asks for."""
    title, meaning = banner(report)
    arms = columns(report)
    deciding = report.deciding
    winner = _winner(report)
    return {
        "report": report,
        "title": title,
        "meaning": meaning,
        "rule": rule(report),
        "arms": arms,
        "sentences": sentences(arms),
        "tiles": tiles(arms),
        "rows": [line for name in _names(arms) if (line := _line(name, arms))],
        "scales": [one for name in RATES if (one := _scale(name, arms)) is not None],
        "decided": [] if deciding is None else [_decided(check) for check in deciding.checks],
        "guess": _guess(deciding),
        "pairs": pairs(report),
        "categories": categories(arms),
        "costs": costs(report),
        "strips": charts.strips(report.modules),
        "decisions": Counter(module.decision for module in report.modules).most_common(),
        "norms": _norms(report),
        "scatter": charts.scatter(report.candidates, winner=winner, best=report.pareto),
        "tried": [_tried(place, one, report, winner) for place, one in enumerate(report.candidates)],
        "how": "" if report.method is None else label_of(report.method, report.parameters or {}),
        "method": "" if report.method is None else name_of(report.method, report.parameters or {}),
        "finishes": [(one.title, *_cut_off(one.arm)) for one in arms],
        "suite": None if deciding is None else deciding.suite,
        "robustness": None if deciding is None else deciding.robustness,
        "words": words,
    }


def banner(report: Report) -> tuple[str, str]:
    """The verdict in a few words, and what it means."""
    settled_only = report.verdict == "released_repaired" and report.replacements is not None and not report.candidates
    return SETTLED if settled_only else BANNERS[report.verdict]


def rule(report: Report) -> str:
    """The rule that gave the verdict, in a sentence."""
    if report.refusal is not None:
        where = " · ".join(part for part in (report.refusal.file, report.refusal.field) if part)
        return f"Rule {report.refusal.rule}: {report.refusal.detail}" + (f" ({where})" if where else "")
    arm = report.deciding
    if arm is None:
        return ""
    asked = [check for check in arm.checks if check.outcome != "informative"]
    blocking = [check for check in asked if check.outcome != "pass"]
    if report.verdict != "quarantined":
        return f"Rule: a release must meet every check of the policy on the certify half. All {len(asked)} were met."
    # What failed for certain says more than what was not asked any more because of it.
    failed = [check for check in blocking if check.outcome == "fail"] or blocking
    if not failed:
        return "Rule: a release must meet every check of the policy on the certify half, and no repair got so far."
    told = "; ".join(f"{meaning_of(check.name).title.lower()}: {check.reason}" for check in failed)
    return f"Rule: a release must meet every check of the policy on the certify half. Not met: {told}."


def sentences(arms: Sequence[Column]) -> list[str]:
    """What was seen, for somebody who reads nothing else."""
    found = []
    for name in ("harmful", "over_refusal"):
        for one in reversed(arms):
            check = one.arm.check(name)
            if check is not None and check.n:
                found.append(sentence_of(check, one.who))
    last = arms[-1].arm if arms else None
    utility = None if last is None else last.check("utility")
    if utility is not None and utility.rate is not None and utility.details.measure != "drift":
        found.append(
            f"Of what the adapter had gained on its owner's samples, {percent(utility.rate)} is left "
            f"({utility.n} samples; with the policy's confidence {between(utility.low, utility.high)})."
        )
    elif utility is not None and utility.rate is not None:
        found.append(
            f"The owner gave no samples, so the repair's distance from the upload was measured on ordinary requests: "
            f"{utility.rate:.3f} nats per token, where 0 is no difference."
        )
    return found


def tiles(arms: Sequence[Column]) -> list[dict[str, str]]:
    """The few numbers at the top: of the deciding arm, with the upload's beside it."""
    if not arms:
        return []
    last, upload = arms[-1], next((one for one in arms if one.kind == "input"), None)
    found = []
    for name in ("harmful", "over_refusal", "benign", "utility", "coherence"):
        check = last.arm.check(name)
        if check is None or check.rate is None or check.details.measure == "drift":
            continue
        before = None if upload is None or upload is last else upload.arm.check(name)
        was = "" if before is None or before.rate is None or name == "utility" else f"was {percent(before.rate)}"
        found.append(
            {
                "title": meaning_of(name).title,
                "value": percent(check.rate),
                "interval": between(check.low, check.high),
                "was": was,
                "about": meaning_of(name).about,
                "outcome": check.outcome,
            }
        )
    return found


def _names(arms: Sequence[Column]) -> list[str]:
    """Every check of any arm: those that count events first."""
    seen = dict.fromkeys(check.name for one in arms for check in one.arm.checks)
    return sorted(seen, key=lambda name: (name not in RATES, list(RATES).index(name) if name in RATES else 0))


def _line(name: str, arms: Sequence[Column]) -> dict[str, Any]:
    """One check of every arm, for the table; a check that nobody was asked has no line."""
    cells = [one.arm.check(name) for one in arms]
    if name in RATES and not any(cell is not None and cell.n for cell in cells):
        return {}
    return {"meaning": meaning_of(name), "cells": [_cell(name, cell) for cell in cells]}


def _cell(name: str, check: CheckResult | None) -> dict[str, str]:
    if check is None:
        return {"value": "-", "interval": "", "count": "", "outcome": "", "reason": ""}
    rate, interval = check.rate, between(check.low, check.high)
    value = percent(rate)
    plain = name == "margin" or check.details.measure == "drift"
    if plain and rate is not None:
        value = words.number(rate)
        interval = "" if check.low is None else f"{words.number(check.low)} to {words.number(check.high)}"
    if name == "improvement" and rate is not None:
        value = f"{percent(rate)} fewer"
    return {
        "value": value,
        "interval": interval,
        "count": _count(name, check),
        "outcome": check.outcome,
        "reason": check.reason,
    }


def _count(name: str, check: CheckResult) -> str:
    if not check.n:
        return ""
    if check.hits is not None:
        return f"{check.hits} of {check.n}"
    return f"{check.n} {'samples' if name == 'utility' and check.details.measure != 'drift' else 'requests'}"


def _scale(name: str, arms: Sequence[Column]) -> dict[str, Any] | None:
    rows = []
    limit = None
    for one in arms:
        check = one.arm.check(name)
        if check is None or check.rate is None or check.low is None or check.high is None:
            continue
        limit = check.bound if name != "answers" else None  # that one is a bound on the difference
        text = f"{percent(check.rate)} ({between(check.low, check.high)})"
        rows.append((one.title, one.kind, check.rate, check.low, check.high, text))
    if not rows:
        return None
    return {"meaning": meaning_of(name), "drawn": charts.scale(rows, limit), "bound": percent(limit)}


def _decided(check: CheckResult) -> dict[str, Any]:
    upper = check.details.upper_bound
    return {
        "meaning": meaning_of(check.name),
        "outcome": check.outcome,
        "reason": check.reason,
        "upper": "" if upper is None else percent(upper),
        "bound": _bound(check),
        "doubt": ", ".join(f"{part} {percent(spent)}" for part, spent in (check.details.alpha or {}).items()),
    }


def _guess(arm: Arm | None) -> str:
    """Attack success as it would be with a judge that never errs, where that was worked out."""
    found = None if arm is None else arm.check("harmful")
    return "" if found is None or found.details.rogan_gladen is None else percent(found.details.rogan_gladen)


def _bound(check: CheckResult) -> str:
    if check.bound is None:
        return "-"
    if check.name == "improvement":
        return f"p at most {check.bound:.2g}"
    return words.number(check.bound) if check.details.measure == "drift" else percent(check.bound)


def _norms(report: Report) -> tuple[float, float] | None:
    if not report.modules:
        return None
    before, after = (
        sum(getattr(one, f"energy_{when}") for one in report.modules) ** 0.5 for when in ("before", "after")
    )
    return before, after


def _winner(report: Report) -> int | None:
    """Which candidate was released: the one that nothing was said against."""
    if report.verdict != "released_repaired":
        return None
    return next((place for place, one in enumerate(report.candidates) if not one.lost), None)


def _tried(place: int, one: Candidate, report: Report, winner: int | None) -> dict[str, Any]:
    cells = {name: _cell(name, one.select.check(name) if one.select else None) for name in ("harmful", "over_refusal")}
    utility = _cell("utility", one.select.check("utility") if one.select else None)
    return {
        "number": place + 1,
        "label": label_of(one.method, one.parameters),
        **cells,
        "utility": utility,
        "told": _told(one),
        "winner": place == winner,
        "best": place in report.pareto,
        "why": "released" if place == winner else one.lost,
    }


def _told(one: Candidate) -> str:
    """How far it came, and what its weights alone told."""
    proxy = None if one.proxy is None else one.proxy.get("way")
    parts = [
        words.STAGES.get(one.stage, one.stage),
        "" if one.energy_kept is None else f"energy kept {percent(one.energy_kept)}",
        ""
        if one.weights is None or one.weights.rho is None
        else f"rho {words.number(one.weights.rho)} (by chance {words.number(one.weights.rho_null)})",
        "" if one.damage is None else f"predicted damage {words.number(one.damage)} nats",
        "" if proxy is None else f"first words {percent(proxy)} of the way to the aligned model's",
    ]
    return "; ".join(part for part in parts if part)


def _cut_off(arm: Arm) -> tuple[int, int, int]:
    """Replies, those that the token limit cut off, and those that were no language."""
    return (
        len(arm.rows),
        sum(row.finish == "length" for row in arm.rows),
        sum(not row.coherent for row in arm.rows),
    )
