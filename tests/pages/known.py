"""What a document says that its schema does not know."""

from __future__ import annotations

from typing import Any


def unknown(given: Any, known: Any, at: str = "") -> list[str]:
    """Fields of a document that its parsed form has not."""
    if isinstance(given, dict) and isinstance(known, dict):
        missing = [f"{at}.{key}" for key in given if key not in known]
        return missing + [
            line for key in given if key in known for line in unknown(given[key], known[key], f"{at}.{key}")
        ]
    if isinstance(given, list) and isinstance(known, list):
        return [line for one, two in zip(given, known, strict=True) for line in unknown(one, two, f"{at}[]")]
    return []
