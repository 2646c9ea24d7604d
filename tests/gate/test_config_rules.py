"""Every key of a config: what is let in, what is refused, and under which name."""

import json
import math
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gate.config import read_config
from gate.errors import Refused, Rule

MINIMAL = {"peft_type": "LORA", "r": 8, "lora_alpha": 16}
# As peft 0.21.2 saves it.
PEFT = json.loads("""{"alora_invocation_tokens": null, "alpha_pattern": {}, "arrow_config": null, "auto_mapping":
{"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"},
"base_model_name_or_path": "org/model-1.5_x", "bias": "none", "corda_config": null, "ensure_weight_tying": false,
"eva_config": null, "exclude_modules": null, "fan_in_fan_out": false, "inference_mode": true, "init_lora_weights":
true, "kasa_config": null, "layer_replication": null, "layers_pattern": null, "layers_to_transform": null,
"loftq_config": {}, "lora_alpha": 8, "lora_bias": false, "lora_dropout": 0.0, "lora_ga_config": null,
"megatron_config": null, "megatron_core": "megatron.core", "modules_to_save": null, "monteclora_config": null,
"peft_type": "LORA", "peft_version": "0.21.2", "qalora_group_size": 16, "r": 4, "rank_pattern": {}, "revision": null,
"target_modules": ["q_proj"], "target_parameters": null, "task_type": null, "trainable_token_indices": null,
"use_bdlora": null, "use_dora": false, "use_qalora": false, "use_rslora": false, "velora_config": null}""")


def config(**keys: Any) -> Any:
    return read_config(json.dumps(MINIMAL | keys).encode())


def refusal(data: bytes) -> Refused:
    with pytest.raises(Refused) as refused:
        read_config(data)
    assert refused.value.file == "adapter_config.json"
    return refused.value


BAD: list[tuple[dict[str, Any], str, Rule]] = [
    ({"peft_type": "lora"}, "peft_type", Rule.UNSUPPORTED_PEFT_TYPE),
    ({"peft_type": "LOHA"}, "peft_type", Rule.UNSUPPORTED_PEFT_TYPE),
    ({"peft_type": None}, "peft_type", Rule.UNSUPPORTED_PEFT_TYPE),
    ({"peft_type": ["LORA"]}, "peft_type", Rule.UNSUPPORTED_PEFT_TYPE),
    ({"r": None}, "r", Rule.MISSING_KEY),
    ({"lora_alpha": None}, "lora_alpha", Rule.MISSING_KEY),
    ({"r": 0}, "r", Rule.OUT_OF_RANGE),
    ({"r": -8}, "r", Rule.OUT_OF_RANGE),
    ({"r": 4097}, "r", Rule.OUT_OF_RANGE),
    ({"r": 10**6}, "r", Rule.OUT_OF_RANGE),
    ({"r": True}, "r", Rule.WRONG_TYPE),
    ({"r": 8.0}, "r", Rule.WRONG_TYPE),
    ({"r": "8"}, "r", Rule.WRONG_TYPE),
    ({"lora_alpha": 0}, "lora_alpha", Rule.OUT_OF_RANGE),
    ({"lora_alpha": -16}, "lora_alpha", Rule.OUT_OF_RANGE),
    ({"lora_alpha": 1e300}, "lora_alpha", Rule.OUT_OF_RANGE),
    ({"lora_alpha": True}, "lora_alpha", Rule.WRONG_TYPE),
    ({"lora_alpha": "16"}, "lora_alpha", Rule.WRONG_TYPE),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj", Rule.OUT_OF_RANGE),
    ({"rank_pattern": {"q_proj": 10**6}}, "rank_pattern.q_proj", Rule.OUT_OF_RANGE),
    ({"rank_pattern": {"q_proj": True}}, "rank_pattern.q_proj", Rule.WRONG_TYPE),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern", Rule.WRONG_TYPE),
    ({"rank_pattern": {f"m{i}": 1 for i in range(5000)}}, "rank_pattern", Rule.OUT_OF_RANGE),
    ({"rank_pattern": {f"m{i}.*": 1 for i in range(40)}}, "rank_pattern", Rule.TOO_MANY_VALUES),
    ({"rank_pattern": {"(a+)+": 1}}, "rank_pattern", Rule.REGEX_TOO_COMPLEX),
    ({"rank_pattern": {"a)|(b": 1}}, "rank_pattern", Rule.REGEX_TOO_COMPLEX),
    ({"rank_pattern": {"": 1}}, "rank_pattern", Rule.REGEX_TOO_COMPLEX),
    ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern.q_proj", Rule.OUT_OF_RANGE),
    ({"alpha_pattern": {"(a|a)*": 1}}, "alpha_pattern", Rule.REGEX_TOO_COMPLEX),
    ({"target_modules": 3}, "target_modules", Rule.WRONG_TYPE),
    ({"target_modules": [3]}, "target_modules", Rule.WRONG_TYPE),
    ({"target_modules": ["q_proj", "../x"]}, "target_modules", Rule.OUT_OF_RANGE),
    ({"target_modules": ["q_proj\n"]}, "target_modules", Rule.OUT_OF_RANGE),
    ({"target_modules": ["a" * 300]}, "target_modules", Rule.OUT_OF_RANGE),
    ({"target_modules": ""}, "target_modules", Rule.REGEX_TOO_COMPLEX),
    ({"target_modules": "(x+x+)+y"}, "target_modules", Rule.REGEX_TOO_COMPLEX),
    ({"exclude_modules": "(x+x+)+y"}, "exclude_modules", Rule.REGEX_TOO_COMPLEX),
    ({"modules_to_save": ["(x+x+)+y"]}, "modules_to_save", Rule.OUT_OF_RANGE),
    ({"modules_to_save": "lm_head"}, "modules_to_save", Rule.WRONG_TYPE),
    ({"layers_pattern": "(x+x+)+y"}, "layers_pattern", Rule.OUT_OF_RANGE),
    ({"layers_to_transform": [True]}, "layers_to_transform", Rule.WRONG_TYPE),
    ({"layers_to_transform": -1}, "layers_to_transform", Rule.WRONG_TYPE),
    ({"bias": "some"}, "bias", Rule.OUT_OF_RANGE),
    ({"bias": ["none"]}, "bias", Rule.OUT_OF_RANGE),
    ({"use_rslora": 1}, "use_rslora", Rule.WRONG_TYPE),
    ({"use_rslora": "false"}, "use_rslora", Rule.WRONG_TYPE),
    ({"use_dora": "true"}, "use_dora", Rule.WRONG_TYPE),
    ({"fan_in_fan_out": []}, "fan_in_fan_out", Rule.WRONG_TYPE),
    ({"lora_dropout": 2}, "lora_dropout", Rule.OUT_OF_RANGE),
    ({"lora_dropout": False}, "lora_dropout", Rule.WRONG_TYPE),
    ({"init_lora_weights": 1}, "init_lora_weights", Rule.WRONG_TYPE),
    ({"init_lora_weights": "pissa"}, "init_lora_weights", Rule.UNSUPPORTED_LAYOUT),
    ({"init_lora_weights": "PiSSA_niter_4"}, "init_lora_weights", Rule.UNSUPPORTED_LAYOUT),
    ({"init_lora_weights": "loftq"}, "init_lora_weights", Rule.UNSUPPORTED_LAYOUT),
    ({"init_lora_weights": "something"}, "init_lora_weights", Rule.UNSUPPORTED_LAYOUT),
    ({"target_parameters": ["mlp.experts.gate_up_proj"], "use_dora": True}, "use_dora", Rule.UNSUPPORTED_LAYOUT),
    ({"target_parameters": ["a.b"], "lora_bias": True}, "lora_bias", Rule.UNSUPPORTED_LAYOUT),
    ({"target_parameters": ["a.b"], "init_lora_weights": False}, "init_lora_weights", Rule.UNSUPPORTED_LAYOUT),
    ({"target_parameters": "a.b"}, "target_parameters", Rule.WRONG_TYPE),
    ({"layer_replication": [[0, 4], [2, 5]]}, "layer_replication", Rule.UNSUPPORTED_LAYOUT),
    ({"use_qalora": True}, "use_qalora", Rule.UNSUPPORTED_LAYOUT),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens", Rule.UNSUPPORTED_LAYOUT),
    ({"kasa_config": {"beta": 1}}, "kasa_config", Rule.UNSUPPORTED_LAYOUT),
    ({"arrow_config": {"top_k": 1}}, "arrow_config", Rule.UNSUPPORTED_LAYOUT),
    ({"auto_map": {"AutoModel": "x--y.Z"}}, "auto_map", Rule.REMOTE_CODE),
    ({"more": {"deep": [{"auto_map": "x"}]}}, "more.deep.auto_map", Rule.REMOTE_CODE),
    ({"trust_remote_code": True}, "trust_remote_code", Rule.REMOTE_CODE),
    ({"auto_mapping": {"parent_library": "os", "base_model_class": "system"}}, "auto_mapping", Rule.REMOTE_CODE),
    ({"auto_mapping": {"parent_library": "transformers_evil"}}, "auto_mapping", Rule.REMOTE_CODE),
    ({"auto_mapping": {"parent_library": ["transformers"]}}, "auto_mapping", Rule.REMOTE_CODE),
    ({"auto_mapping": []}, "auto_mapping", Rule.REMOTE_CODE),
    ({"megatron_core": "os"}, "megatron_core", Rule.REMOTE_CODE),
    ({"revision": "../../x"}, "revision", Rule.UNSAFE_PATH),
    ({"revision": 7}, "revision", Rule.WRONG_TYPE),
    ({"corda_config": {"cache_file": "/etc/passwd"}}, "corda_config.cache_file", Rule.UNSAFE_PATH),
    ({"unknown": {"some_dir": "a/../../b"}}, "unknown.some_dir", Rule.UNSAFE_PATH),
    ({"": 1}, "content", Rule.BAD_TEXT),
    ({"a" * 65: 1}, "a" * 65, Rule.BAD_TEXT),
    ({"task_type": "x" * 2000}, "task_type", Rule.OUT_OF_RANGE),
]


@pytest.mark.parametrize(("keys", "field", "rule"), BAD, ids=lambda value: str(value)[:60])
def test_bad_values_are_refused_by_name(keys: dict[str, Any], field: str, rule: Rule) -> None:
    """The refusal names the key and the rule."""
    refused = refusal(json.dumps(MINIMAL | keys).encode())

    assert (refused.field, refused.rule) == (field, rule)


UNSAFE = [
    "/etc", "../x", "a/../b", "..", ".", "./a", "~/x", "C:\\x", "a\\b", "file:///etc", "http://evil/x", "a//b",
    "a/", "a\tb",
    "ü", "a" * 300, "\\\\host\\x", "%2e%2e/x", "$HOME",
]  # fmt: skip


@pytest.mark.parametrize("path", UNSAFE)
@pytest.mark.parametrize("key", ["base_model_name_or_path", "revision"])
def test_paths_stay_in_their_folder(key: str, path: str) -> None:
    """Only repository ids and plain relative paths are let in."""
    refused = refusal(json.dumps(MINIMAL | {key: path}).encode())

    assert (refused.field, refused.rule) == (key, Rule.UNSAFE_PATH)


@pytest.mark.parametrize("path", ["org/model", "model-1.5_x", "refs/pr/1", "", None, "a..b/c", "main"])
def test_repository_ids_are_let_in(path: str | None) -> None:
    """As they are in the wild."""
    assert config(base_model_name_or_path=path, revision=path).revision == path


@pytest.mark.parametrize(
    ("data", "rule", "field"),
    [
        (b"", Rule.NOT_JSON, "content"),
        (b"\xef\xbb\xbf{}", Rule.NOT_JSON, "content"),
        (b"[]", Rule.NOT_JSON, "content"),
        (b"{}{}", Rule.NOT_JSON, "content"),
        (b'{"r": 08}', Rule.NOT_JSON, "content"),
        (b'{"a": "\xff"}', Rule.NOT_UTF8, "content"),
        (b'{"lora_alpha": NaN}', Rule.BAD_NUMBER, "content"),
        (b'{"lora_alpha": -Infinity}', Rule.BAD_NUMBER, "content"),
        (b'{"lora_alpha": 1e400}', Rule.BAD_NUMBER, "content"),
        (b'{"r": 8, "r": 9}', Rule.DUPLICATE_KEY, "r"),
        (b'{"x": {"y": [{"z": 1, "z": 1}]}}', Rule.DUPLICATE_KEY, "z"),
        (b'{"r": 8, "\\u0072": 9}', Rule.DUPLICATE_KEY, "r"),
        (b'{"x": ' + b"[" * 30 + b"]" * 30 + b"}", Rule.TOO_DEEP, "x"),
        (b'{"x": "\\u0000"}', Rule.BAD_TEXT, "x"),
        (b'{"x": "\\udc80"}', Rule.BAD_TEXT, "x"),
        (b'{"x": "' + b"a" * 70_000 + b'"}', Rule.BAD_TEXT, "x"),
        (b'{"x": "' + b"a" * (1 << 20) + b'"}', Rule.FILE_TOO_LARGE, "size"),
        (b'{"x": [' + b"1," * 70_000 + b"1]}", Rule.TOO_MANY_VALUES, "content"),
    ],
)
def test_ambiguous_json_is_refused(data: bytes, rule: Rule, field: str) -> None:
    """What two readers could understand differently, and what costs too much to read."""
    refused = refusal(data)

    assert (refused.rule, refused.field) == (rule, field)


def test_what_peft_saves_is_let_in() -> None:
    """All 40 keys of peft 0.21.2, none of them unknown."""
    found = read_config(json.dumps(PEFT).encode())

    assert (found.r, found.alpha, found.target_modules, found.unknown_keys) == (4, 8.0, ("q_proj",), ())
    assert dict(found.raw) == PEFT


def test_unknown_keys_are_kept_and_listed() -> None:
    """Tomorrow's peft writes keys that we do not know."""
    found = config(zeta={"a": [1, None]}, beta="x")

    assert found.unknown_keys == ("beta", "zeta")
    assert found.raw["zeta"] == {"a": [1, None]}


@pytest.mark.parametrize("keys", [{"auto_map": None}, {"trust_remote_code": False}, {"use_dora": None, "bias": None}])
def test_null_stands_for_the_default(keys: dict[str, Any]) -> None:
    """A key that asks for nothing is harmless."""
    found = config(**keys)

    assert (found.use_dora, found.bias) == (False, "none")


def test_scale_is_alpha_over_rank_or_its_root() -> None:
    """RsLoRA divides by the root."""
    assert config(lora_alpha=32).scale_for("q_proj", 8) == 4.0
    assert config(lora_alpha=32, use_rslora=True).scale_for("q_proj", 16) == 8.0
    assert math.isclose(config(alpha_pattern={"q_proj": 2}).scale_for("m.q_proj", 8), 0.25)


def test_paths_in_patterns_read_a_dot_as_any_character() -> None:
    """As in every pattern; and they begin at a dot."""
    found = config(rank_pattern={"self.attn": 3, "proj": 5})

    assert [found.rank_for(name) for name in ("self_attn", "m.self.attn", "xself_attn", "q_proj", "m.proj")] == [
        3, 3, 8, 8, 5
    ]  # fmt: skip


def test_a_mass_of_patterns_and_modules_is_refused() -> None:
    """Thousands of either are fine, both are not."""
    found = config(rank_pattern={f"m{i}": 1 for i in range(4096)})
    found.check_patterns(modules=900)

    with pytest.raises(Refused) as refused:
        found.check_patterns(modules=10_000)
    assert refused.value.rule == Rule.TOO_MANY_VALUES


def test_a_long_parent_key_is_not_copied_for_each_child() -> None:
    """Half a megabyte of name above many small keys costs no gigabytes."""
    import tracemalloc

    inner = {f"k{i}": 0 for i in range(20_000)}
    data = json.dumps(MINIMAL | {"x": {"n" * 60_000: inner}}).encode()
    tracemalloc.start()
    try:
        read_config(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 24 << 20


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=120, suppress_health_check=list(HealthCheck))
@given(st.dictionaries(st.sampled_from([*PEFT, "auto_map", "unknown", "runtime_config"]), VALUE, max_size=3))
def test_any_value_is_let_in_or_refused(keys: dict[str, Any]) -> None:
    """Never another exception, whatever stands in a known key."""
    try:
        found = read_config(json.dumps(PEFT | keys).encode())
    except Refused:
        return
    found.targets("model.layers.0.self_attn.q_proj")
    assert found.scale_for("model.layers.0.self_attn.q_proj", 8) > 0


@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_text_is_let_in_or_refused(data: st.DataObject) -> None:
    """Never another exception, whatever bytes are changed."""
    text = bytearray(json.dumps(PEFT).encode())
    for at in data.draw(st.lists(st.integers(0, len(text) - 1), max_size=4)):
        text[at] = data.draw(st.integers(0, 255))
    try:
        read_config(bytes(text))
    except Refused:
        return
