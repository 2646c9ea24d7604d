"""`lora-repair report`: a report from a file becomes a page in a file."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.cli.conftest import Said

    Say = Callable[..., Said]

REFUSED = {
    "report_version": 1,
    "verdict": "refused",
    "refusal": {"file": "adapter_model.safetensors", "field": "q_proj", "rule": "nan-weight", "detail": "not a number"},
}


def test_a_report_becomes_a_page(say: Say, tmp_path: Path) -> None:
    """The page holds what the report said."""
    (tmp_path / "report.json").write_text(json.dumps(REFUSED))
    said = say("report", tmp_path / "report.json", "--html", tmp_path / "report.html")
    assert said.code == 0
    assert "Rule nan-weight: not a number" in (tmp_path / "report.html").read_text()


def test_what_is_no_report_is_named_by_field_and_leaves_no_page(say: Say, tmp_path: Path) -> None:
    """Exit code 1, file and field, nothing written."""
    (tmp_path / "report.json").write_text(json.dumps({**REFUSED, "report_version": 7}))
    said = say("report", tmp_path / "report.json", "--html", tmp_path / "report.html")
    assert said.code == 1
    assert "report.json" in said.err
    assert "report_version" in said.err
    assert not (tmp_path / "report.html").exists()
