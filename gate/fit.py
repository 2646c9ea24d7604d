"""Whether an adapter's modules are those of a model: names and sizes, nothing else.

Asked while a file is judged, and again when an uploaded adapter is ordered against a reference that it was not uploaded
for: then what the inspection wrote down is held against what was read of the reference.
"""

from collections.abc import Mapping
from typing import Any, Final

from gate.errors import Refused, Rule
from gate.names import WEIGHTS_FILE
from gate.parameters import homes, spellings, stored_apart
from gate.records import ModuleKind, ModuleRecord, Shapes, refusal
from gate.targets import OUTPUT_LAYERS

_EMBEDDINGS = frozenset({"embed_tokens", "wte", "embed_in"})
TO_DO: Final = "name the reference of the model that it was trained on"


def require_fit(inspection: Mapping[str, Any], shapes: Shapes) -> None:
    """Hold an inspected adapter against a model; raises Refused for the first module that is none of it.

    An inspection that says nothing of modules is not judged, nor a side that it does not tell: the whole file is judged
    once more before anything is measured.
    """
    turned = inspection.get("fan_in_fan_out")
    for module in inspection.get("modules", ()):
        record = ModuleRecord(**{**module, "kind": ModuleKind(module["kind"])})
        try:
            if record.experts is not None:
                experts_fit(record, record.experts, shapes, key=record.name)
            else:
                _either_way(record, shapes, turned)
        except Refused as refused:
            detail = f"{refused.detail}; {TO_DO}"
            raise Refused(refused.rule, detail, file=WEIGHTS_FILE, field=record.name) from refused


def matrix_fits(record: ModuleRecord, shapes: Shapes, *, turned: bool, keys: tuple[str, str]) -> None:
    """Raise Refused, naming the tensor of A or of B, when the model has no such matrix or one of another size.

    ``turned`` says that the model stores its linears as (in, out).
    """
    key_a, key_b = keys
    stored = next((shapes[name] for name in spellings(record.name) if name in shapes), None)
    if stored is None and record.name.rpartition(".")[2] in OUTPUT_LAYERS:  # a head that is tied to the embedding
        words = [shape for name, shape in shapes.items() if name.rpartition(".")[2] in _EMBEDDINGS]
        stored = words[0] if len(words) == 1 else None
    if stored is None:
        raise refusal(Rule.UNKNOWN_MODULE, key_a, f"the base model has no weight of {record.name!r}")
    if len(stored) != 2:  # noqa: PLR2004 - a matrix
        raise refusal(Rule.SHAPE_MISMATCH, key_a, f"one matrix, the base has {list(stored)}")
    out_features, in_features = reversed(stored) if turned or record.kind == ModuleKind.EMBEDDING else stored
    if record.in_features != in_features:
        raise refusal(Rule.SHAPE_MISMATCH, key_a, f"{record.in_features} inputs, the base has {in_features}")
    if record.out_features != out_features:
        raise refusal(Rule.SHAPE_MISMATCH, key_b, f"{record.out_features} outputs, the base has {out_features}")


def experts_fit(record: ModuleRecord, experts: int, shapes: Shapes, *, key: str) -> None:
    """Against a parameter with three dimensions, or against the experts that the checkpoint stores one by one."""
    wanted = (record.out_features, record.in_features)
    stored = next((shapes[home] for home in homes(record.name) if home in shapes), None)
    if stored is not None:
        if stored not in {(experts, *wanted), (experts, *reversed(wanted))}:
            raise refusal(Rule.SHAPE_MISMATCH, key, f"{experts} of {list(wanted)}, the base has {list(stored)}")
        return
    for expert in range(experts):
        parts = stored_apart(record.name, expert, shapes.__contains__)
        if parts is None:
            raise refusal(Rule.UNKNOWN_MODULE, key, f"the base model has no expert {expert} of {record.name!r}")
        rows, columns = sum(shapes[part][0] for part in parts), shapes[parts[0]][1]
        if (rows, columns) != wanted:
            raise refusal(
                Rule.SHAPE_MISMATCH, key, f"{list(wanted)}, expert {expert} of the base has {[rows, columns]}"
            )


def _either_way(record: ModuleRecord, shapes: Shapes, turned: object) -> None:
    """As `matrix_fits`; an inspection of before `fan_in_fan_out` was written down may mean either."""
    keys = (record.name, record.name)
    if isinstance(turned, bool):
        matrix_fits(record, shapes, turned=turned, keys=keys)
        return
    try:
        matrix_fits(record, shapes, turned=True, keys=keys)
    except Refused:
        matrix_fits(record, shapes, turned=False, keys=keys)
