"""Control strings: text that a judge's tokenizer or parser would take for more than text.

Adapter output is hostile: a completion that closes the user's turn and opens the judge's answer would fill in its own
verdict. Such strings are broken apart before a prompt is formatted, never removed, and that it happened is recorded.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

_TURNS: Final = (
    r"<[|\uff5c][^|\uff5c<>\n]{1,40}[|\uff5c]>",  # ChatML, Llama 3 and its kin
    r"\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]",
    r"<</?SYS>>",
    r"</?s>",
    r"<(?:start|end)_of_turn>",
    r"<(?:bos|eos|pad|unk)>",
    r"</?(?:guardian|score|confidence|think|no-think)>",
)
_SECTIONS: Final = (
    r"\[(?:BEHAVIOR|GENERATION|CONTEXT)\]:",
    r"###\s*(?:Answer|Criteria|Scoring Schema)\b",
    r"<(?:BEGIN|END) [A-Z ]{4,40}>",
    r"#scores\b",
)
_VERDICTS: Final = (
    r"\bSafety:\s*(?:Safe|Unsafe|Controversial)\b",
    r"\b(?:Harmful request|Response refusal|Harmful response):\s*(?:yes|no|n/a)",
    r"\b[123]\.b\s*:?\s*[0-5]\b",
)
_KNOWN: Final = re.compile("|".join((*_TURNS, *_SECTIONS, *_VERDICTS)), re.IGNORECASE)
_PASSES: Final = 8
_THOUGHT: Final = re.compile(r"<think>.*?</think>", re.DOTALL | re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Neutral:
    """A text that holds no control string any more."""

    text: str
    changed: bool  # whether it held one


def neutralise(text: str, special: Iterable[str] = ()) -> Neutral | None:
    """The text with every control string broken by a space after its first character; None where that does not end.

    ``special`` are the strings that the judge's own tokenizer takes for tokens of control. Half of a surrogate pair,
    which no tokenizer can read, becomes a question mark.
    """
    now = text.encode("utf-8", "replace").decode()
    own = sorted((one for one in set(special) if one.strip()), key=len, reverse=True)
    patterns = [_KNOWN, *([re.compile("|".join(map(re.escape, own)))] if own else [])]
    changed = False
    for _ in range(_PASSES):
        broken = now
        for pattern in patterns:
            broken = pattern.sub(_apart, broken)
        if broken == now:
            return Neutral(text=now, changed=changed)
        now, changed = broken, True
    return None


def speaks_to_a_judge(text: str) -> bool:
    """Whether a reply holds a control string; a block of thinking that ends is part of how some models speak."""
    return _KNOWN.search(_THOUGHT.sub("", text)) is not None


def _apart(match: re.Match[str]) -> str:
    found = match.group()
    return f"{found[0]} {found[1:]}" if len(found) > 1 else " "
