"""Adapters that were trained on a quantised base: taken and repaired; the quantised base itself is no reference.

Their factors are in 16 or 32 bit like any other's; what differs is the base that the config names. Rounding a base to
four bits changes its weights by about as much as alignment does, so models are compared in their originals only.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from gate.admission import admit
from gate.errors import Refused, Rule
from gate.measurable import require_measurable
from gate.model import model_shapes, require_unrounded
from ledger import references
from repair.__main__ import main
from repair.adapter_file import read_adapter
from repair.checkpoint import Checkpoint
from repair.errors import WrongReference
from tests import tiny
from tests.repair import dense

BASE_NAME = "unsloth/tiny-bnb-4bit"
BITSANDBYTES = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
Q = "model.layers.0.self_attn.q_proj"


def adapter_of(folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """As PEFT leaves it after training on a base in four bits: the base is named, nothing else is special."""
    made = tiny.adapter()
    config = made.config | {"base_model_name_or_path": BASE_NAME, "lora_dropout": 0.0, "modules_to_save": None}
    return tiny.write_adapter_files(folder, tiny.adapter_tensors(made, dtype), config)


def packed(weight: torch.Tensor) -> dict[str, torch.Tensor]:
    """One matrix as bitsandbytes stores it: two entries in a byte, with their scales and the code book."""
    bytes_of = torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8)
    return {
        "weight": bytes_of,
        "weight.absmax": torch.ones(weight.numel() // 64 + 1, dtype=torch.uint8),
        "weight.quant_map": torch.linspace(-1, 1, 16),
        "weight.quant_state.bitsandbytes__nf4": torch.zeros(60, dtype=torch.uint8),
    }


def in_four_bits(folder: Path) -> None:
    tensors = {
        f"{name}.{part}": tensor
        for name, shape in tiny.SHAPES.items()
        for part, tensor in packed(torch.ones(shape)).items()
    }
    tiny.write_checkpoint(folder, tensors)


def in_whole_numbers(folder: Path) -> None:
    """As GPTQ and AWQ store them."""
    weights = {f"{name}.qweight": torch.ones(8, 4, dtype=torch.int32) for name in tiny.SHAPES}
    tiny.write_checkpoint(folder, weights | {"model.norm.weight": torch.ones(53)})


def in_eight_bit_floats(folder: Path) -> None:
    weights = {key: one.to(torch.float8_e4m3fn) for key, one in tiny.weights().items()}
    tiny.write_checkpoint(folder, weights, shards=2)


def experts_in_blocks(folder: Path) -> None:
    """As GPT-OSS is published."""
    home = "model.layers.0.mlp.experts.gate_up_proj"
    folder.mkdir(parents=True)
    blocks = {f"{home}_blocks": torch.ones(4, 6, 2, 16, dtype=torch.uint8), f"{home}_scales": torch.ones(4, 6, 2)}
    save_file(blocks, folder / "model.safetensors")


STORED: dict[str, Callable[[Path], None]] = {
    "bitsandbytes": in_four_bits,
    "gptq": in_whole_numbers,
    "fp8": in_eight_bit_floats,
    "mxfp4": experts_in_blocks,
}


def said(folder: Path, how: Any, field: str = "quantization_config") -> Path:
    """A model in 16 bit whose config says that it is quantised."""
    tiny.write_checkpoint(folder, tiny.weights())
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", field: how}))
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any], dict[str, Any]]:
    try:
        code = main([str(word) for word in words])
    finally:
        torch.use_deterministic_algorithms(mode=False)
    printed = capsys.readouterr()
    problem = [line for line in printed.err.splitlines() if line.startswith("{")]  # the others tell how far it is
    return code, json.loads(printed.out or "{}"), json.loads(problem[-1] if problem else "{}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_adapter_is_let_in_and_says_what_to_repair_it_with(tmp_path: Path, dtype: torch.dtype) -> None:
    """By the gate, against the shapes of the original; the note names what an operator must have."""
    aligned, _ = tiny.tiny_pair(tmp_path)

    admission = admit(adapter_of(tmp_path / "adapter", dtype), shapes=model_shapes(aligned))
    require_measurable(admission)

    assert admission.config.base_model_name_or_path == BASE_NAME
    assert [module.name for module in admission.modules] == sorted(tiny.SHAPES)
    assert any("16 bit originals" in note for note in admission.notes)


def test_it_is_repaired_against_the_originals_like_any_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same factors under a plain base name give the same updates; the config goes on naming what it named."""
    aligned, base = tiny.tiny_pair(tmp_path)
    plain = tiny.tiny_adapter_dir(tmp_path / "plain", dtype=torch.bfloat16)
    pair = ("--aligned", aligned, "--base", base, "--device", "cpu")
    for name, source in (("ours", adapter_of(tmp_path / "adapter")), ("theirs", plain)):
        words = ("repair", source, *pair, "--method", "safe_lora", "--set", "count=3", "--out", tmp_path / name)
        code, document, _ = run(capsys, *words, "--json")
        assert (code, document["summary"]) == (0, {"kept": 5, "projected": 3})

    ours, theirs = (read_adapter(tmp_path / name) for name in ("ours", "theirs"))

    assert ours.config["base_model_name_or_path"] == BASE_NAME
    assert ours.names == theirs.names
    for one, other in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(dense.delta(one), dense.delta(other))


@pytest.mark.parametrize("form", STORED)
def test_a_model_stored_in_few_bits_is_no_reference(tmp_path: Path, form: str) -> None:
    """Whatever its config says, or where it has none: the tensors tell, with file, tensor and what to give instead."""
    STORED[form](tmp_path / "model")

    with pytest.raises(Refused) as caught:
        require_unrounded(tmp_path / "model")

    assert caught.value.rule is Rule.QUANTISED
    assert caught.value.file.endswith(".safetensors")
    assert "16 bit original" in caught.value.detail


@pytest.mark.parametrize("field", ["quantization_config", "compression_config"])
@pytest.mark.parametrize("part", ["aligned", "base"])
def test_nor_is_one_whose_config_says_so(tmp_path: Path, part: str, field: str) -> None:
    """Either half of a pair: refused when the reference is registered, before anything is written down."""
    pair = dict(zip(("aligned", "base"), tiny.tiny_pair(tmp_path), strict=True))
    pair[part] = said(tmp_path / "quantised", BITSANDBYTES, field)

    with pytest.raises(Refused) as caught:
        references.describe("pair", **pair)

    assert (caught.value.file, caught.value.field, caught.value.rule) == ("config.json", field, Rule.QUANTISED)
    assert "bitsandbytes" in caught.value.detail
    assert "16 bit original" in caught.value.detail
    assert "trained on the rounded copy" in caught.value.detail


@pytest.mark.parametrize("option", ["--aligned", "--base"])
def test_the_command_refuses_it_too(tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With the file, the field and what to give; nothing is written."""
    aligned, base = tiny.tiny_pair(tmp_path)
    given = {"--aligned": aligned, "--base": base, option: said(tmp_path / "quantised", BITSANDBYTES)}
    pair = [word for pair in given.items() for word in pair]

    words = ("--method", "safe_lora", "--device", "cpu", "--out", tmp_path / "out", "--json")
    code, _, problem = run(capsys, "repair", adapter_of(tmp_path / "adapter"), *pair, *words)

    assert (code, problem["rule"], problem["field"]) == (1, "wrong-reference", "quantization_config")
    assert problem["file"] == str(tmp_path / "quantised" / "config.json")
    assert "16 bit original" in problem["detail"]
    assert not (tmp_path / "out").exists()


def test_a_tensor_in_few_bits_is_refused_where_it_is_read(tmp_path: Path) -> None:
    """A folder that no config speaks for, on the command line."""
    in_eight_bit_floats(tmp_path / "model")
    checkpoint = Checkpoint.open(tmp_path / "model")
    with pytest.raises(WrongReference, match="16 bit original"):
        checkpoint.for_layer(tiny.adapter().by_name[Q])


OTHERS: dict[str, NDArray[Any]] = {
    "model.layers.0.self_attn.bias": np.ones((1, 1, 4, 4), np.bool_),  # the mask that old GPT-2 files carry
    "model.rotary.positions": np.arange(4, dtype=np.int64),
}


@pytest.mark.parametrize("how", [None, {}], ids=["null", "empty"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_an_original_is_a_reference(tmp_path: Path, dtype: torch.dtype, how: Any) -> None:
    """Also with masks and positions in whole numbers, or an entry that says nothing."""
    others = {key: torch.from_numpy(value) for key, value in OTHERS.items()}
    tiny.write_checkpoint(tmp_path, tiny.weights(dtype=dtype) | others)
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": how}))

    require_unrounded(tmp_path)

    assert references.describe("pair", aligned=tmp_path).shapes == tiny.SHAPES
