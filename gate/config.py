"""`adapter_config.json`: what the adapter says it is, as far as a serving engine acts on it.

The matching rules are those of PEFT, to the letter: an adapter must mean to us what it means to the engine
that serves it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from gate.config_rules import KNOWN_KEYS, check_code, check_known, check_supported
from gate.errors import Refused, Rule
from gate.files import read_small
from gate.names import CONFIG_FILE as FILE
from gate.pattern import Budget
from gate.strict_json import JsonText, parse_object
from gate.targets import KeyPatterns, Targets

MAX_CONFIG_BYTES = 1 << 20
LORA = "LORA"
# Each costs some ten microseconds, each of the second kind about one: seconds at worst.
MAX_PATTERN_MATCHES = 200_000
MAX_PATH_MATCHES = 4_000_000


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """The keys that decide what the tensors mean.

    Attributes:
        peft_type: Always ``LORA``.
        r: Rank of the modules that no pattern names.
        alpha: Numerator of the scale of the modules that no pattern names.
        use_rslora: The scale is alpha / sqrt(rank) instead of alpha / rank.
        use_dora: Each module carries a magnitude.
        lora_bias: Each module carries ``lora_B.bias``.
        bias: Which biases of the base model are replaced: none, all, lora_only.
        fan_in_fan_out: The base model stores its weights as (in, out).
        target_modules: Names, or one pattern, or ``all-linear``.
        rank_pattern: Ranks of the modules that match a pattern.
        alpha_pattern: Alphas of the modules that match a pattern.
        modules_to_save: Modules whose weights are replaced.
        target_parameters: Bare parameters that are adapted, such as those of fused experts: paths, or how they end.
        base_model_name_or_path: What it was trained on, says the uploader.
        revision: Which revision of that.
        init_lora_weights: How training began.
        raw: The whole document; unknown keys are preserved.
        unknown_keys: Which of its keys we do not know, sorted.
    """

    peft_type: str
    r: int
    alpha: float
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    bias: str
    fan_in_fan_out: bool
    target_modules: tuple[str, ...] | str | None
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    modules_to_save: tuple[str, ...]
    target_parameters: tuple[str, ...]
    base_model_name_or_path: str | None
    revision: str | None
    init_lora_weights: bool | str
    raw: Mapping[str, Any]
    unknown_keys: tuple[str, ...]

    def rank_for(self, module: str) -> int:
        """The rank that the config gives to a module: the first pattern that matches, else `r`."""
        return self._ranks.first(module, self.r)

    def alpha_for(self, module: str) -> float:
        """The alpha that the config gives to a module: the first pattern that matches, else `alpha`."""
        return self._alphas.first(module, self.alpha)

    def scale_for(self, module: str, rank: int) -> float:
        """What ``B @ A`` of this module is multiplied with when it is served."""
        return self.alpha_for(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def targets(self, module: str) -> bool:
        """Whether PEFT would put a LoRA on this module."""
        return self._targets.match(module)

    def targets_module(self, module: str) -> bool:
        """Whether `target_modules` names this module; where it is null or empty, only parameters are meant."""
        return bool(self.target_modules) and self.targets(module)

    @property
    def all_linear(self) -> bool:
        """Whether every linear module is targeted, whatever its name."""
        return self._targets.every_linear

    @property
    def trains_tokens(self) -> bool:
        """Whether single rows of an embedding are replaced."""
        return bool(self.raw.get("trainable_token_indices"))

    @cached_property
    def _budget(self) -> Budget:
        return Budget()

    @cached_property
    def _ranks(self) -> KeyPatterns[int]:
        return KeyPatterns("rank_pattern", self.rank_pattern, self._budget)

    @cached_property
    def _alphas(self) -> KeyPatterns[float]:
        return KeyPatterns("alpha_pattern", self.alpha_pattern, self._budget)

    @cached_property
    def _targets(self) -> Targets:
        return Targets.of(self.raw, self._budget)

    def check_patterns(self, *, modules: int) -> None:
        """Refuse now what is no harmless pattern, and what would keep us busy matching `modules` modules."""
        for field, patterns in (("rank_pattern", self._ranks), ("alpha_pattern", self._alphas)):
            if patterns.complex * modules > MAX_PATTERN_MATCHES or len(patterns) * modules > MAX_PATH_MATCHES:
                raise Refused(Rule.TOO_MANY_VALUES, "too many patterns and modules", file=FILE, field=field)
        if self._targets.complex * modules > MAX_PATTERN_MATCHES:
            raise Refused(Rule.TOO_MANY_VALUES, "too many patterns and modules", file=FILE, field="modules_to_save")


def read_config(source: Path | bytes) -> AdapterConfig:
    """The config in a file or in bytes; whatever is wrong with it is a refusal that names the key."""
    data = source if isinstance(source, bytes) else read_small(source, limit=MAX_CONFIG_BYTES, name=FILE)
    if len(data) > MAX_CONFIG_BYTES:
        raise Refused(Rule.FILE_TOO_LARGE, f"more than {MAX_CONFIG_BYTES} bytes", file=FILE, field="size")
    raw = parse_object(JsonText(data=data, file=FILE))
    peft_type = raw.get("peft_type")
    if peft_type != LORA:
        detail = "only LORA adapters are handled: convert it to LoRA with PEFT (save_as_lora) and bring the result"
        raise Refused(Rule.UNSUPPORTED_PEFT_TYPE, detail, file=FILE, field="peft_type")
    for key in raw:
        if not (0 < len(key) <= 64 and key.isprintable()):  # noqa: PLR2004 - PEFT's longest has 23
            raise Refused(Rule.BAD_TEXT, "not a usable key", file=FILE, field=key)
    check_code(raw)
    for key, value in raw.items():
        check_known(key, value)
    check_supported(raw)
    config = _config(raw)
    config.check_patterns(modules=0)
    return config


def _config(raw: Mapping[str, Any]) -> AdapterConfig:
    """The typed view of a document whose values were checked; null stands for PEFT's default."""
    for key in ("r", "lora_alpha"):
        if raw.get(key) is None:
            raise Refused(Rule.MISSING_KEY, "needed to know what the weights mean", file=FILE, field=key)
    target = raw.get("target_modules")
    init = raw.get("init_lora_weights")
    return AdapterConfig(
        peft_type=LORA,
        r=raw["r"],
        alpha=float(raw["lora_alpha"]),
        use_rslora=bool(raw.get("use_rslora")),
        use_dora=bool(raw.get("use_dora")),
        lora_bias=bool(raw.get("lora_bias")),
        bias=raw.get("bias") or "none",
        fan_in_fan_out=bool(raw.get("fan_in_fan_out")),
        target_modules=tuple(target) if isinstance(target, list) else target,
        rank_pattern=MappingProxyType(dict(raw.get("rank_pattern") or {})),
        alpha_pattern=MappingProxyType(dict(raw.get("alpha_pattern") or {})),
        modules_to_save=tuple(raw.get("modules_to_save") or ()),
        target_parameters=tuple(raw.get("target_parameters") or ()),
        base_model_name_or_path=raw.get("base_model_name_or_path"),
        revision=raw.get("revision"),
        init_lora_weights=True if init is None else init,
        raw=MappingProxyType(raw),
        unknown_keys=tuple(sorted(key for key in raw if key not in KNOWN_KEYS)),
    )
