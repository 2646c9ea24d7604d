"""What each key of `adapter_config.json` may hold: types, ranges, paths, and variants that we do not handle.

One table, one function per kind of value. Unknown keys are kept by `config.py`; here they are only searched
for code and paths.
"""

import math
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from gate.errors import Refused, Rule
from gate.names import CONFIG_FILE as FILE

MAX_RANK = 4096
MAX_ALPHA = 65_536
LONGEST_PATH = 256
LONGEST_TEXT = 1024
MAX_ITEMS = 16_384
MAX_PATTERN_KEYS = 4096
MAX_TOKEN = 2**31 - 1

MODULE_PATH = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*", re.ASCII)
LONGEST_MODULE = 256
# Repository ids, and relative folders: "org/model", "refs/pr/1".
_SAFE_PATH = re.compile(r"[A-Za-z0-9_.+ -]+(/[A-Za-z0-9_.+ -]+)*", re.ASCII)
_PATH_KEY = re.compile(r".*(path|file|dir|directory|folder|revision)", re.ASCII)

# Keys that make some loader import or download code; none belongs into an adapter.
CODE_KEYS = frozenset({"auto_map", "trust_remote_code", "code_revision", "custom_pipelines", "_target_", "py/object"})
# A non-empty value makes the adapter something else than `scale * B @ A` on the plain base model.
UNSUPPORTED = (
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "alora_invocation_tokens",
    "megatron_config",
    "monteclora_config",
    "velora_config",
    "arrow_config",
    "kasa_config",
)
# These only choose how training starts; the saved factors mean the same.
PLAIN_INITS = frozenset({"gaussian", "eva", "orthogonal"})


def check_known(key: str, value: Any) -> None:
    """Refuse a known key whose value has the wrong type or range; null stands for the default."""
    rule = _KINDS.get(key)
    if rule is not None and value is not None:
        rule(key, value)


def check_code(raw: Mapping[str, Any]) -> None:
    """Refuse whatever asks a loader to import code, at any depth, and paths that leave their folder."""
    todo: list[tuple[str, str, Any]] = [("", "", raw)]
    while todo:
        field, key, value = todo.pop()
        if isinstance(value, Mapping):
            for inner, item in value.items():
                place = f"{field}.{inner}"[-LONGEST_PATH:] if field else inner[:LONGEST_PATH]
                if inner in CODE_KEYS and item not in (None, False):
                    raise Refused(Rule.REMOTE_CODE, "names code to load", file=FILE, field=place)
                todo.append((place, inner, item))
        elif isinstance(value, list):
            todo.extend((field, key, item) for item in value)
        elif isinstance(value, str) and _PATH_KEY.fullmatch(key.lower()):
            check_path(field, value)
    _check_auto_mapping(raw.get("auto_mapping"))


def check_path(field: str, value: str) -> None:
    """A repository id or a relative path that stays below its folder."""
    if not value:
        return
    parts = value.split("/")
    if len(value) > LONGEST_PATH or _SAFE_PATH.fullmatch(value) is None or {".", ".."} & set(parts):
        why = "only a repository id or a relative path is allowed; write the repository id there, or empty text"
        raise Refused(Rule.UNSAFE_PATH, why, file=FILE, field=field)


def check_supported(raw: Mapping[str, Any]) -> None:
    """Refuse variants whose meaning we do not handle."""
    for key in UNSUPPORTED:
        if raw.get(key):
            raise Refused(Rule.UNSUPPORTED_LAYOUT, "this LoRA variant is not handled", file=FILE, field=key)
    init = raw.get("init_lora_weights")
    if raw.get("target_parameters"):
        _check_parameters(raw)
    if isinstance(init, str) and init.lower() not in PLAIN_INITS:
        detail = (
            "this initialisation changes the base model: save the adapter converted to plain LoRA "
            "(save_pretrained with path_initial_model_for_weight_conversion)"
        )
        raise Refused(Rule.UNSUPPORTED_LAYOUT, detail, file=FILE, field="init_lora_weights")


def _check_parameters(raw: Mapping[str, Any]) -> None:
    """What PEFT itself does not do on a bare parameter, and what nobody could tell from the file."""
    for key in ("use_dora", "lora_bias", "fan_in_fan_out"):
        if raw.get(key):
            detail = "PEFT does not do this on target_parameters: train with one of the two"
            raise Refused(Rule.UNSUPPORTED_LAYOUT, detail, file=FILE, field=key)
    if raw.get("init_lora_weights") is False:
        detail = "PEFT would fill a targeted parameter that the file lacks at random: set it to true"
        raise Refused(Rule.UNSUPPORTED_LAYOUT, detail, file=FILE, field="init_lora_weights")


def wrong_type(key: str, wanted: str) -> Refused:
    """The refusal of a value of the wrong type."""
    return Refused(Rule.WRONG_TYPE, f"must be {wanted}", file=FILE, field=key)


def out_of_range(key: str, detail: str) -> Refused:
    """The refusal of a value outside of its range."""
    return Refused(Rule.OUT_OF_RANGE, detail, file=FILE, field=key)


def check_rank(key: str, value: Any) -> None:
    """A whole number from 1 to `MAX_RANK`."""
    if type(value) is not int:  # True is an int to isinstance
        raise wrong_type(key, "a whole number")
    if not 1 <= value <= MAX_RANK:
        raise out_of_range(key, f"the rank must be from 1 to {MAX_RANK}")


def check_alpha(key: str, value: Any) -> None:
    """A positive number; zero and negative ones would switch the adapter off or turn it around."""
    if type(value) not in {int, float}:
        raise wrong_type(key, "a number")
    if not (math.isfinite(value) and 0 < value <= MAX_ALPHA):
        raise out_of_range(key, f"alpha must be above 0 and at most {MAX_ALPHA}")


def is_module(value: Any) -> bool:
    """Whether this is the dotted path of a module."""
    return isinstance(value, str) and len(value) <= LONGEST_MODULE and MODULE_PATH.fullmatch(value) is not None


def _flag(key: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise wrong_type(key, "true or false")


def _text(key: str, value: Any) -> None:
    if not isinstance(value, str):
        raise wrong_type(key, "text")
    if len(value) > LONGEST_TEXT:
        raise out_of_range(key, f"longer than {LONGEST_TEXT} characters")


def _share(key: str, value: Any) -> None:
    if type(value) not in {int, float}:
        raise wrong_type(key, "a number")
    if not 0 <= value <= 1:
        raise out_of_range(key, "must be from 0 to 1")


def _modules(key: str, value: Any) -> None:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise wrong_type(key, "a list of module names")
    if len(value) > MAX_ITEMS:
        raise out_of_range(key, f"more than {MAX_ITEMS} names")
    if (bad := next((item for item in value if not is_module(item)), None)) is not None:
        raise out_of_range(key, f"not a module name: {bad[:80]!r}")


def _modules_or_pattern(key: str, value: Any) -> None:
    if not isinstance(value, str):  # the pattern itself is judged when it is compiled
        _modules(key, value)


def _numbers(key: str, value: Any) -> None:
    numbers = value if isinstance(value, list) else [value]
    if len(numbers) > MAX_ITEMS or not all(type(item) is int and 0 <= item <= MAX_TOKEN for item in numbers):
        raise wrong_type(key, "a list of whole numbers")


def _tokens(key: str, value: Any) -> None:
    if not isinstance(value, dict):
        _numbers(key, value)
        return
    _modules(key, list(value))
    for item in value.values():
        _numbers(key, item)


def _layers_pattern(key: str, value: Any) -> None:
    _modules(key, value if isinstance(value, list) else [value])


def _object(key: str, value: Any) -> None:
    if not isinstance(value, dict):
        raise wrong_type(key, "an object")


def _pattern_of(check: Callable[[str, Any], None]) -> Callable[[str, Any], None]:
    def rule(key: str, value: Any) -> None:
        _object(key, value)
        if len(value) > MAX_PATTERN_KEYS:
            raise out_of_range(key, f"more than {MAX_PATTERN_KEYS} patterns")
        for pattern, item in value.items():
            check(f"{key}.{pattern}", item)

    return rule


def _bias(key: str, value: Any) -> None:
    if value not in ("none", "all", "lora_only"):  # a tuple: a list has no hash
        raise out_of_range(key, "must be none, all or lora_only")


def _init(key: str, value: Any) -> None:
    if not isinstance(value, bool | str):
        raise wrong_type(key, "true, false or a name")


def _check_auto_mapping(value: Any) -> None:
    """PEFT imports `parent_library` and takes a class out of it: only transformers may be named."""
    if value is None:
        return
    names = list(value.values()) if isinstance(value, dict) else [None]
    safe = all(isinstance(name, str) and is_module(name) for name in names)
    library = value.get("parent_library", "transformers") if isinstance(value, dict) else None
    if not safe or str(library).partition(".")[0] != "transformers":
        raise Refused(Rule.REMOTE_CODE, "only classes of transformers may be named", file=FILE, field="auto_mapping")


def _megatron(key: str, value: Any) -> None:
    if value != "megatron.core":  # PEFT imports it
        raise Refused(Rule.REMOTE_CODE, "names code to import", file=FILE, field=key)


_KINDS: Mapping[str, Callable[[str, Any], None]] = MappingProxyType(
    {
        "r": check_rank,
        "lora_alpha": check_alpha,
        "lora_dropout": _share,
        "rank_pattern": _pattern_of(check_rank),
        "alpha_pattern": _pattern_of(check_alpha),
        "target_modules": _modules_or_pattern,
        "exclude_modules": _modules_or_pattern,
        "modules_to_save": _modules,
        "target_parameters": _modules,
        "layers_to_transform": _numbers,
        "layers_pattern": _layers_pattern,
        "trainable_token_indices": _tokens,
        "bias": _bias,
        "init_lora_weights": _init,
        "megatron_core": _megatron,
        "alora_invocation_tokens": _numbers,
        "qalora_group_size": _numbers,
        "base_model_name_or_path": _text,
        "revision": _text,
        "task_type": _text,
        "peft_version": _text,
        "peft_type": _text,
        "auto_mapping": _object,
        **dict.fromkeys(
            ("use_rslora", "use_dora", "use_qalora", "lora_bias", "fan_in_fan_out", "inference_mode"), _flag
        ),
        "ensure_weight_tying": _flag,
        **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config"), _object),
    }
)
KNOWN_KEYS = frozenset(_KINDS) | frozenset(UNSUPPORTED) | {"layer_replication", "runtime_config"}
