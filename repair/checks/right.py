"""Whether a reply holds a right answer."""

import re
from collections.abc import Sequence

from repair.checks.phrases import clean


def is_right(reply: str, answers: Sequence[str]) -> bool:
    """Whether one of the right answers stands in the reply as words of its own."""
    text = clean(reply).lower()
    return any(re.search(rf"(?<!\w){re.escape(answer.lower())}(?!\w)", text) for answer in answers)
