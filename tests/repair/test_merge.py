"""Merging a LoRA into a model folder."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from repair.adapter_file import write_adapter
from repair.errors import MissingWeight, OutputExists, ShapeMismatch, UnsupportedAdapter
from repair.lora import ParameterSlot
from repair.merge import merge_adapter
from tests import tiny


def model(directory: Path, *, shards: int = 1) -> Path:
    folder = tiny.write_checkpoint(directory, tiny.weights(), shards=shards)
    (folder / "config.json").write_text("{}")
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {key: tensor for path in folder.glob("*.safetensors") for key, tensor in load_file(path).items()}


@pytest.mark.parametrize("shards", [1, 3])
def test_adds_the_update_and_copies_the_rest(tmp_path: Path, shards: int) -> None:
    """Weight by weight ``W + scale * B A`` in float64, rounded once; other weights and files bit for bit."""
    source = model(tmp_path / "model", shards=shards)
    some = tiny.adapter(dict(list(tiny.SHAPES.items())[:3]), seed=4)
    adapter = tiny.write_adapter_files(tmp_path / "adapter", tiny.adapter_tensors(some), some.config)

    merge_adapter(source, adapter, tmp_path / "out")

    before, after = tensors(source), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for key, weight in before.items():
        layer = some.by_name.get(key.removesuffix(".weight"))
        if layer is None:
            assert torch.equal(weight, after[key])
        else:
            wanted = weight.double() + layer.scale * layer.b.double() @ layer.a.double()
            torch.testing.assert_close(after[key].double(), wanted, rtol=2**-8, atol=1e-6)
            assert not torch.equal(weight, after[key])
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    assert {p.name for p in source.iterdir()} == {p.name for p in (tmp_path / "out").iterdir()}


def test_equal_inputs_give_equal_bytes(tmp_path: Path) -> None:
    """The aligned member is addressed by its digest."""
    source, adapter = model(tmp_path / "model"), tiny.tiny_adapter_dir(tmp_path / "adapter")

    for name in ("one", "two"):
        merge_adapter(source, adapter, tmp_path / name)

    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


def test_a_failed_merge_leaves_nothing(tmp_path: Path) -> None:
    """A module that the model does not have is an error by name, and no folder appears."""
    stranger = tiny.adapter({"model.layers.9.mlp.up_proj": (97, 53)})
    adapter = tiny.write_adapter_files(tmp_path / "adapter", tiny.adapter_tensors(stranger), stranger.config)

    with pytest.raises(MissingWeight, match=r"model\.layers\.9\.mlp\.up_proj"):
        merge_adapter(model(tmp_path / "model"), adapter, tmp_path / "out")

    assert {p.name for p in tmp_path.iterdir()} == {"model", "adapter"}


def test_refuses_what_it_cannot_merge_exactly(tmp_path: Path) -> None:
    """Another shape, DoRA, or a folder that is in use."""
    source = model(tmp_path / "model")
    wide = tiny.adapter({"model.layers.0.mlp.up_proj": (97, 54)})
    with pytest.raises(ShapeMismatch):
        merge_adapter(
            source,
            tiny.write_adapter_files(tmp_path / "wide", tiny.adapter_tensors(wide), wide.config),
            tmp_path / "o1",
        )
    one = tiny.layer(magnitude=torch.ones(97))
    tensors_of = tiny.adapter_tensors(type(wide)(layers=(one,)))
    dora = tiny.write_adapter_files(tmp_path / "dora", tensors_of, tiny.adapter_config(use_dora=True))
    with pytest.raises(UnsupportedAdapter):
        merge_adapter(source, dora, tmp_path / "o2")
    slot = ParameterSlot(parameter="model.layers.0.mlp.experts.down_proj", expert=0, experts=1)
    expert = type(wide)(layers=(tiny.layer("model.layers.0.mlp.experts.0.down_proj", slot=slot),))
    fused_config = tiny.adapter_config(target_modules=[], target_parameters=[slot.parameter])
    write_adapter(replace(expert, config=fused_config), tmp_path / "fused")
    with pytest.raises(UnsupportedAdapter, match="fused experts"):
        merge_adapter(source, tmp_path / "fused", tmp_path / "o3")
    with pytest.raises(OutputExists):
        merge_adapter(source, tiny.tiny_adapter_dir(tmp_path / "plain"), source)
