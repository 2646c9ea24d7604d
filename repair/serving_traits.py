"""What serving engines look at in an adapter, whatever they then make of it."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Final

from repair.lora import ExtraKind, LayerKind, LoraAdapter

_CLOSE: Final = 1e-6
BLOCK: Final = re.compile(r"^(?P<before>.*?)\.(?P<number>\d+)\.(?P<after>.*)$")
"""A module of a block: what stands before the block's number, and after it."""
_TGI_MODULES: Final = frozenset(
    {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head"}
)
_HEADS: Final = frozenset({"lm_head", "embed_out"})


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What engines look at in an adapter."""

    adapter: LoraAdapter

    @cached_property
    def rank(self) -> int:
        """Of the largest module, as the tensors have it."""
        return max(layer.rank for layer in self.adapter.layers)

    @cached_property
    def one_scale(self) -> bool:
        """Whether lora_alpha and r alone, rsLoRA considered, tell the scale of every module."""
        return all(
            self._near(layer.scale, self._scale(self._number("r", float(layer.rank)))) for layer in self.adapter.layers
        )

    @cached_property
    def plain_scale(self) -> bool:
        """Whether it is lora_alpha / r everywhere."""
        return all(
            self._near(layer.scale, self._alpha(layer.scale * layer.rank) / self._number("r", float(layer.rank)))
            for layer in self.adapter.layers
        )

    @cached_property
    def scale_by_tensor(self) -> bool:
        """Whether it is lora_alpha over the rank of the module's own tensors everywhere."""
        return all(
            self._near(layer.scale, self._alpha(layer.scale * layer.rank) / layer.rank) for layer in self.adapter.layers
        )

    @cached_property
    def kinds(self) -> frozenset[ExtraKind]:
        """What else travels with it."""
        return frozenset(extra.kind for extra in self.adapter.extras)

    @cached_property
    def lora_bias(self) -> bool:
        """Whether a module shifts its output."""
        return any(layer.bias is not None for layer in self.adapter.layers)

    @cached_property
    def embeddings(self) -> bool:
        """Whether words are adapted."""
        return any(layer.kind is LayerKind.EMBEDDING for layer in self.adapter.layers)

    @cached_property
    def head(self) -> bool:
        """Whether the output layer is adapted."""
        return any(layer.name.rpartition(".")[2] in _HEADS for layer in self.adapter.layers)

    @cached_property
    def fused(self) -> bool:
        """Whether bare parameters are adapted."""
        return any(layer.slot is not None for layer in self.adapter.layers)

    @cached_property
    def apart(self) -> bool:
        """Whether experts are adapted that the file spells one by one."""
        return any(".experts." in layer.name and layer.slot is None for layer in self.adapter.layers)

    @cached_property
    def turned(self) -> bool:
        """Whether the model is said to store its weights as in x out."""
        return bool(self.adapter.config.get("fan_in_fan_out"))

    @cached_property
    def pattern(self) -> bool:
        """Whether the targets are a pattern instead of names."""
        return isinstance(self.adapter.config.get("target_modules"), str)

    @cached_property
    def unknown_to_tgi(self) -> tuple[str, ...]:
        """Modules that TGI has no name for."""
        ends = {layer.name.rpartition(".")[2] for layer in self.adapter.layers}
        return tuple(sorted(ends - _TGI_MODULES))

    @cached_property
    def with_gaps(self) -> tuple[str, ...]:
        """Kinds of modules that are adapted in some of the blocks that the adapter reaches, and not in others."""
        blocks: dict[str, set[int]] = {}
        for layer in self.adapter.layers:
            found = BLOCK.match(layer.name)
            if found is not None:
                blocks.setdefault(found["after"], set()).add(int(found["number"]))
        last = max((max(numbers) for numbers in blocks.values()), default=-1)
        return tuple(sorted(kind for kind, numbers in blocks.items() if len(numbers) <= last))

    def _scale(self, rank: float) -> float:
        alpha = self._alpha(rank)
        return alpha / rank**0.5 if self.adapter.config.get("use_rslora") else alpha / rank

    def _alpha(self, otherwise: float) -> float:
        return self._number("lora_alpha", otherwise)

    def _number(self, key: str, otherwise: float) -> float:
        value = self.adapter.config.get(key)
        return float(value) if isinstance(value, int | float) else otherwise

    @staticmethod
    def _near(one: float, other: float) -> bool:
        return abs(one - other) <= _CLOSE * max(abs(one), abs(other))
