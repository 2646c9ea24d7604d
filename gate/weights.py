"""What the tensors of an adapter mean: complete low-rank modules, and full replacements.

PEFT loads every key that its model happens to have, announced or not: a file can replace any weight of the
base model in silence. So a key is let in only when the config announces what it does; all others are refused.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from gate.config import AdapterConfig
from gate.errors import Refused, Rule
from gate.fit import experts_fit, matrix_fits
from gate.header import Header, TensorEntry
from gate.names import WEIGHTS_FILE as FILE
from gate.parameters import Site, parameters_at, site_of
from gate.records import PREFIX, ModuleKind, ModuleRecord, Shapes, Weights, module_of, refusal
from gate.replacements import Replacements
from gate.scan import FORMATS
from gate.targets import OUTPUT_LAYERS


class Part(StrEnum):
    """What a tensor is within its module."""

    A = "A"
    B = "B"
    BIAS = "bias"
    MAGNITUDE = "magnitude"


@dataclass(frozen=True, kw_only=True)
class _Form:
    ending: str
    part: Part
    kind: ModuleKind | None


_FORMS = (
    _Form(ending=".lora_A.weight", part=Part.A, kind=ModuleKind.LINEAR),
    _Form(ending=".lora_B.weight", part=Part.B, kind=ModuleKind.LINEAR),
    _Form(ending=".lora_B.bias", part=Part.BIAS, kind=ModuleKind.LINEAR),
    _Form(ending=".lora_embedding_A", part=Part.A, kind=ModuleKind.EMBEDDING),
    _Form(ending=".lora_embedding_B", part=Part.B, kind=ModuleKind.EMBEDDING),
    _Form(ending=".lora_magnitude_vector", part=Part.MAGNITUDE, kind=None),
)


def read_weights(header: Header, config: AdapterConfig, shapes: Shapes | None = None) -> Weights:
    """Pair, measure and judge all tensors; with `shapes`, also against the base model."""
    parts: dict[Site, dict[Part, str]] = {}
    kinds: dict[str, ModuleKind] = {}
    others: list[str] = []
    for key, entry in sorted(header.tensors.items()):
        _check_tensor(key, entry)
        form = next((form for form in _FORMS if key.endswith(form.ending)), None)
        if form is None:
            others.append(key)
            continue
        site = _site(key, form.ending, wrapped=bool(config.target_parameters))
        if form.kind is not None and kinds.setdefault(site.module, form.kind) != form.kind:
            raise refusal(Rule.UNEXPECTED_TENSOR, key, "the module is both linear and embedding")
        parts.setdefault(site, {})[form.part] = key
    if not parts:
        raise Refused(Rule.MISSING_TENSOR, "no low-rank module in the file", file=FILE, field="header")
    config.check_patterns(modules=max(len(parts), len(others)))
    judge = _Judge(header=header, config=config, shapes=shapes)
    parameters = parameters_at(parts, config.target_parameters, ordinary=config.targets_module)
    modules = [
        judge.parameter(parameters[site], found)
        if site in parameters
        else judge.module(site.module, found, kinds.get(site.module))
        for site, found in parts.items()
    ]
    judge.none_is_random()
    extras = tuple(Replacements(config=config, kinds=kinds).records(others, header))
    return Weights(modules=tuple(sorted(modules, key=lambda module: module.name)), extras=extras)


@dataclass(frozen=True, kw_only=True)
class _Judge:
    """Holds one module after the other to the config and the base model."""

    header: Header
    config: AdapterConfig
    shapes: Shapes | None

    def parameter(self, path: str, parts: Mapping[Part, str]) -> ModuleRecord:
        """Factors of a bare parameter: those of all its experts in one pair of tensors."""
        key_a, key_b = self._factors(path, parts)
        a, b = self.header.tensors[key_a], self.header.tensors[key_b]
        rank = self.config.rank_for(path)
        matrix = path.endswith(".weight") and a.shape[0] == rank
        if a.shape[0] % rank or b.shape[1] != a.shape[0]:
            detail = f"{a.shape[0]} rows and {b.shape[1]} columns are not the same number of experts of rank {rank}"
            raise refusal(Rule.RANK_MISMATCH, key_a, detail)
        for part in (Part.BIAS, Part.MAGNITUDE):
            if part in parts:
                raise refusal(Rule.UNEXPECTED_TENSOR, parts[part], "PEFT adapts a bare parameter without it")
        record = ModuleRecord(
            name=path.removesuffix(".weight"),
            rank=rank,
            out_features=b.shape[0],
            in_features=a.shape[1],
            dtype=self._dtype(key_a, key_b),
            kind=ModuleKind.LINEAR,
            scale=self.config.scale_for(path, rank),
            experts=None if matrix else a.shape[0] // rank,
        )
        if record.experts is None:
            self._fits(record, key_a, key_b)
        else:
            self._experts_fit(record, record.experts, key_a)
        return record

    def module(self, name: str, parts: Mapping[Part, str], kind: ModuleKind | None) -> ModuleRecord:
        key_a, key_b = self._factors(name, parts)
        a, b = self.header.tensors[key_a], self.header.tensors[key_b]
        rank, expected = a.shape[0], self.config.rank_for(name)
        if b.shape[1] != rank:
            raise refusal(Rule.RANK_MISMATCH, key_b, f"A has rank {rank}, B has {b.shape[1]}")
        if rank != expected:
            raise refusal(Rule.RANK_MISMATCH, key_a, f"the tensors have rank {rank}, the config says {expected}")
        record = ModuleRecord(
            name=name,
            rank=rank,
            out_features=b.shape[0],
            in_features=a.shape[1],
            dtype=self._dtype(key_a, key_b),
            kind=kind or ModuleKind.LINEAR,
            scale=self.config.scale_for(name, rank),
        )
        self._vectors(record, parts)
        self._targeted(record, key_a)
        self._fits(record, key_a, key_b)
        return record

    def none_is_random(self) -> None:
        """With ``init_lora_weights: false`` PEFT gives a targeted module that the file lacks a random update."""
        if self.config.init_lora_weights is not False or self.shapes is None:
            return
        self.config.check_patterns(modules=len(self.shapes))
        linear_only = self.config.all_linear
        for name in (name for name, shape in self.shapes.items() if len(shape) == 2):  # noqa: PLR2004 - a matrix
            present = f"{PREFIX}{name}.lora_A.weight" in self.header.tensors
            present = present or f"{PREFIX}{name}.lora_embedding_A" in self.header.tensors
            embedding = "embed" in name.rpartition(".")[2]
            if not present and self.config.targets(name) and not (linear_only and embedding):
                detail = "targeted but not in the file, and init_lora_weights is false: PEFT would fill it at random"
                raise refusal(Rule.MISSING_TENSOR, name, detail)

    def _factors(self, name: str, parts: Mapping[Part, str]) -> tuple[str, str]:
        for part, other in ((Part.A, Part.B), (Part.B, Part.A)):
            if part not in parts:
                present = parts.get(other) or next(iter(parts.values()))
                raise refusal(Rule.MISSING_TENSOR, present, f"the module {name!r} has no {part}")
            shape = self.header.tensors[parts[part]].shape
            if len(shape) != 2:  # noqa: PLR2004 - matrices
                raise refusal(Rule.BAD_SHAPE, parts[part], f"a factor is a matrix, this has shape {list(shape)}")
        return parts[Part.A], parts[Part.B]

    def _dtype(self, key_a: str, key_b: str) -> str:
        a, b = self.header.tensors[key_a].dtype, self.header.tensors[key_b].dtype
        if a != b:
            raise refusal(Rule.BAD_DTYPE, key_b, f"A is {a}, B is {b}")
        return a

    def _vectors(self, record: ModuleRecord, parts: Mapping[Part, str]) -> None:
        """Bias and magnitude: there exactly when the config says so, one number for each output."""
        wants_bias = self.config.lora_bias and record.kind == ModuleKind.LINEAR
        for part, wanted in ((Part.BIAS, wants_bias), (Part.MAGNITUDE, self.config.use_dora)):
            key = parts.get(part)
            if key is None and wanted:
                raise refusal(Rule.MISSING_TENSOR, parts[Part.B], f"the module has no {part}, the config wants one")
            if key is None:
                continue
            if not wanted:
                raise refusal(Rule.UNEXPECTED_TENSOR, key, "the config does not announce it")
            if self.header.tensors[key].shape != (record.out_features,):
                raise refusal(Rule.BAD_SHAPE, key, f"must have shape [{record.out_features}]")

    def _targeted(self, record: ModuleRecord, key: str) -> None:
        embedding = record.kind == ModuleKind.EMBEDDING
        if self.config.raw.get("ensure_weight_tying") and record.name.rpartition(".")[2] in OUTPUT_LAYERS:
            return  # it comes with the embedding; `tying.py` looks at both
        if not self.config.targets(record.name) or (self.config.all_linear and embedding):
            raise refusal(Rule.NOT_TARGETED, key, "the config does not target this module")

    def _fits(self, record: ModuleRecord, key_a: str, key_b: str) -> None:
        if self.shapes is not None:
            matrix_fits(record, self.shapes, turned=self.config.fan_in_fan_out, keys=(key_a, key_b))

    def _experts_fit(self, record: ModuleRecord, experts: int, key: str) -> None:
        if self.shapes is not None:
            experts_fit(record, experts, self.shapes, key=key)


def _check_tensor(key: str, entry: TensorEntry) -> None:
    if entry.dtype not in FORMATS:
        raise refusal(Rule.BAD_DTYPE, key, f"{entry.dtype} is none of {', '.join(sorted(FORMATS))}")
    if entry.start == entry.end:
        raise refusal(Rule.BAD_SHAPE, key, "an empty tensor")


def _site(key: str, ending: str, *, wrapped: bool) -> Site:
    """Where the factors of a key stand; only `target_parameters` puts wrappers into the name."""
    site = site_of(key.removesuffix(ending)) if wrapped else Site(module=key.removesuffix(ending))
    return Site(module=module_of(site.module, "", key=key), nested=site.nested)
