"""The interpolation profile: knees and crossings of known curves, and a tiny chat model by plain definitions."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from repair.checkpoint import Checkpoint
from repair.checks.chat import ChatModel
from repair.checks.packs import load_pack
from repair.context import RepairContext
from repair.diagnostics.account import diagnose
from repair.diagnostics.profile import (
    BENIGN,
    BEYOND,
    HARMFUL,
    STRENGTHS,
    crossing,
    interpolation_profile,
    knee,
    select_prompts,
)
from repair.lora import LoraAdapter
from tests import tiny
from tests.checks.acting import UPLOAD, Character, chat_of, strength

WORDS = "how do I a the to make help me write with your you for is of i'm can't sorry, but that Sorry,".split()  # noqa: SIM905
SHAPES = {"model.layers.1.mlp.up_proj": (56, 32), "model.layers.0.self_attn.q_proj": (32, 32)}


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> RepairContext:
    folder = tiny.tiny_llama(tmp_path_factory.mktemp("chat") / "model", words=WORDS)
    chat = ChatModel.load(folder, "cpu")
    with torch.no_grad():
        chat.model.lm_head.weight *= 20  # a fresh head is so small that no adapter could move any token
    return RepairContext(aligned=Checkpoint.open(folder), chat=chat)


@pytest.mark.parametrize(
    ("margins", "wanted"),
    [
        ([4, 4, 4, 0, -4], 0.5),  # a basin, then a fall
        ([4, 4, 3.9, 3.8, -4], 0.75),
        ([4, 2, 0, -2, -4], None),  # a straight line has no knee
        ([4, -4, -4, -4, -4], None),  # it falls at once
        ([1, 2, 2, 2, 3], None),  # it does not fall
        ([4, float("nan"), 3, 2, 1], None),
    ],
)
def test_the_knee_is_where_the_curve_stands_highest_above_its_chord(margins: list[float], wanted: float | None) -> None:
    """Up to there refusing held."""
    assert knee(STRENGTHS, [float(one) for one in margins]) == wanted


@pytest.mark.parametrize(
    ("margins", "wanted"),
    [([4, 4, 4, 0, -4], 0.75), ([3, 1, -1, -1, -1], 0.375), ([1, 1, 1, 1, 1], None), ([-1, -2, -2, -2, -2], None)],
)
def test_even_odds_lie_on_the_line_between_two_strengths(margins: list[float], wanted: float | None) -> None:
    """None where refusing was never more likely than not, or never ceased to be."""
    assert crossing(STRENGTHS, [float(one) for one in margins]) == wanted


def test_every_point_is_the_update_at_that_strength(context: RepairContext) -> None:
    """Log-odds of a refusal's first token and drift from the aligned model, each by the model's own answers."""
    adapter = tiny.adapter(SHAPES, scale=8.0)
    harmful, benign = ["how do I make a", "help me"], ["write the"]

    found = interpolation_profile(adapter, context, harmful=harmful, benign=benign)

    assert [point["strength"] for point in found["points"]] == [*STRENGTHS, BEYOND]
    anchor = context.chat.anchor(benign)
    for point in found["points"]:
        merged = replace(
            adapter,
            layers=tuple(replace(layer, b=layer.b * point["strength"]) for layer in adapter.layers),
        )
        with context.chat.arm(merged):
            margins = context.chat.margin(harmful)
            drift = context.chat.drift(anchor)
        assert point["margin"] == pytest.approx(sum(margins) / 2, rel=1e-5)
        assert point["refusing"] == sum(one > 0 for one in margins) / 2
        assert point["drift"] == pytest.approx(drift[0], rel=1e-4, abs=1e-9)
    assert found["points"][0]["drift"] == 0
    curve = [point["margin"] for point in found["points"]]
    assert len(set(curve)) == len(STRENGTHS) + 1
    whole = curve[: len(STRENGTHS)]  # what lies beyond the adapter as it is moves neither of the two
    assert (found["knee"], found["even_odds"]) == (knee(STRENGTHS, whole), crossing(STRENGTHS, whole))
    assert found["tokens"] > 0
    assert "not an attack rate" in found["measure"]
    assert (found["harmful_prompts"], found["benign_prompts"]) == (2, 1)


def test_magnitudes_follow_the_strength(context: RepairContext) -> None:
    """DoRA at a small strength is nearly the aligned model, whatever its uploaded magnitudes were."""
    weight = dict(context.chat.model.named_parameters())["model.layers.1.mlp.up_proj.weight"].detach()
    plain = tiny.layer("model.layers.1.mlp.up_proj", (56, 32), scale=8.0)
    norms = (weight + plain.scale * plain.b @ plain.a).norm(dim=1)
    dora = LoraAdapter(layers=(replace(plain, magnitude=norms),))

    one, two = (
        interpolation_profile(adapter, context, harmful=["help me"], benign=["write the"])["points"]
        for adapter in (dora, LoraAdapter(layers=(plain,)))
    )

    for left, right in zip(one, two, strict=True):
        assert left == pytest.approx(right, rel=1e-3, abs=1e-6), "these magnitudes make it plain LoRA, at any strength"


def test_only_prompts_that_may_be_used_to_choose_are_asked() -> None:
    """None of the half that certifies; harmful ones for refusing, ordinary ones for drift."""
    harmful, benign = select_prompts()
    certify = {row.text for name in ("core_harmful", "core_benign") for row in load_pack(name).of_half("certify")}

    assert (len(harmful), len(benign)) == (HARMFUL, BENIGN)
    assert not certify & {*harmful, *benign}
    assert set(harmful) <= {row.text for row in load_pack("core_harmful").rows}
    assert set(benign) <= {row.text for row in load_pack("core_benign").rows}


def test_the_profile_is_part_of_the_account_and_leaves_the_model_alone(context: RepairContext) -> None:
    """Prompt packs are named; no adapter stays on; progress is told."""
    said: list[str] = []
    told = replace(context, progress=lambda line, _share: said.append(line))
    before = context.chat.margin(["help me"])

    found = diagnose(tiny.adapter(SHAPES), told)

    assert found["profile"]["packs"] == ["core_harmful", "core_benign"]
    assert "profile" not in found["not_measured"]
    assert context.chat.margin(["help me"]) == before
    assert said[-1] == "profile"


def test_drift_is_that_of_the_strength(tmp_path: Path) -> None:
    """On a scripted model, where it is known exactly."""
    context: Any = RepairContext(chat=chat_of(Character()))

    found = interpolation_profile(UPLOAD, context, harmful=["x"], benign=["y", "z"])

    assert [point["drift"] for point in found["points"]] == pytest.approx([*STRENGTHS, BEYOND])
    assert strength(UPLOAD.scaled(0.5)) == pytest.approx(0.5)
