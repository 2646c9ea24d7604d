"""Every method's page says what it computes, where that comes from, what it needs, and when it fails."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
METHODS = json.loads((ROOT / "api" / "catalogue.json").read_text())["methods"]
every = pytest.mark.parametrize("method", METHODS, ids=[method["name"] for method in METHODS])


def page_of(method: dict[str, Any]) -> str:
    return (ROOT / "docs" / "methods" / f"{method['name']}.md").read_text()


def section(page: str, title: str) -> str:
    """The text below the first heading that begins so."""
    found = re.search(rf"^## {title}[^\n]*\n(.*?)(?=^## |\Z)", page, flags=re.MULTILINE | re.DOTALL)
    return "" if found is None else found[1].strip()


@every
@pytest.mark.parametrize("title", ["Maths", "Needs", "When it fails"])
def test_a_page_has_its_sections(method: dict[str, Any], title: str) -> None:
    """Under these headings, and with something below each."""
    assert len(section(page_of(method), title).split()) > 3


@every
def test_a_page_names_the_paper_and_every_parameter(method: dict[str, Any]) -> None:
    """The paper that the method declares, and what a user may set, in code."""
    page = page_of(method)
    words = set(re.findall(r"`(\w+)", page)) | set(re.findall(r"(\w+)`", page))

    assert method["paper"] in page
    assert set(method["parameters"]["properties"]) <= words


@every
def test_a_page_tells_what_the_catalogue_tells_is_needed(method: dict[str, Any]) -> None:
    """A calibration, a patch, a base, a loaded model: in the section about it."""
    said = section(page_of(method), "Needs").lower()
    told = {
        "aligned": "aligned|both models|pair",
        "base": "base|both models|pair",
        "chat": "loads",
        "patch": "patch|safe",
    }

    for need in method["needs"]:
        assert re.search(told.get(need, need), said), need


@every
def test_the_catalogue_describes_a_method_whole(method: dict[str, Any]) -> None:
    """Schema with a description of every parameter, needs, cost and citation: what the API and the engine print."""
    assert method["cost"] in {"seconds", "checkpoints", "training"}
    assert set(method["needs"]) <= {"aligned", "base", "patch", "calibration", "chat"}
    assert re.fullmatch(r"https://arxiv\.org/abs/\d{4}\.\d{5}", method["paper"])
    for parameter in method["parameters"]["properties"].values():
        assert parameter["description"]
