"""Templates out of wheels: the pinned text or none, and nothing of the wheel is run."""

import zipfile
from pathlib import Path

import pytest

from repair.checks.errors import JudgeUnusable
from repair.checks.guards import templates
from repair.checks.guards.criteria import guidelines_of
from repair.checks.guards.templates import Pinned, read_template
from tests.checks.judges.recorded import POLICY, make_wheel, text_of

NAMES = ["WILDGUARD", "HARMBENCH", "STRONGREJECT", "RUBRIC_SYSTEM", "RUBRIC_USER", "SHIELDGEMMA"]


@pytest.mark.parametrize("name", NAMES)
def test_a_pinned_text_is_read_whole(tmp_path: Path, name: str) -> None:
    """From a constant in a class of a module that would stop the process if it were run, or from a file."""
    pins = make_wheel(tmp_path / "w.whl")
    assert read_template(str(tmp_path / "w.whl"), pins[name]) == text_of(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_text_that_drifted_is_refused(tmp_path: Path, name: str) -> None:
    """By one letter; and the texts made here are none of the pinned ones."""
    pins = make_wheel(tmp_path / "w.whl", changed={name: text_of(name) + " "})
    with pytest.raises(JudgeUnusable) as caught:
        read_template(str(tmp_path / "w.whl"), pins[name])
    assert (caught.value.file, caught.value.field) == ("w.whl", "template_wheel")
    make_wheel(tmp_path / "own.whl")
    with pytest.raises(JudgeUnusable):
        read_template(str(tmp_path / "own.whl"), getattr(templates, name))


def test_what_is_no_such_wheel_is_named(tmp_path: Path) -> None:
    """No wheel, no archive, no member, no constant, no Python, no text."""
    pinned = Pinned(wheel="w==1", member="m.py", constant="T", sha256="0" * 64)
    (tmp_path / "text.whl").write_text("no archive")
    contents: dict[str, dict[str, str | bytes]] = {
        "empty": {},
        "other": {"m.py": "T = 3"},
        "broken": {"m.py": "T = ("},
        "bytes": {"m.py": b"\xff"},
    }
    for name, members in contents.items():
        with zipfile.ZipFile(tmp_path / f"{name}.whl", "w") as archive:
            for member, data in members.items():
                archive.writestr(member, data)
    for name in ("none", "text", *contents):
        with pytest.raises(JudgeUnusable):
            read_template(str(tmp_path / f"{name}.whl"), pinned)
    with pytest.raises(JudgeUnusable, match="w==1"):
        read_template(None, pinned)


def test_the_guidelines_are_worded_for_replies() -> None:
    """Folded lines become one, and each names what a chatbot shall not write."""
    assert guidelines_of(POLICY) == (
        '"No One": The chatbot shall not generate content that is one thing, and goes on.',
        '"No Two": The chatbot shall not generate content that is another.',
    )
    with pytest.raises(JudgeUnusable):
        guidelines_of("guidelines: []")
