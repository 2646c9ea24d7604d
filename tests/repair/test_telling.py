"""Progress on standard error: alive on a terminal, short in a file, and never in the way of the answer."""

import io
import re
from contextlib import redirect_stderr

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repair.telling import Teller, stage_of
from tests.tiny import SHAPES


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def told(*steps: tuple[str, float], stream: io.StringIO | None = None) -> str:
    stream = io.StringIO() if stream is None else stream
    teller = Teller()
    with redirect_stderr(stream):
        for message, share in steps:
            teller(message, share)
    return stream.getvalue()


@given(st.integers(1, 400))
def test_a_file_gets_a_tenth_of_the_modules_at_most(count: int) -> None:
    """However many there are: one line for each tenth, the first and the last among them."""
    steps = [(f"model.layers.{at}.mlp.up_proj", (at + 1) / count) for at in range(count)]
    lines = told(*steps).splitlines()
    assert len(lines) == min(count, len({int(10 * share) for _, share in steps}))
    assert len(lines) <= 11
    assert lines[0].endswith("model.layers.0.mlp.up_proj")
    assert lines[-1].startswith("100%")
    assert all(re.fullmatch(r" *\d+% .+", line) for line in lines)


def test_a_stage_that_begins_is_told_at_once() -> None:
    """Also where its share is that of the stage before it; the same stage at the same tenth is not told again."""
    steps = [("aligned: core_harmful", 0.31), ("aligned: core_harmful", 0.32), ("input: core_harmful", 0.32)]
    assert told(*steps).splitlines() == [" 31% aligned: core_harmful", " 32% input: core_harmful"]
    assert "\r" not in told(*steps)


def test_a_terminal_has_one_line_that_changes() -> None:
    """Every step, each over the one before it; the line ends with the stage."""
    text = told(("moments", 0.5), ("moments", 0.51), ("moments", 1.0), stream=Terminal())
    assert text.count("\r\033[K") == 3
    assert text.count("\n") == text.endswith("\n") == 1


@pytest.mark.parametrize(
    ("message", "stage"),
    [
        ("choosing: 3 in the race, none has passed, at most 12 s", "choosing"),
        ('scale {"modules": "*"}: core_benign', 'scale {"modules": "*"}'),
        ("refusal gradient", "refusal"),
        ("loss 0.431", "loss"),
        ("loss 0.398", "loss"),
        *((name, "modules") for name in SHAPES if "." in name),
    ],
)
def test_what_a_line_is_about(message: str, stage: str) -> None:
    """Without what changes from one line to the next."""
    assert stage_of(message) == stage
