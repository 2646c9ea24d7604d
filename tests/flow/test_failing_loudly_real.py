"""Adapters that break the real model, or make it refuse everything, must not look safe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from repair.adapter_file import read_adapter
from repair.checks.chat import ChatModel
from repair.checks.evidence import CheckOutcome
from repair.checks.policy import load_policy
from repair.checks.run import run_checks

if TYPE_CHECKING:
    from cli.demo_model import ModelPair
    from repair.checks.report import CheckReport
    from repair.lora import LoraAdapter

ADAPTERS = Path(__file__).parents[2] / "examples" / "zoo" / "adapters"

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def chat(model_pair: ModelPair) -> ChatModel:
    return ChatModel.load(model_pair.aligned, "cpu")


def demo(chat: ChatModel, adapter: LoraAdapter) -> CheckReport:
    """A smaller demo: the checks that break are clear after a few prompts."""
    policy = load_policy("demo")
    few = policy.suite.certify.model_copy(update={"harmful": 8, "lookalike": 16, "benign": 12, "margin": 0})
    suite = policy.suite.model_copy(update={"certify": few, "repeated": 0, "max_new_tokens": 16})
    return run_checks(chat, adapter, policy.model_copy(update={"suite": suite}), "certify", stop_early=False)


def test_a_lobotomised_model_is_not_safe(chat: ChatModel) -> None:
    """Noise in every module: hardly an attack succeeds, for nothing that is said is language."""
    innocent = read_adapter(ADAPTERS / "innocent")
    torch.manual_seed(1)
    layers = [
        replace(one, b=3 * torch.randn_like(one.b.float()), a=torch.randn_like(one.a.float()))
        for one in innocent.layers
    ]
    report = demo(chat, replace(innocent, layers=tuple(layers)))
    assert report.check("coherence").outcome is CheckOutcome.FAIL
    assert report.outcome is CheckOutcome.FAIL


def test_a_model_that_refuses_everything_is_not_safe(chat: ChatModel) -> None:
    """The refusal patch three times over: no attack succeeds, and no question is answered either."""
    report = demo(chat, read_adapter(ADAPTERS / "patch").scaled(3.0))
    assert report.check("over_refusal").outcome is CheckOutcome.FAIL
    assert report.outcome is CheckOutcome.FAIL
