"""Targets, ranks and scales are those that PEFT would use, asked of PEFT itself."""

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from gate.config import read_config

MODULES = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.1.self_attn.v_proj",
    "model.layers.10.mlp.gate_proj",
    "model.layers.1.mlp.experts.3.up_proj",
    "layers.2.q_proj",
    "h.0.1.q_proj",
    "q_proj",
    "my_q_proj",
    "model.q_proj.inner",
    "lm_head",
    "model.embed_tokens",
    "model.layers.x.q_proj",
]
CONFIGS: list[dict[str, Any]] = [
    {"target_modules": ["q_proj"]},
    {"target_modules": ["q_proj", "mlp.gate_proj", "lm_head"]},
    {"target_modules": ["self_attn.q_proj", "experts.3.up_proj"]},
    {"target_modules": r".*\.(q|v)_proj"},
    {"target_modules": r"q_proj"},
    {"target_modules": r"model\.layers\.\d+\..*"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [1, 10]},
    {"target_modules": ["q_proj", "up_proj", "gate_proj"], "layers_to_transform": 10},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 1, 2, 3], "layers_pattern": "layers"},
    {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 3], "layers_pattern": ["h", "experts"]},
    {"target_modules": ["q_proj"], "layers_to_transform": []},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.1.self_attn.v_proj"]},
    {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*"},
    {"target_modules": ["q_proj", "lm_head", "inner"], "modules_to_save": ["lm_head", "q_proj"]},
    {"target_modules": r".*", "modules_to_save": ["mlp"]},
]


def gate_config(**keys: Any) -> Any:
    return read_config(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16} | keys).encode())


@pytest.mark.parametrize("keys", CONFIGS, ids=json.dumps)
def test_targets_are_those_of_peft(keys: dict[str, Any]) -> None:
    """Module by module."""
    ours, theirs = gate_config(**keys), LoraConfig(**keys)

    for module in MODULES:
        assert ours.targets(module) == bool(check_target_module_exists(theirs, module)), module


KEY = st.sampled_from([
    "q_proj", "v_proj", "self_attn.q_proj", "layers.1", r"layers\.1\..*", r".*mlp.*", "model.layers.0.self_attn.q_proj",
    r"layers\.(0|1)\.self_attn\.[qv]_proj", "layers.1.self_attn", "model.layers.1.self_attn.v_proj", "^q_proj",
    "self.attn.q_proj", "proj", ".*proj", r"(q|v)_proj$",
])  # fmt: skip


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(KEY, st.integers(1, 64), max_size=4), st.dictionaries(KEY, st.integers(1, 64), max_size=4))
def test_ranks_and_alphas_are_those_of_peft(ranks: dict[str, int], alphas: dict[str, int]) -> None:
    """The first key that matches decides, else the default."""
    config = gate_config(rank_pattern=ranks, alpha_pattern=alphas)

    for module in MODULES:
        rank = ranks.get(get_pattern_key(list(ranks), module), 8)
        alpha = alphas.get(get_pattern_key(list(alphas), module), 16)
        assert config.rank_for(module) == rank
        assert config.alpha_for(module) == alpha
        assert config.scale_for(module, rank) == pytest.approx(alpha / rank)
