"""What the demo says of a repair."""

from typing import Any

import pytest

from cli.demo import applied


@pytest.mark.parametrize(
    ("report", "told"),
    [
        ({"method": None, "parameters": None}, None),
        ({"method": "refusal_tune", "parameters": {"steps": 60}}, "refusal_tune"),  # its steps are a number
        (
            {"method": "compose", "parameters": {"steps": [{"method": "scale"}, {"method": "patch"}]}},
            "scale +\npatch",
        ),
    ],
)
def test_the_method_is_told_whoever_won(report: dict[str, Any], told: str | None) -> None:
    """One method, several, or none."""
    assert applied(report) == told
