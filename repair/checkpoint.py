"""One weight at a time out of a model folder, by name.

Single-file and sharded safetensors, with whatever prefix the model class puts before its modules, and heads that borrow
the embedding's weight. Nothing is read before it is asked for, and then only the rows that are asked for.
"""

import json
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from gate.errors import Refused
from gate.model import require_none_said
from gate.parameters import homes, spellings, stored_apart
from repair.errors import MissingWeight, ShapeMismatch, WrongReference
from repair.experts import exchanged, stored_transposed
from repair.lora import LoraLayer, ParameterSlot, Weight
from repair.stored_weight import StackedWeight, StoredWeight
from repair.weight_file import WeightFile

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_PREFIXES = frozenset({"base_model", "model", "language_model", "transformer", "decoder"})
_HEADS = frozenset({"lm_head", "embed_out"})
_EMBEDDINGS = frozenset({"embed_tokens", "wte", "embed_in"})
_POSITIONS = frozenset({"wpe", "embed_positions"})
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})


class Checkpoint:
    """The weights of one model folder."""

    def __init__(self, directory: Path, files: Mapping[str, Path]) -> None:
        """Use `open`; ``files`` says which file holds which tensor."""
        self.directory = directory
        self._files = dict(files)
        self._opened: dict[Path, WeightFile] = {}
        self._weights: dict[tuple[str, bool], StoredWeight] = {}
        self._memories: dict[tuple[str, bool, Path | None], dict[str, Any]] = {}

    @classmethod
    def open(cls, directory: Path) -> "Checkpoint":
        """Find the tensors of a model folder; raises WrongReference, also for a model whose weights are quantised."""
        try:
            require_none_said(directory)
        except Refused as refused:
            raise WrongReference(refused.detail, field=refused.field, file=str(directory / refused.file)) from refused
        index = directory / INDEX
        if index.is_file():
            return cls(directory, _sharded(index))
        single = directory / SINGLE
        if not single.is_file():
            raise WrongReference(f"neither {SINGLE} nor {INDEX} is there", file=str(directory))
        return cls(directory, dict.fromkeys(WeightFile(single).handle.keys(), single))

    @property
    def modules(self) -> Iterator[str]:
        """Names of all modules that have a weight."""
        return (key.removesuffix(".weight") for key in self._files if key.endswith(".weight"))

    @property
    def linears(self) -> Iterator[str]:
        """Names of all modules whose own weight is a matrix and no embedding."""
        others = _EMBEDDINGS | _POSITIONS
        return (name for name in self.modules if name.rpartition(".")[2] not in others and len(self.shape(name)) == 2)  # noqa: PLR2004 - a matrix

    def has(self, module: str) -> bool:
        """Whether this module has a weight here, its own or a borrowed one."""
        try:
            self._find(module)
        except MissingWeight:
            return False
        return True

    def borrows(self, module: str) -> bool:
        """Whether this module is a head without a weight of its own: it uses the embedding's."""
        return module.rpartition(".")[2] in _HEADS and self._own(module) is None

    def shape(self, module: str) -> tuple[int, ...]:
        """Shape as stored."""
        key = self._find(module)
        return tuple(self._handle(key).get_slice(key).get_shape())

    def weight(self, module: str) -> Float[Tensor, "..."]:
        """The whole weight as stored; raises MissingWeight."""
        key = self._find(module)
        tensor: Tensor = self._handle(key).get_tensor(key)
        return tensor

    def tensor(self, key: str) -> Tensor:
        """Any tensor by its full name, a borrowed head among them; raises MissingWeight."""
        if key.endswith(".weight"):
            key = self._find(key.removesuffix(".weight"))
        alike = [key] if key in self._files else self._by_short_name.get(short_name(key), [])
        if len(alike) != 1:
            raise MissingWeight("the model has no such tensor", field=key, file=str(self.directory))
        found: Tensor = self._handle(alike[0]).get_tensor(alike[0])
        return found

    def for_layer(self, layer: LoraLayer) -> Weight:
        """A handle on the weight that ``layer`` adapts, in its orientation; raises ShapeMismatch."""
        if layer.slot is not None and layer.slot.expert is not None:
            return self._expert(layer, layer.slot)
        stored = self._stored(layer.name, transposed=False).stored
        flipped = stored[::-1] == layer.shape
        # A GPT-2 adapter declares fan_in_fan_out for all modules; its head is an ordinary linear all the same.
        transposed = layer.transposed and (flipped or stored != layer.shape)
        weight = self._stored(layer.name, transposed=transposed)
        if weight.shape != layer.shape:
            detail = f"the adapter has {layer.shape}, the model {weight.shape} (out, in)"
            raise ShapeMismatch(detail, field=layer.name, file=str(self.directory))
        return weight

    def memory(self, layer: LoraLayer, base: "Checkpoint | None") -> dict[str, Any]:
        """What is remembered about a weight of this model next to that of its base, while both stay open."""
        key = (layer.name, layer.transposed, None if base is None else base.directory)
        return self._memories.setdefault(key, {})

    def oriented(self, layer: LoraLayer, *, like: Weight) -> Weight:
        """A handle on the weight of a layer, turned the way that ``like`` is turned."""
        if layer.slot is not None and layer.slot.expert is not None:
            return self._expert(layer, layer.slot)
        return self._stored(layer.name, transposed=isinstance(like, StoredWeight) and like.transposed)

    def righted(self, layer: LoraLayer) -> LoraLayer:
        """The layer with its B on the output side, where this model shows that it was the other way round."""
        if layer.slot is None or layer.slot.expert is None or layer.shape[0] == layer.shape[1]:
            return layer
        found = self._expert_weight(layer, layer.slot).shape
        return exchanged(layer) if found == layer.shape[::-1] else layer

    def _expert(self, layer: LoraLayer, slot: ParameterSlot) -> Weight:
        weight = self._expert_weight(layer, slot)
        if weight.shape != layer.shape:
            detail = f"the adapter has {layer.shape}, the model {weight.shape} (out, in)"
            raise ShapeMismatch(detail, field=layer.name, file=str(self.directory))
        return weight

    def _expert_weight(self, layer: LoraLayer, slot: ParameterSlot) -> Weight:
        """One expert, out of a fused parameter or of the modules that it is stored in."""
        expert = slot.expert or 0
        key = next((home for home in map(self._fused, homes(slot.parameter)) if home is not None), None)
        if key is not None:
            return self._slice(key, expert, layer)
        parts = stored_apart(slot.parameter, expert, lambda name: self._own(name) is not None)
        if parts is None:
            raise MissingWeight("the model has no such expert", field=layer.name, file=str(self.directory))
        return StackedWeight(parts=tuple(self._stored(part, transposed=False) for part in parts))

    def _slice(self, key: str, expert: int, layer: LoraLayer) -> StoredWeight:
        stored = self._sides(key)
        experts = self._handle(key).get_slice(key).get_shape()[0]
        if expert >= experts:
            raise MissingWeight("the model has no such expert", field=layer.name, file=str(self.directory))
        transposed = self._stored_transposed(key)
        if transposed is None:
            transposed = stored != layer.shape and stored[::-1] == layer.shape
        file = self._file(key)
        return StoredWeight(key=key, file=file, stored=stored, transposed=transposed, expert=expert, experts=experts)

    def _stored_transposed(self, key: str) -> bool | None:
        """Whether a fused parameter is stored as (in, out): the two of a block tell, their shapes being of a kind."""
        home = key.rpartition(".")[0]
        up, down = f"{home}.gate_up_proj", f"{home}.down_proj"
        if up not in self._files or down not in self._files:
            return None
        return stored_transposed(self._sides(up), self._sides(down))

    def _fused(self, parameter: str) -> str | None:
        """The tensor with three dimensions that has this name, or differs from it in the prefix only."""
        for name in (parameter, f"{parameter}.weight"):
            exact = name if name in self._files else None
            alike = [exact] if exact else self._by_short_name.get(short_name(name), [])
            if len(alike) == 1 and len(self._handle(alike[0]).get_slice(alike[0]).get_shape()) == 3:  # noqa: PLR2004 - experts
                return alike[0]
        return None

    def _sides(self, key: str) -> tuple[int, int]:
        """The last two dimensions, as stored; raises WrongReference for a quantised tensor."""
        part = self._handle(key).get_slice(key)
        if part.get_dtype() not in _FLOATS:
            detail = "its rounding is as large as what alignment changed: give the 16 bit original"
            detail = f"{part.get_dtype()} is quantised, {detail}"
            raise WrongReference(detail, field=key, file=str(self.directory))
        shape = part.get_shape()
        return shape[-2], shape[-1]

    def _stored(self, module: str, *, transposed: bool) -> StoredWeight:
        """A matrix by its module's name; what was found once is found at once."""
        known = self._weights.get((module, transposed))
        if known is None:
            key = self._find(module)
            known = StoredWeight(key=key, file=self._file(key), stored=self._matrix(key), transposed=transposed)
            self._weights[module, transposed] = known
        return known

    def _matrix(self, key: str) -> tuple[int, int]:
        part = self._handle(key).get_slice(key)
        shape = tuple(part.get_shape())
        if len(shape) != 2:  # noqa: PLR2004 - a matrix
            raise ShapeMismatch(f"a matrix is needed, this has shape {shape}", field=key, file=str(self.directory))
        return self._sides(key)

    def _find(self, module: str) -> str:
        key = self._own(module)
        if key is None and module.rpartition(".")[2] in _HEADS:
            embeddings = [name for name in self.modules if name.rpartition(".")[2] in _EMBEDDINGS]
            key = f"{embeddings[0]}.weight" if len(embeddings) == 1 else None
        if key is None:
            raise MissingWeight("the model has no such module", field=module, file=str(self.directory))
        return key

    def _own(self, module: str) -> str | None:
        """The tensor of this module: by its full name, else by the one name that differs in the prefix only."""
        exact = [key for key in (f"{name}.weight" for name in spellings(module)) if key in self._files]
        if exact:
            return exact[0]
        short = (short_name(f"{name}.weight") for name in spellings(module))
        alike = [key for name in short for key in self._by_short_name.get(name, [])]
        if len(alike) > 1:
            raise MissingWeight(f"the name fits several tensors: {alike}", field=module, file=str(self.directory))
        return alike[0] if alike else None

    @cached_property
    def _by_short_name(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for key in self._files:
            found.setdefault(short_name(key), []).append(key)
        return found

    def _handle(self, key: str) -> Any:
        return self._file(key).handle

    def _file(self, key: str) -> WeightFile:
        path = self._files[key]
        if path not in self._opened:
            self._opened[path] = WeightFile(path)
        return self._opened[path]


def short_name(key: str) -> str:
    """The name without the prefixes that model classes put in front."""
    parts = key.split(".")
    first = next((i for i, part in enumerate(parts) if part not in _PREFIXES), 0)
    return ".".join(parts[first:])


def _sharded(index: Path) -> dict[str, Path]:
    try:
        shards: dict[str, str] = json.loads(index.read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise WrongReference(f"cannot be read: {error}", file=str(index), field="weight_map") from error
    files = {}
    for key, shard in shards.items():
        if Path(shard).name != shard:
            raise WrongReference("a shard must lie beside the index", file=str(index), field=key)
        if not (index.parent / shard).is_file():
            raise WrongReference("the shard is missing", file=shard, field=key)
        files[key] = index.parent / shard
    return files
