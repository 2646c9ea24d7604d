"""What is fetched early: the weights' bytes, no others, each once, and only for work that reads them."""

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
from repair.read_ahead import AHEAD_NUMBERS, ReadAhead
from repair.run import repair_adapter
from repair.score import score_adapters
from repair.weight_file import WeightFile
from tests import tiny

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny.tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """The bytes of each piece that is read early, on a system that holds none of them yet."""
    found: list[bytes] = []
    real = os.preadv

    def read(descriptor: int, buffers: list[bytearray], start: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError
        found.append(os.pread(descriptor, len(buffers[0]), start))
        return real(descriptor, buffers, start)

    monkeypatch.setattr(os, "preadv", read)
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


def test_every_weight_is_fetched_once(pair: tuple[Path, Path], fetched: list[bytes], threads: int) -> None:
    """By a repair and by scores; a candidate that finds all columns remembered reads nothing and fetches nothing."""
    adapter, known = tiny.adapter(), context(pair)
    assert threads
    repair_adapter(adapter, METHODS["safe_lora"].parse({}), known)
    assert sorted(fetched) == needed(pair, adapter)

    fetched.clear()
    repair_adapter(adapter, METHODS["safe_lora"].parse({"threshold": 0.9}), known)
    repair_adapter(adapter, METHODS["scale"].parse({"strength": 0.5}), known)
    assert fetched == []

    some = replace(adapter, layers=adapter.layers[1:])
    list(score_adapters({"some": some, "fewer": replace(some, layers=some.layers[1:])}, context(pair)))
    assert sorted(fetched) == needed(pair, some)


def test_an_expert_is_fetched_alone(tmp_path: Path, fetched: list[bytes]) -> None:
    """Of a fused parameter, the bytes of one matrix."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    whole = torch.randn(4, 6, 5, generator=tiny.generator(0)).bfloat16()
    weights = {name: whole, "lm_head.weight": torch.ones(3, 5)}
    slot = ParameterSlot(parameter=name, expert=2, experts=4)
    layer = replace(tiny.layer(f"{name}.2", (6, 5)), slot=slot)

    Checkpoint.open(tiny.write_checkpoint(tmp_path, weights)).for_layer(layer).fetch()

    assert fetched == [stored(whole[2])]


def test_a_large_weight_is_fetched_in_pieces_and_then_held(tmp_path: Path, fetched: list[bytes]) -> None:
    """All of it, one piece after the other; what the system holds already is not read again."""
    whole = torch.arange(9 << 18, dtype=torch.int64).view(torch.float64).reshape(9, -1)  # 18 MiB
    file = WeightFile(next(tiny.write_checkpoint(tmp_path, {"w.weight": whole}).glob("*.safetensors")))

    file.fetch("w.weight")
    assert len(fetched) == 3
    assert b"".join(fetched) == stored(whole)


def test_what_is_in_memory_is_not_read_again(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Asking is all that happens there; and where nobody answers, the system gets a hint about the same bytes."""
    reference = context(pair).reference_for(tiny.adapter().by_name[UP])
    said: list[bytes] = []

    def all_held(descriptor: int, buffers: list[bytearray], start: int, flags: int = 0) -> int:
        assert flags == os.RWF_NOWAIT
        return len(os.pread(descriptor, len(buffers[0]), start))

    def told(descriptor: int, start: int, size: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        said.append(os.pread(descriptor, size, start))

    monkeypatch.setattr(os, "posix_fadvise", told)
    monkeypatch.setattr(os, "preadv", all_held)
    reference.fetch()
    assert said == []

    monkeypatch.delattr(os, "preadv")
    reference.fetch()
    assert sorted(said) == sorted(stored(Checkpoint.open(folder).weight(UP)) for folder in pair)

    monkeypatch.delattr(os, "posix_fadvise")
    reference.fetch()  # such a system is only slower


def test_no_more_is_fetched_than_the_window(pair: tuple[Path, Path]) -> None:
    """What is on its way beyond the module at hand stops growing at the bound."""
    names = [str(at) for at in range(40)]
    reference = context(pair).reference_for(tiny.adapter().by_name[UP])
    asked: list[int] = []

    class Counted:
        shape = (4, AHEAD_NUMBERS // 16)

        def __init__(self, name: str) -> None:
            self.name = name

        def rows(self, start: int, stop: int) -> Tensor:
            raise AssertionError((start, stop))

        def fetch(self) -> None:
            asked.append(int(self.name))

    for at, wanted in [(0, 5), (1, 6), (20, 25)]:
        asked.clear()
        with ReadAhead(names, lambda name: replace(reference, aligned=Counted(name), base=None)) as ahead:
            ahead.watched(replace(reference, name=names[0])).wait()
            ahead.watched(replace(reference, name=names[at])).wait()
            assert asked[: at + 1] == list(range(at + 1)), "it waits for what it asks for"
        assert asked == list(range(wanted))


def test_what_cannot_be_fetched_is_left_to_those_who_read(tmp_path: Path, fetched: list[bytes]) -> None:
    """A file that is gone, and a header that only safetensors reads."""
    deep = torch.ones((1,) * MAX_DIMENSIONS + (2,))
    file = WeightFile(
        next(tiny.write_checkpoint(tmp_path, {"deep": deep, "w.weight": torch.ones(2, 2)}).glob("*.safe*"))
    )
    plain = WeightFile(next(tiny.write_checkpoint(tmp_path / "b", {"w.weight": torch.ones(2, 2)}).glob("*.safe*")))
    plain.fetch("w.weight")
    assert len(fetched) == 1
    plain.path.unlink()

    file.fetch("w.weight")
    plain.fetch("w.weight")

    assert len(fetched) == 1
    assert all(torch.equal(one.handle.get_tensor("w.weight"), torch.ones(2, 2)) for one in (file, plain))
