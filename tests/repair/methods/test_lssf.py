"""LSSF's rank and weights, against whole spectra in float64. What it shares with the others: test_resta."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repair.checkpoint import Checkpoint
from repair.context import RepairContext
from repair.errors import BadParameters, MissingReference
from repair.linalg import Spectrum
from repair.lora import LoraAdapter
from repair.method import RepairMethod
from repair.methods.lox import Lox
from repair.methods.lssf import Directions, Lssf, safety_rank
from repair.moments import Side, Topic
from repair.run import repair_adapter
from repair.safety_vector import SafetyVector
from tests import tiny
from tests.repair import dense


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny.tiny_pair(tmp_path_factory.mktemp("pair"))


def run(pair: tuple[Path, Path], method: RepairMethod) -> LoraAdapter:
    aligned, base = (Checkpoint.open(path) for path in pair)
    return repair_adapter(tiny.adapter(), method, RepairContext(aligned=aligned, base=base, tile_rows=16)).adapter


def entropy_rank(values: list[float], share: float) -> int:
    """The definition: the first partial sum of ``-p ln p`` that reaches its share of the whole."""
    total = sum(value**2 for value in values)
    terms = [-(value**2 / total) * math.log(value**2 / total) for value in values]
    return next(r for r in range(1, len(values) + 1) if sum(terms[:r]) >= share * sum(terms) - 1e-12)


def vector(values: list[float], known: int) -> SafetyVector:
    """A displacement of which only the largest singular values were computed."""
    kept = torch.tensor(values[:known], dtype=torch.float64)
    eye = torch.eye(len(values), dtype=torch.float64)[:, :known]
    energy = sum(value**2 for value in values)
    return SafetyVector(triplets=Spectrum(u=eye, values=kept, v=eye), energy=energy, directions=len(values))


@pytest.mark.parametrize("share", [0.3, 0.6, 0.8, 0.95])
def test_each_module_gets_the_rank_of_its_entropy(pair: tuple[Path, Path], share: float) -> None:
    """``D + P_r V`` with the smallest r that reaches the share; modules differ once the noise is reached."""
    adapter, ranks = tiny.adapter(), set()

    for layer in run(pair, Lssf(entropy=share, max_rank=64)).layers:
        v = dense.displacement(*pair, layer.name)
        u, values, _ = torch.linalg.svd(v, full_matrices=False)
        rank = entropy_rank(values.tolist(), share)
        wanted = u[:, :rank] @ u[:, :rank].T @ v
        assert layer.rank == 3 + rank
        assert dense.relative(dense.delta(layer) - dense.delta(adapter.by_name[layer.name]), wanted) < 1e-3
        ranks.add(rank)
    assert len(ranks) > 1 or share < 0.95


@settings(deadline=None)
@given(
    values=st.lists(st.floats(0.01, 10), min_size=2, max_size=12),
    known=st.integers(1, 12),
    share=st.floats(0.05, 1),
)
def test_what_was_not_computed_never_makes_the_rank_too_small(values: list[float], known: int, share: float) -> None:
    """Exact with the whole spectrum; without it never below the exact rank, unless nothing more is known."""
    ordered = sorted(values, reverse=True)
    exact = entropy_rank(ordered, share)
    known = min(known, len(values))

    assert safety_rank(vector(ordered, len(values)), share, 99) == exact
    assert safety_rank(vector(ordered, known), share, 99) >= min(exact, known)
    assert safety_rank(vector(ordered, len(values)), share, 2) == min(exact, 2)


def test_one_direction_has_no_entropy_and_is_taken() -> None:
    """``0 >= share * 0``."""
    assert safety_rank(vector([3.0], 1), 0.8, 16) == 1


def test_emphasis_weighs_the_first_direction_more(pair: tuple[Path, Path]) -> None:
    """From ``strength * emphasis`` at the first to ``strength`` at the last, linear in the singular value."""
    adapter = tiny.adapter()

    for layer in run(pair, Lssf(entropy=1.0, max_rank=4, strength=1.5, emphasis=2.0)).layers:
        u, values, vh = torch.linalg.svd(dense.displacement(*pair, layer.name), full_matrices=False)
        kept = values[:4]
        weights = 1.5 * (1 + (kept - kept[3]) / (kept[0] - kept[3]))
        assert weights[[0, 3]].tolist() == pytest.approx([3.0, 1.5])
        wanted = u[:, :4] * (weights * kept) @ vh[:4]
        assert dense.relative(dense.delta(layer) - dense.delta(adapter.by_name[layer.name]), wanted) < 1e-3


def test_with_all_the_entropy_it_is_lox(pair: tuple[Path, Path]) -> None:
    """The displacement's own left vectors, one weight, a rank that is cut: the same term."""
    one, two = run(pair, Lssf(entropy=1.0, max_rank=4, strength=1.25)), run(pair, Lox(rank=4))

    for a, b in zip(one.layers, two.layers, strict=True):
        assert dense.relative(dense.delta(a), dense.delta(b)) < 1e-6


def test_the_rank_of_a_twin_follows_its_own_entropy(tmp_path: Path) -> None:
    """Exactly, from its factors; without any model."""
    twin = tiny.adapter(rank=5, seed=60)
    path = tiny.write_adapter_files(
        tmp_path / "twin", tiny.adapter_tensors(twin), tiny.adapter_config(rank=5, alpha=10)
    )
    adapter = tiny.adapter()

    for layer in repair_adapter(adapter, Lssf(entropy=0.7, twin=path), RepairContext()).adapter.layers:
        u, values, vh = torch.linalg.svd(dense.delta(twin.by_name[layer.name]), full_matrices=False)
        rank = entropy_rank(values[:5].tolist(), 0.7)
        wanted = -(u[:, :rank] * values[:rank] @ vh[:rank])
        assert layer.rank == 3 + rank
        assert dense.relative(dense.delta(layer) - dense.delta(adapter.by_name[layer.name]), wanted) < 1e-5


@pytest.mark.parametrize(("share", "emphasis"), [(0.3, 1.0), (0.9, 2.5)])
def test_along_outputs_the_part_is_projected_onto_what_the_model_writes(
    pair: tuple[Path, Path], tmp_path: Path, share: float, emphasis: float
) -> None:
    """``D + U_r diag(a) U_r^T V``, U the largest eigenvectors of the outputs' second moment, r by their entropy."""
    aligned, base = (Checkpoint.open(path) for path in pair)
    pack = tiny.calibration(tmp_path / "pack")
    context = RepairContext(aligned=aligned, base=base, calibration=pack, tile_rows=16)
    method = Lssf(entropy=share, emphasis=emphasis, directions=Directions.OUTPUTS, max_rank=64, strength=0.5)
    adapter = tiny.adapter()
    found = repair_adapter(adapter, method, context)

    for layer, verdict in zip(found.adapter.layers, found.verdicts, strict=True):
        known = pack.for_layer(adapter.by_name[layer.name])
        assert known is not None
        moments = known.moments(Side.OUTPUTS, Topic.HARMFUL)
        energies, total = moments.values.double(), float(moments.squares.double().sum())
        shares = energies / total
        rest, unknown = 1 - float(shares.sum()), len(moments.squares) - len(shares)
        terms = [-float(p) * math.log(float(p)) for p in shares]
        whole = sum(terms) + (-rest * math.log(rest / unknown) if rest > 0 else 0.0)
        enough = [r for r in range(1, len(terms) + 1) if sum(terms[:r]) >= share * whole - 1e-12]
        rank = enough[0] if enough else len(terms)
        u, values = moments.basis[:, :rank].double(), energies[:rank].sqrt()
        ramp = (values - values[-1]) / (values[0] - values[-1]) if rank > 1 else torch.zeros(1)
        v = dense.displacement(*pair, layer.name)
        wanted = u @ (0.5 * (1 + (emphasis - 1) * ramp.double())).diag() @ u.T @ v
        assert layer.rank == 3 + rank
        assert dense.relative(dense.delta(layer) - dense.delta(adapter.by_name[layer.name]), wanted) < 1e-5
        assert verdict.score == pytest.approx(float((u.T @ v).square().sum() / v.square().sum()), rel=1e-5)


def test_along_outputs_needs_the_pair_and_a_calibration(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Each by name; a twin has no two models between which something changed."""
    aligned, base = (Checkpoint.open(path) for path in pair)
    whole = RepairContext(aligned=aligned, base=base, calibration=tiny.calibration(tmp_path / "pack"))
    without = {
        "aligned": replace(whole, aligned=None),
        "base": replace(whole, base=None),
        "calibration": replace(whole, calibration=None),
    }
    for part, context in without.items():
        with pytest.raises(MissingReference) as caught:
            repair_adapter(tiny.adapter(), Lssf(directions=Directions.OUTPUTS), context)
        assert caught.value.field == part
    with pytest.raises(BadParameters, match="takes no twin"):
        Lssf.parse({"directions": "outputs", "source": "twin"})
