"""Every method on an adapter of every family: it repairs, into what PEFT loads as we computed it, or it says why not.

What is refused, what is left unjudged and why, and what is tuned under another name stands in tables: none of it can
change unseen.
"""

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from repair.adapter_file import read_adapter, write_adapter
from repair.errors import MissingWeight, RepairError
from repair.method import Decision, Need
from repair.methods import METHODS
from repair.run import Repaired, repair_adapter
from tests.repair import families
from tests.repair.living_families import World, loaded

pytestmark = [
    pytest.mark.usefixtures("threads"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module.*"),  # it does not look at parameters
]
Worlds = Callable[[str], World]

PARAMETERS: Mapping[str, Mapping[str, Any]] = {
    "compose": {"steps": [{"method": "spectral"}, {"method": "patch"}]},
    "random_modules": {"count": 2},
    "refusal_tune": {"steps": 2, "batch_size": 4, "first": 0.5, "last": 1.0},
    "s3lora": {"count": 2},
    "safe_lora": {"threshold": 1.0},
    "safemerge": {"threshold": 1.0},
    "scale": {"strength": 0.5},
    "splora": {"count": 2},
}
"""Where the defaults would train for minutes, or need not change so small an adapter."""

REFUSED: Mapping[tuple[str, str], str] = {}
"""By method and family, what the error says; there is none to be said."""

NO_HARMFUL = "no harmful prompt of the calibration was routed to this expert"
UNJUDGED: Mapping[str, Mapping[str, int]] = {
    "gpt_oss": {NO_HARMFUL: 8},  # the router of a fresh model has made up its mind
    "llama4": {NO_HARMFUL: 8},
    "mixtral": {NO_HARMFUL: 2},
}
"""By family, modules that a calibrated method leaves alone, and why."""

TUNED = {
    **dict.fromkeys(families.MODELS, "up_proj"),
    "phi": "fc1",
    "phi3": "gate_up_proj",
    "gpt2": "c_fc",
    **dict.fromkeys(("mixtral", "qwen3_moe", "gpt_oss"), "o_proj"),
}
"""What `refusal_tune` finds with its default target."""


def repaired(world: World, method: str, **parameters: Any) -> Repaired:
    kind = METHODS[method]
    return repair_adapter(world.adapter, kind.parse({**PARAMETERS.get(method, {}), **parameters}), world.context)


def says_the_same(world: World, result: Repaired, out: Path) -> None:
    """Written, read back, and loaded by PEFT without a stray key: the logits of our own sum over the layers."""
    write_adapter(result.adapter, out)
    said = families.logits(loaded(copy.deepcopy(world.model), out))
    ours = families.dense_logits(world.model, read_adapter(out))
    torch.testing.assert_close(said, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", families.MODELS)
def test_every_method_repairs_or_says_why_not(worlds: Worlds, tmp_path: Path, family: str, method: str) -> None:
    """With its defaults, or nearly."""
    world, why = worlds(family), REFUSED.get((method, family))
    if why is not None:
        with pytest.raises(RepairError, match=why):
            repaired(world, method)
        return
    result = repaired(world, method)
    says_the_same(world, result, tmp_path / "out")

    assert result.changed
    unjudged = Counter(one.reason for one in result.verdicts if one.decision is Decision.UNJUDGED)
    assert unjudged == (UNJUDGED.get(family, {}) if Need.CALIBRATION in METHODS[method].needs else {})


@pytest.mark.parametrize("family", families.MODELS)
def test_what_is_tuned_is_the_input_of_the_mlp(worlds: Worlds, family: str) -> None:
    """By whatever name, in the tuned block only; the report says so where it is another."""
    world = worlds(family)

    result = repaired(world, "refusal_tune")

    before = {layer.name: layer.rank for layer in world.adapter.layers}
    grown = {layer.name for layer in result.adapter.layers if layer.rank > before.get(layer.name, 0)}
    assert {name.rpartition(".")[2] for name in grown} == {TUNED[family]}
    assert {name.split(".")[2] for name in grown} == {"1"}
    assert any(f"{TUNED[family]} was tuned" in note for note in result.notes) == (TUNED[family] != "up_proj")


LEAVES = {
    "llama": {"gate_proj": "gate_proj", "down_proj": "down_proj", "o_proj": "o_proj", "k_proj": "k_proj"},
    "phi": {"down_proj": "fc2", "o_proj": "dense", "q_proj": "q_proj"},
    "phi3": {"gate_proj": "gate_up_proj", "down_proj": "down_proj", "v_proj": "qkv_proj"},
    "gpt2": {"down_proj": "mlp.c_proj", "o_proj": "attn.c_proj", "q_proj": "attn.c_attn"},
    "llama4": {"gate_proj": "shared_expert.gate_proj"},
}


@pytest.mark.parametrize(("family", "target"), [(family, one) for family, some in LEAVES.items() for one in some])
def test_a_target_is_what_it_is_in_a_llama(worlds: Worlds, tmp_path: Path, family: str, target: str) -> None:
    """Two linears of a GPT-2 have one name: their module tells them apart."""
    world = worlds(family)

    result = repaired(world, "refusal_tune", target=target)

    before = {layer.name: layer.rank for layer in world.adapter.layers}
    grown = {layer.name for layer in result.adapter.layers if layer.rank > before.get(layer.name, 0)}
    assert len(grown) == 1
    assert all(name.endswith(f".{LEAVES[family][target]}") for name in grown)
    says_the_same(world, result, tmp_path / "out")


@pytest.mark.parametrize(
    ("family", "target", "there"),
    [("phi", "gate_proj", "fc1, fc2"), ("gpt2", "gate_proj", "c_fc"), ("mixtral", "down_proj", "o_proj")],
)
def test_a_target_that_no_linear_is_names_those_that_there_are(
    worlds: Worlds, family: str, target: str, there: str
) -> None:
    """A model without gates, a block without linears: only the default has a stand-in."""
    with pytest.raises(MissingWeight, match=there) as caught:
        repaired(worlds(family), "refusal_tune", target=target)
    assert caught.value.field == "target"
