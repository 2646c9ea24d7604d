"""What was written down of an upload tells whether it fits a model, as the file itself would."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gate.admission import admit
from gate.errors import Refused, Rule
from gate.fit import TO_DO, require_fit
from gate.names import WEIGHTS_FILE
from repair.lora import LayerKind
from tests import tiny
from tests.gate.test_parameters import APART, FUSED, written

WORDS, HEAD = "model.embed_tokens", "lm_head"
Q = "model.layers.0.self_attn.q_proj"


def plain(folder: Path) -> Path:
    return tiny.tiny_adapter_dir(folder)


def turned(folder: Path) -> Path:
    """For a model that stores its weights as (in, out)."""
    made = tiny.adapter()
    return tiny.write_adapter_files(folder, tiny.adapter_tensors(made), made.config | {"fan_in_fan_out": True})


def of_words(folder: Path) -> Path:
    """An embedding and a head."""
    made = tiny.adapter({WORDS: (8, 40), HEAD: (40, 8)})
    layers = (replace(made.by_name[WORDS], kind=LayerKind.EMBEDDING), made.by_name[HEAD])
    tensors = tiny.adapter_tensors(replace(made, layers=layers))
    return tiny.write_adapter_files(folder, tensors, made.config | {"target_modules": ["embed_tokens", "lm_head"]})


def fused(folder: Path) -> Path:
    return written(folder)


ADAPTERS = {"plain": plain, "turned": turned, "words": of_words, "fused": fused}
MODELS: dict[str, dict[str, tuple[int, ...]]] = {
    "its own": dict(tiny.SHAPES),
    "stored the other way": {name: shape[::-1] for name, shape in tiny.SHAPES.items()},
    "narrower": {name: (out - 1, fan_in) for name, (out, fan_in) in tiny.SHAPES.items()},
    "other inputs": {name: (out, fan_in + 1) for name, (out, fan_in) in tiny.SHAPES.items()},
    "fewer blocks": {name: shape for name, shape in tiny.SHAPES.items() if ".1." not in name},
    "other names": {name.replace("q_proj", "query"): shape for name, shape in tiny.SHAPES.items()},
    "words": {WORDS: (40, 8), HEAD: (40, 8)},
    "tied words": {WORDS: (40, 8)},
    "more words": {WORDS: (41, 8), HEAD: (41, 8)},
    "fused": dict(FUSED),
    "apart": dict(APART),
    "fewer experts": {name: (3, *rest) for name, (_, *rest) in FUSED.items()},
    "nothing": {},
}


def rule_of(judge: Any) -> Rule | None:
    try:
        judge()
    except Refused as refused:
        return refused.rule
    return None


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_the_inspection_tells_what_the_file_tells(adapter: str, model: str, tmp_path: Path) -> None:
    """The same rule, for every adapter and every model."""
    folder, shapes = ADAPTERS[adapter](tmp_path / "adapter"), MODELS[model]
    inspection = admit(folder).as_dict()

    assert rule_of(lambda: require_fit(inspection, shapes)) == rule_of(lambda: admit(folder, shapes=shapes))


def test_the_law_above_sees_both_ends(tmp_path: Path) -> None:
    """Each adapter fits some model here, and not every one."""
    for name, make in ADAPTERS.items():
        inspection = admit(make(tmp_path / name)).as_dict()
        found = {rule_of(lambda of=shapes, known=inspection: require_fit(known, of)) for shapes in MODELS.values()}
        assert {None, Rule.UNKNOWN_MODULE} <= found


def test_a_refusal_names_the_module_and_what_to_do(tmp_path: Path) -> None:
    """File, field, rule, reason, remedy."""
    inspection = admit(plain(tmp_path)).as_dict()
    with pytest.raises(Refused) as caught:
        require_fit(inspection, {**tiny.SHAPES, Q: (60, 53)})
    assert (caught.value.file, caught.value.field, caught.value.rule) == (WEIGHTS_FILE, Q, Rule.SHAPE_MISMATCH)
    assert "61 outputs, the base has 60" in caught.value.detail
    assert TO_DO in caught.value.detail


def older(inspection: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What versions before this one wrote down."""
    yield {key: value for key, value in inspection.items() if key != "fan_in_fan_out"}
    yield {}


def test_what_was_not_written_down_is_not_held_against_it(tmp_path: Path) -> None:
    """An old row may mean either way of storing; a size that is wrong in both is refused all the same."""
    for make in (plain, turned):
        unsaid, empty = older(admit(make(tmp_path / make.__name__)).as_dict())
        for model in ("its own", "stored the other way"):
            require_fit(unsaid, MODELS[model])
        assert rule_of(lambda known=unsaid: require_fit(known, MODELS["narrower"])) is Rule.SHAPE_MISMATCH
        require_fit(empty, MODELS["nothing"])
