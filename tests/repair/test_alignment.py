"""The streamed products against whole matrices: on several threads, in any tiles, by either product; what is kept."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from repair import products
from repair.alignment import alignment_basis, alignment_products, published_projection
from repair.checkpoint import Checkpoint
from repair.context import RepairContext
from repair.lora import TILE_NUMBERS, LayerReference
from repair.methods import METHODS
from repair.run import repair_adapter
from repair.score import score_adapters
from repair.threads import in_threads
from tests import tiny
from tests.repair import dense

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny.tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many for this test; the number before it afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=["fast", "plain"])
def either_product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product of `torch.compile` where this machine has it, and the one that every machine has."""
    if request.param == "plain":
        monkeypatch.setattr(products, "_LINEAR", None)


def context(pair: tuple[Path, Path], tile_rows: int | None = 5) -> RepairContext:
    return RepairContext(aligned=Checkpoint.open(pair[0]), base=Checkpoint.open(pair[1]), tile_rows=tile_rows)


@pytest.mark.usefixtures("either_product")
@pytest.mark.parametrize("tile_rows", [1, 7, None])
def test_the_operator_is_the_dense_one(pair: tuple[Path, Path], threads: int, tile_rows: int | None) -> None:
    """For groups of columns, and with the norm of v; torch has as many threads as before."""
    for layer in tiny.adapter().layers:
        v = dense.displacement(*pair, layer.name)
        probe = torch.randn(v.shape[0], 4, generator=tiny.generator(3))

        found = alignment_products([layer.b, probe], context(pair, tile_rows).reference_for(layer))

        assert found.norm == pytest.approx(float(v.norm()), rel=1e-6)
        for x, columns in zip([layer.b, probe], found.groups, strict=True):
            assert dense.relative(columns, dense.published_operator(v) @ x.double()) < 1e-6
        assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("either_product")
def test_the_triplets_are_the_dense_ones(pair: tuple[Path, Path], threads: int) -> None:
    """The largest singular values, whichever threads look for them."""
    layer = tiny.adapter().by_name[UP]
    values = torch.linalg.svdvals(dense.displacement(*pair, UP))[:4]

    found = alignment_basis(context(pair).reference_for(layer), 4)

    assert found is not None
    assert threads
    torch.testing.assert_close(found.values.double(), values, rtol=1e-4, atol=0)


def test_the_bits_of_a_group_do_not_depend_on_the_others(pair: tuple[Path, Path], threads: int) -> None:
    """A repair is the same whether or not the probe is known already."""
    layer = tiny.adapter().by_name[UP]
    other = torch.randn(97, 16, generator=tiny.generator(1))

    alone = alignment_products([layer.b], context(pair).reference_for(layer))
    together = alignment_products([layer.b, other], context(pair).reference_for(layer))

    assert threads
    assert torch.equal(alone.groups[0], together.groups[0])


def test_threads_change_nothing_but_the_time(pair: tuple[Path, Path], threads: int) -> None:
    """The same bits, in the same order, on any number of threads; a failure is raised; torch has its threads back."""
    method = METHODS["safe_lora"].parse({"threshold": 1.0})
    found = repair_adapter(tiny.adapter(), method, context(pair))
    seen: list[str] = []
    scores = list(
        score_adapters({"a": tiny.adapter()}, replace(context(pair), progress=lambda name, _: seen.append(name)))
    )

    torch.set_num_threads(1)
    assert found.verdicts == (alone := repair_adapter(tiny.adapter(), method, context(pair))).verdicts
    assert all(torch.equal(a.b, b.b) for a, b in zip(found.adapter.layers, alone.adapter.layers, strict=True))
    assert scores == list(score_adapters({"a": tiny.adapter()}, context(pair)))
    assert seen == sorted(tiny.SHAPES)

    torch.set_num_threads(threads)
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda at: 1 // at, [1, 0, 2], torch.device("cpu")))
    assert torch.get_num_threads() == threads
    assert list(in_threads(lambda _: torch.get_num_threads(), [0] * 4, torch.device("cpu"))) == [1] * 4


def test_a_tile_holds_a_fixed_number_of_numbers() -> None:
    """Whatever the width; at least one row, at most all."""
    for shape, wanted in [((4096, 4096), 256), ((64, 16), 64), ((3, 10 * TILE_NUMBERS), 1)]:
        weight = torch.empty(shape, device="meta")
        reference = LayerReference(name="w", aligned=_Unread(weight))
        assert reference.rows_at_once == wanted


class _Unread:
    """A weight that has a shape only."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight

    @property
    def shape(self) -> tuple[int, int]:
        return self.weight.shape[0], self.weight.shape[1]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.weight[start:stop]

    def fetch(self) -> None:
        pass


def test_candidates_for_one_adapter_read_the_weights_once(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every candidate that asks for the published operator; another adapter reads again; the bits are the same."""
    read: list[str] = []
    tiles = LayerReference.alignment_tiles

    def counted(self: LayerReference, **how: bool) -> Iterator[Any]:
        read.append(self.name)
        return tiles(self, **how)

    monkeypatch.setattr(LayerReference, "alignment_tiles", counted)
    known = context(pair, None)
    candidates: list[tuple[str, dict[str, Any]]] = [
        ("safe_lora", {"threshold": 1.0}),
        ("safe_lora", {"count": 3, "norm_share": 0.5}),
        ("splora", {"count": 2}),
    ]
    fresh = [
        repair_adapter(tiny.adapter(), METHODS[name].parse(wish), context(pair, None)) for name, wish in candidates
    ]
    read.clear()

    found = [repair_adapter(tiny.adapter(), METHODS[name].parse(wish), known) for name, wish in candidates]

    assert sorted(read) == sorted(2 * list(tiny.SHAPES))
    for one, two in zip(found, fresh, strict=True):
        assert one.verdicts == two.verdicts
        assert all(torch.equal(a.b, b.b) for a, b in zip(one.adapter.layers, two.adapter.layers, strict=True))
    read.clear()
    repair_adapter(tiny.adapter(seed=9), METHODS["safe_lora"].parse({}), known)
    assert sorted(read) == sorted(2 * list(tiny.SHAPES))


def test_what_need_not_be_remembered_is_not(pair: tuple[Path, Path]) -> None:
    """Only what the probe said stays."""
    layer = tiny.adapter().by_name[UP]
    reference = context(pair).reference_for(layer)

    published_projection(layer.b, reference, remember=False)
    assert set(reference.remembered) == {"published"}
    published_projection(layer.b, reference)
    assert set(reference.remembered) == {"published", "projection"}
