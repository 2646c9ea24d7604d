"""What the system is asked to fetch early: the weights' bytes, no others, each once, and only for work that reads."""

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gate.header import MAX_DIMENSIONS
from repair.checkpoint import Checkpoint
from repair.context import RepairContext
from repair.lora import LoraAdapter, ParameterSlot
from repair.methods import METHODS
from repair.read_ahead import AHEAD_BYTES, ReadAhead
from repair.run import repair_adapter
from repair.score import score_adapters
from repair.weight_file import WeightFile
from tests import tiny

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny.tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def hints(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The bytes that each hint is about."""
    found: list[bytes] = []

    def told(descriptor: int, start: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        found.append(os.pread(descriptor, size, start))

    monkeypatch.setattr(os, "posix_fadvise", told)
    return found


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many for this test; the number before it afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def context(pair: tuple[Path, Path]) -> RepairContext:
    return RepairContext(aligned=Checkpoint.open(pair[0]), base=Checkpoint.open(pair[1]))


def stored(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def needed(pair: tuple[Path, Path], adapter: LoraAdapter) -> list[bytes]:
    """Both weights of every module, as the files have them."""
    return sorted(stored(Checkpoint.open(folder).weight(name)) for name in adapter.names for folder in pair)


def test_every_weight_is_fetched_once(pair: tuple[Path, Path], hints: list[bytes], threads: int) -> None:
    """By a repair and by scores; a candidate that finds all columns remembered reads nothing and fetches nothing."""
    adapter, known = tiny.adapter(), context(pair)
    assert threads
    repair_adapter(adapter, METHODS["safe_lora"].parse({}), known)
    assert sorted(hints) == needed(pair, adapter)

    hints.clear()
    repair_adapter(adapter, METHODS["safe_lora"].parse({"threshold": 0.9}), known)
    repair_adapter(adapter, METHODS["scale"].parse({"strength": 0.5}), known)
    assert hints == []

    some = replace(adapter, layers=adapter.layers[1:])
    list(score_adapters({"some": some, "fewer": replace(some, layers=some.layers[1:])}, context(pair)))
    assert sorted(hints) == needed(pair, some)


def test_an_expert_is_fetched_alone(tmp_path: Path, hints: list[bytes]) -> None:
    """Of a fused parameter, the bytes of one matrix."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    whole = torch.randn(4, 6, 5, generator=tiny.generator(0)).bfloat16()
    weights = {name: whole, "lm_head.weight": torch.ones(3, 5)}
    slot = ParameterSlot(parameter=name, expert=2, experts=4)
    layer = replace(tiny.layer(f"{name}.2", (6, 5)), slot=slot)

    found = Checkpoint.open(tiny.write_checkpoint(tmp_path, weights)).for_layer(layer).expect()

    assert hints == [stored(whole[2])]
    assert found == 2 * 6 * 5


def test_no_more_is_fetched_than_the_window(pair: tuple[Path, Path]) -> None:
    """What is on its way beyond the module at hand stops growing at the bound."""
    names = [str(at) for at in range(40)]
    fetched: list[int] = []
    reference = context(pair).reference_for(tiny.adapter().by_name[UP])

    class Counted:
        shape = (1, 1)

        def __init__(self, name: str) -> None:
            self.name = name

        def rows(self, start: int, stop: int) -> Tensor:
            raise AssertionError((start, stop))

        def expect(self) -> int:
            fetched.append(int(self.name))
            return AHEAD_BYTES // 4

    for at, wanted in [(0, 5), (1, 6), (20, 25)]:
        fetched.clear()
        with ReadAhead(names, lambda name: replace(reference, aligned=Counted(name), base=None)) as ahead:
            ahead.watched(replace(reference, name=names[0])).begun()
            ahead.watched(replace(reference, name=names[at])).begun()
        assert fetched == list(range(wanted))


def test_a_system_without_hints_is_only_slower(pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither one that lacks the call, nor one that refuses, nor a header that only safetensors reads."""
    weight = context(pair).reference_for(tiny.adapter().by_name[UP])

    def refused(*_: int) -> None:
        raise OSError

    with monkeypatch.context() as patched:
        patched.setattr(os, "posix_fadvise", refused)
        assert weight.expect() == 0
        patched.delattr(os, "posix_fadvise")
        assert weight.expect() == 0


def test_a_header_that_the_gate_would_refuse_gets_no_hints(tmp_path: Path) -> None:
    """Its tensors are read all the same."""
    deep = torch.ones((1,) * MAX_DIMENSIONS + (2,))
    tiny.write_checkpoint(tmp_path, {"deep": deep, "w.weight": torch.ones(2, 2)})
    file = WeightFile(next(tmp_path.glob("*.safetensors")))

    assert file.expect("w.weight") == 0
    assert torch.equal(file.handle.get_tensor("w.weight"), torch.ones(2, 2))
