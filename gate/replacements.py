"""Tensors that replace something of the model as a whole: let in only when the config announces them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gate.config import AdapterConfig
from gate.errors import Rule
from gate.header import Header
from gate.pattern import Budget, SafePattern
from gate.records import ExtraKind, ExtraRecord, ModuleKind, module_of, refusal
from gate.targets import OUTPUT_LAYERS, saved_modules

_TOKENS_ENDING = ".token_adapter.trainable_tokens_delta"
_BASE_WEIGHT, _BASE_BIAS = ".base_layer.weight", ".base_layer.bias"


@dataclass(frozen=True, kw_only=True)
class Replacements:
    """Full replacements, each of which the config must announce."""

    config: AdapterConfig
    kinds: Mapping[str, ModuleKind]

    def records(self, keys: list[str], header: Header) -> Iterator[ExtraRecord]:
        """What each of these tensors replaces; raises Refused for one that the config does not announce."""
        saved = saved_modules(self.config.modules_to_save, Budget())
        found: set[str] = set()
        tokens = False
        for key in keys:
            entry = header.tensors[key]
            kind = self._kind(key, saved, found)
            tokens = tokens or kind == ExtraKind.TOKENS
            yield ExtraRecord(key=key, kind=kind, shape=entry.shape, dtype=entry.dtype)
        for missing in (name for name in saved if name not in found):
            raise refusal(Rule.MISSING_TENSOR, missing, "modules_to_save announces it, the file has no tensor of it")
        if self.config.trains_tokens and not tokens:
            raise refusal(Rule.MISSING_TENSOR, "trainable_token_indices", "the file has no tensor of trained tokens")

    def _kind(self, key: str, saved: Mapping[str, SafePattern], found: set[str]) -> ExtraKind:
        """What the tensor replaces; adds the name of the saved module that it belongs to."""
        if key.endswith(_TOKENS_ENDING) and self.config.trains_tokens:
            module_of(key, _TOKENS_ENDING)
            return ExtraKind.TOKENS
        if key.endswith(_BASE_WEIGHT) and self._is_embedding(module_of(key, _BASE_WEIGHT)):
            return ExtraKind.MODULE
        if key.endswith(_BASE_BIAS):
            module = module_of(key, _BASE_BIAS)
            announced = self.config.bias != "none" and module in self.kinds
            if announced or self._is_embedding(module):
                return ExtraKind.BIAS
            raise refusal(Rule.UNEXPECTED_TENSOR, key, "the config does not announce it")
        module = module_of(key, key[key.rfind(".") :])
        owner = next((name for name, pattern in saved.items() if pattern.matches(module)), None)
        if owner is not None:
            found.add(owner)
            return ExtraKind.MODULE
        if self.config.bias == "all" and key.endswith(".bias") and module not in self.kinds:
            return ExtraKind.BIAS
        raise refusal(Rule.UNEXPECTED_TENSOR, key, "not a form that the config announces")

    def _is_embedding(self, module: str) -> bool:
        """PEFT saves the base weight along with an adapted embedding or output layer."""
        last = module.rpartition(".")[2]
        kind = self.kinds.get(module)
        return kind == ModuleKind.EMBEDDING or (kind is not None and last in OUTPUT_LAYERS)
