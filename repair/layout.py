"""How PEFT spells an adapter in files: tensor names, and the config keys that change what they mean.

What we cannot repair is refused here by name. A key that only guides training is let through.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from gate.parameters import BASE_LAYER, Site, site_of
from repair.errors import UnsupportedAdapter
from repair.lora import ExtraKind, LayerKind

CONFIG: Final = "adapter_config.json"
WEIGHTS: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."

_REFUSED: Final[Mapping[str, str]] = {
    "use_qalora": "QA-LoRA pools its inputs in groups",
    "alora_invocation_tokens": "aLoRA is active after its invocation tokens only",
    "use_bdlora": "block-diagonal LoRA shards its factors",
    "arrow_config": "Arrow routes between adapters",
    "kasa_config": "KaSA adds singular values of its own",
    "monteclora_config": "MonteCLoRA samples its factors",
    "layer_replication": "replicates layers of the base model, so module names mean other modules",
}
_MOVES_THE_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initialisations that subtract something from the base weights: the adapter is only valid on that other base."""


@dataclass(frozen=True, kw_only=True)
class Spelling:
    """What a tensor's name says: which module, which part of it, and under how many wrappers of parameters."""

    module: str
    part: str
    kind: LayerKind = LayerKind.LINEAR
    nested: int = 0


_SUFFIXES: Final[Mapping[str, tuple[str, LayerKind]]] = {
    ".lora_A.weight": ("a", LayerKind.LINEAR),
    ".lora_B.weight": ("b", LayerKind.LINEAR),
    ".lora_B.bias": ("bias", LayerKind.LINEAR),
    ".lora_magnitude_vector": ("magnitude", LayerKind.LINEAR),
    ".lora_magnitude_vector.weight": ("magnitude", LayerKind.LINEAR),
    ".lora_embedding_A": ("a", LayerKind.EMBEDDING),
    ".lora_embedding_B": ("b", LayerKind.EMBEDDING),
}


def refuse_config(raw: Mapping[str, Any]) -> None:
    """Raise UnsupportedAdapter for the first key that asks for what we do not repair."""
    kind = raw.get("peft_type", "LORA")
    if kind != "LORA":
        raise UnsupportedAdapter(f"{kind!r} is not LORA; convert it first", field="peft_type", file=CONFIG)
    for key, why in _REFUSED.items():
        if raw.get(key):
            raise UnsupportedAdapter(why, field=key, file=CONFIG)
    init = raw.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_MOVES_THE_BASE):
        detail = f"{init!r} changes the base weights; save it converted to a plain LoRA"
        raise UnsupportedAdapter(detail, field="init_lora_weights", file=CONFIG)


def spelling(key: str) -> Spelling | ExtraKind:
    """Which part of which module a tensor is, or what else it replaces; raises UnsupportedAdapter."""
    if not key.startswith(PREFIX):
        raise UnsupportedAdapter(f"does not start with {PREFIX}", field=key, file=WEIGHTS)
    for suffix, (part, kind) in _SUFFIXES.items():
        module = key.removesuffix(suffix).removeprefix(PREFIX)
        if key.endswith(suffix) and module:
            site = site_of(module)
            return Spelling(module=site.module, part=part, kind=kind, nested=site.nested)
    if ".lora_" in key:
        raise UnsupportedAdapter("a LoRA tensor of an unknown kind", field=key, file=WEIGHTS)
    if ".token_adapter." in key:
        return ExtraKind.TOKENS
    if key.endswith(".bias"):
        return ExtraKind.BIAS
    if key.endswith(".weight"):
        return ExtraKind.MODULE
    raise UnsupportedAdapter("a tensor of an unknown kind", field=key, file=WEIGHTS)


def key_for(module: str, part: str, kind: LayerKind) -> str:
    """The name that PEFT reads this part of a module under."""
    linear = {"a": "lora_A.weight", "b": "lora_B.weight", "bias": "lora_B.bias", "magnitude": "lora_magnitude_vector"}
    embedding = {"a": "lora_embedding_A", "b": "lora_embedding_B"}
    return f"{PREFIX}{module}.{(embedding if kind is LayerKind.EMBEDDING else linear)[part]}"


def key_at(site: Site, part: str) -> str:
    """The name that PEFT reads this part of a bare parameter under."""
    return key_for(f"{site.module}{BASE_LAYER * site.nested}", part, LayerKind.LINEAR)
