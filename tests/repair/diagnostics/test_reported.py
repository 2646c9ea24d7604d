"""Diagnostics stand in every report of `lora-repair repair`, for a program and in a line for a person."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from repair.__main__ import main
from repair.diagnostics.account import SCHEMA
from tests import tiny

WORDS = "how do I a the to make help me write with your you for is of i'm can't sorry, but that".split()  # noqa: SIM905
SHAPES = {"model.layers.1.mlp.up_proj": (56, 32), "model.layers.0.self_attn.q_proj": (32, 32)}


def run(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    try:
        assert main([str(word) for word in words]) == 0
    finally:
        torch.use_deterministic_algorithms(mode=False)
    return capsys.readouterr().out


@pytest.fixture
def words(tmp_path: Path) -> list[object]:
    """A repair of an adapter for a tiny chat model and its base."""
    made = tiny.adapter(SHAPES)
    tiny.write_adapter_files(tmp_path / "adapter", tiny.adapter_tensors(made), made.config)
    models = [tiny.tiny_llama(tmp_path / name, seed=at, words=WORDS) for at, name in enumerate(("aligned", "base"))]
    return ["repair", tmp_path / "adapter", "--aligned", models[0], "--base", models[1], "--method", "scale",
            "--set", "strength=0.5", "--device", "cpu", "--out", tmp_path / "out"]  # fmt: skip


def test_quick_ones_need_no_loaded_model(words: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    """The upload's, not the result's; what would cost more says what it needs."""
    said: dict[str, Any] = json.loads(run(capsys, *words, "--json"))
    found = said["diagnostics"]

    assert found["schema"] == SCHEMA
    assert found["summary"]["norm"] ** 2 == pytest.approx(sum(one["energy_before"] for one in said["modules"]))
    assert found["profile"] is None
    assert {"profile", "alignment.inside", "behaviour"} <= set(found["not_measured"])
    assert "`lora-repair reference prepare NAME`" in found["not_measured"]["behaviour"]
    assert "`lora-repair calibrate`" in found["not_measured"]["behaviour"]
    assert all(one["alignment"]["source"] == "checkpoints" for one in found["modules"])


def test_full_ones_load_it_and_look_for_directions(words: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    """Only what no pack was given for is missing."""
    found = json.loads(run(capsys, *words, "--diagnostics", "full", "--json"))["diagnostics"]

    assert len(found["profile"]["points"]) == 6
    assert set(found["not_measured"]) == {"behaviour", "intruder_dimensions"}
    assert all({"inside", "r_align", "r_after"} <= set(one["alignment"]) for one in found["modules"])


def test_a_person_is_shown_the_summary(words: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    """Not a screen full of JSON."""
    (line,) = [line for line in run(capsys, *words).splitlines() if line.startswith("diagnostics")]

    assert "largest_relative_norm" in line
    assert "points" not in line
    assert len(line) < 400


def test_a_policy_takes_no_word_about_them(words: list[object], capsys: pytest.CaptureFixture[str]) -> None:
    """It has the model loaded and measures all that it can."""
    with pytest.raises(SystemExit) as leave:
        main([str(word) for word in [*words[:6], "--policy", "demo", "--diagnostics", "full", "--out", "o"]])

    assert leave.value.code == 1
    assert "--diagnostics" in capsys.readouterr().err
