"""Numbers and names in words that a reader from outside the field understands."""

from __future__ import annotations

import json
import unicodedata
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pages.document import CheckResult

LONGEST: Final = 400
"""Characters of a stranger's string that a page shows."""


@dataclass(frozen=True, kw_only=True)
class Meaning:
    """What a check counts, in words.

    Attributes:
        title: Its heading.
        asked: What was asked, in the plural.
        event: What the model did, after "the model".
        about: One sentence on why it matters.
    """

    title: str
    asked: str = ""
    event: str = ""
    about: str = ""


RATES: Final[Mapping[str, Meaning]] = {
    "harmful": Meaning(
        title="Attack success",
        asked="harmful requests",
        event="went along with",
        about="How often a request for something harmful gets what it asks for. Lower is safer.",
    ),
    "over_refusal": Meaning(
        title="Over-refusal",
        asked="safe requests that sound unsafe",
        event="turned down",
        about="How often a safe request is refused because it sounds like an unsafe one. Lower is more useful.",
    ),
    "benign": Meaning(
        title="Unanswered",
        asked="ordinary requests",
        event="left unanswered",
        about="How often an everyday request goes without an answer. Lower is more useful.",
    ),
    "answers": Meaning(
        title="Wrong answers",
        asked="questions with a known answer",
        event="answered wrongly",
        about="How often a question whose answer is known is answered wrongly. Small models are often wrong.",
    ),
    "coherence": Meaning(
        title="Incoherent replies",
        asked="replies to all kinds of requests",
        event="broke down into noise in",
        about="How often a reply is no language. A broken model helps nobody and must not pass as a safe one.",
    ),
}
OTHERS: Final[Mapping[str, Meaning]] = {
    "utility": Meaning(title="Utility kept", about="How much of what the adapter had learnt is left."),
    "improvement": Meaning(title="Improvement", about="Whether the repair obeys less often than the upload did."),
    "judge": Meaning(title="Judge", about="Whether the replies were judged well enough for a verdict to rest on."),
    "truncation": Meaning(title="Cut off", about="Whether enough of the replies was read before the token limit."),
    "robustness": Meaning(
        title="Robustness", about="How often harmful requests are obeyed that are put in other ways than plainly."
    ),
    "zero_tolerance": Meaning(title="Zero tolerance", about="Categories in which a single success is too many."),
    "margin": Meaning(
        title="First-word leaning",
        about="How much likelier a refusal is to open the reply to a harmful request. Tells, and decides nothing.",
    ),
}

OUTCOMES: Final[Mapping[str, str]] = {
    "pass": "met",
    "fail": "not met",
    "inconclusive": "not shown",
    "skipped": "not asked",
    "informative": "tells only",
}

DECISIONS: Final[Mapping[str, str]] = {
    "kept": "looked at and left as it was",
    "unjudged": "left as it was, because nothing could be said about it",
    "scaled": "weakened",
    "projected": "projected: the part that goes against the alignment was taken out",
    "dropped": "removed, so that the module is the aligned model's again",
    "patched": "kept or weakened, with refusals added",
    "added": "new: only what was added for refusing",
}


STAGES: Final[Mapping[str, str]] = {
    "passed over": "never made",
    "building": "could not be made",
    "weights": "only its weights were looked at",
    "proxy": "one look at its first words",
    "utility": "measured on the owner's task",
    "race": "asked requests of the select half",
    "certify": "asked the certify half",
}
"""How far a repair came."""


def meaning_of(name: str) -> Meaning:
    """Of a check; one that is not known here goes by its own name."""
    return RATES.get(name) or OTHERS.get(name) or Meaning(title=name.replace("_", " "))


def percent(share: float | None) -> str:
    """A share for people: one decimal, and never a 0 % or 100 % that was rounded to."""
    if share is None:
        return "-"
    if 0 < share < 0.0005:  # noqa: PLR2004 - what one decimal cannot show
        return "<\u00a00.1\u00a0%"
    if 0.9995 <= share < 1:  # noqa: PLR2004 - as above
        return ">\u00a099.9\u00a0%"
    return f"{100 * share:.1f}".removesuffix(".0") + "\u00a0%"  # the sign stays on the number's line


def between(low: float | None, high: float | None) -> str:
    """An interval of shares."""
    if low is None or high is None:
        return ""
    first = percent(low).removesuffix("\u00a0%")
    return f"{first} to {percent(high)}"


def sentence_of(check: CheckResult, who: str) -> str:
    """One rate of one arm, said in full."""
    meaning = RATES.get(check.name)
    if meaning is None:
        return f"{meaning_of(check.name).title}: {check.reason}."
    if not check.n:
        return f"{meaning.title} of {who}: {check.reason}."
    counted = f"Of {check.n} {meaning.asked}, {who} {meaning.event} {check.hits} ({percent(check.rate)})."
    if check.name == "coherence":
        counted = f"Of {check.n} replies, {check.hits} of {who} were no language ({percent(check.rate)})."
    sure = f"With 95\u00a0% confidence the true share for requests like these is {between(check.low, check.high)}."
    stopped = (
        f" Asking stopped there, {check.planned} were planned."
        if check.planned is not None and check.n < check.planned
        else ""
    )
    return f"{counted} {sure}{stopped}"


def label_of(method: str, parameters: Mapping[str, Any]) -> str:
    """A candidate in a line: the methods by name with their settings, one after the other."""
    steps = parameters.get("steps")
    if method == "compose" and isinstance(steps, list):
        named = [step for step in steps if isinstance(step, dict)]
        return ", then ".join(label_of(str(one.get("method")), one.get("parameters") or {}) for one in named)
    told = ", ".join(f"{key} {_short(value)}" for key, value in parameters.items() if value not in (None, [], {}))
    return f"{method} ({told})" if told else method


def name_of(method: str, parameters: Mapping[str, Any]) -> str:
    """A candidate by the names of its methods alone."""
    steps = parameters.get("steps")
    if method == "compose" and isinstance(steps, list):
        return " + ".join(str(one.get("method")) for one in steps if isinstance(one, dict))
    return method


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else value if isinstance(value, str) else json.dumps(value)


def number(value: float | None) -> str:
    """Four significant digits."""
    return "-" if value is None else f"{value:.4g}"


def shown(value: Any) -> Any:
    """A string as a page may show it: not endless, and without letters that hide or turn round what is beside them."""
    if type(value) is not str:
        return value
    cut = value if len(value) <= LONGEST else f"{value[:LONGEST]} ..."
    return "".join(_visible(letter) for letter in cut)


def _visible(letter: str) -> str:
    hidden = unicodedata.category(letter) in {"Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp"} and letter not in "\n\t"
    return f"\\u{ord(letter):04x}" if hidden else letter
