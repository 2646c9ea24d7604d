"""Bare parameters: which tensors belong to which, how many experts they hold, and whether the base has them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from examples.zoo.hostile import PREFIX
from gate.admission import admit
from gate.errors import Refused, Rule
from gate.measurable import require_measurable
from gate.parameters import Site, fused_home, nesting, parameters_at, stored_apart
from gate.records import Shapes
from tests import tiny

HOME = "model.layers.0.mlp.experts"
UP, DOWN = f"{HOME}.gate_up_proj", f"{HOME}.down_proj"
FUSED: Shapes = {UP: (4, 48, 32), DOWN: (4, 32, 24)}
APART: Shapes = {
    f"{HOME}.{expert}.{name}": (32, 24) if name == "down_proj" else (24, 32)
    for expert in range(4)
    for name in ("gate_proj", "up_proj", "down_proj")
}
WEIGHTS = "adapter_model.safetensors"


def never(_module: str) -> bool:
    return False


def written(folder: Path, *, shapes: dict[str, tuple[int, ...]] | None = None, **keys: Any) -> Path:
    """An adapter of two experts' parameters, rank 2, with other tensors in place of some of its own."""
    inner = f"{PREFIX}{HOME}.base_layer"
    tensors = {
        f"{inner}.lora_A.weight": (8, 32),
        f"{inner}.lora_B.weight": (48, 8),
        f"{PREFIX}{HOME}.lora_A.weight": (8, 24),
        f"{PREFIX}{HOME}.lora_B.weight": (32, 8),
        **(shapes or {}),
    }
    config = tiny.adapter_config(rank=2, alpha=3, target_modules=[], target_parameters=[UP, DOWN], **keys)
    made = {key: torch.ones(shape) for key, shape in tensors.items()}
    return tiny.write_adapter_files(folder, made, config)


@pytest.mark.parametrize("shapes", [None, FUSED, APART], ids=["unknown", "fused", "apart"])
def test_experts_are_counted_and_named(tmp_path: Path, shapes: Shapes | None) -> None:
    """The outer wrapper is the parameter that was registered last; both stores of the base are known."""
    admission = admit(written(tmp_path), shapes=shapes)
    require_measurable(admission)

    assert [(m.name, m.experts, m.rank, m.scale) for m in admission.modules] == [(DOWN, 4, 2, 1.5), (UP, 4, 2, 1.5)]
    found = admission.as_dict()
    assert found["parameters"] == 4 * 2 * (48 + 32 + 32 + 24)
    assert "parameters" in found["needs"]


REFUSED: dict[str, tuple[dict[str, Any], Shapes | None, Rule]] = {
    "experts": ({}, {**FUSED, UP: (5, 48, 32)}, Rule.SHAPE_MISMATCH),
    "sides": ({}, {**FUSED, DOWN: (4, 32, 25)}, Rule.SHAPE_MISMATCH),
    "nowhere": ({}, {UP: (4, 48, 32)}, Rule.UNKNOWN_MODULE),
    "rows apart": ({}, {**APART, f"{HOME}.3.up_proj": (25, 32)}, Rule.SHAPE_MISMATCH),
    "too few apart": ({}, {k: v for k, v in APART.items() if ".3." not in k}, Rule.UNKNOWN_MODULE),
    "rank": ({"shapes": {f"{PREFIX}{HOME}.lora_A.weight": (7, 24)}}, None, Rule.RANK_MISMATCH),
    "pair": ({"shapes": {f"{PREFIX}{HOME}.lora_B.weight": (32, 6)}}, None, Rule.RANK_MISMATCH),
    "bias": ({"shapes": {f"{PREFIX}{HOME}.lora_B.bias": (32,)}}, None, Rule.UNEXPECTED_TENSOR),
    "stranger": ({"shapes": {f"{PREFIX}model.x.base_layer.lora_A.weight": (8, 3)}}, None, Rule.NOT_TARGETED),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(tmp_path: Path, name: str) -> None:
    """With the tensor or the module that does not."""
    keys, shapes, rule = REFUSED[name]

    with pytest.raises(Refused) as refused:
        admit(written(tmp_path, **keys), shapes=shapes)

    assert (refused.value.rule, refused.value.file) == (rule, WEIGHTS)


def test_wrappers_without_parameters_are_no_names(tmp_path: Path) -> None:
    """`base_layer` in a name is PEFT's own, and only `target_parameters` puts it before a factor."""
    made = tiny.adapter()
    key = f"{PREFIX}model.layers.0.mlp.up_proj"
    tensors = tiny.adapter_tensors(made) | {f"{key}.base_layer.lora_A.weight": torch.ones(3, 53)}
    with pytest.raises(Refused) as refused:
        admit(tiny.write_adapter_files(tmp_path, tensors, made.config))
    assert refused.value.rule is Rule.UNEXPECTED_TENSOR


def test_names_that_do_not_tell_are_refused() -> None:
    """One parameter of a module is clear whatever it is called; of two, the order of registration must be known."""
    one = parameters_at([Site(module="a.mixer")], ["mixer.odd"], ordinary=never)
    assert one == {Site(module="a.mixer"): "a.mixer.odd"}
    with pytest.raises(Refused, match=r"even, odd") as refused:
        parameters_at(
            [Site(module="a.mixer"), Site(module="a.mixer", nested=1)], ["a.mixer.odd", "a.mixer.even"], ordinary=never
        )
    assert refused.value.field == "target_parameters"


def test_a_target_without_a_module_means_modules_that_are_no_targets_themselves() -> None:
    """`gate_up_proj` alone, beside `q_proj` of target_modules."""
    sites = [Site(module="l.experts"), Site(module="l.q_proj")]

    found = parameters_at(sites, ["gate_up_proj"], ordinary=lambda module: module.endswith("q_proj"))

    assert found == {Site(module="l.experts"): "l.experts.gate_up_proj"}


def test_places_are_where_they_were_read() -> None:
    """What is written is found again."""
    places = nesting([UP, DOWN, "l.1.experts.down_proj"])

    assert {site: path for path, site in places.items()} == parameters_at(
        places.values(), [UP, DOWN, "l.1.experts.down_proj"], ordinary=never
    )


def test_the_two_spellings_lead_to_each_other() -> None:
    """An expert by itself knows its home; a fused one knows its parts, by either name of the block."""
    names = ("block_sparse_moe.experts.2.w1", "block_sparse_moe.experts.2.w3")

    assert stored_apart("mlp.experts.gate_up_proj", 2, names.__contains__) is None
    full = tuple(f"l.{name}" for name in names)
    assert stored_apart("l.mlp.experts.gate_up_proj", 2, full.__contains__) == full
    assert [fused_home(name) for name in full] == [
        ("l.block_sparse_moe.experts.gate_up_proj", 2, at, 2) for at in (0, 1)
    ]
    assert fused_home("l.mlp.down_proj") is None
