"""Every low-rank identity against the dense matrix it stands for."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repair import alignment, linalg
from repair.grams import row_gram
from repair.lora import LayerReference, LoraLayer
from tests import tiny
from tests.repair import dense

SHAPES = [(97, 53, 3), (53, 97, 5), (17, 131, 1), (7, 11, 13), (1, 5, 2), (5, 1, 1)]
shapes = pytest.mark.parametrize(("out_features", "in_features", "rank"), SHAPES)


def made(out_features: int, in_features: int, rank: int, seed: int = 0) -> LoraLayer:
    return tiny.layer(shape=(out_features, in_features), rank=rank, seed=seed, scale=1.7)


@shapes
def test_energy_is_the_squared_norm(out_features: int, in_features: int, rank: int) -> None:
    """I1."""
    layer = made(out_features, in_features, rank)

    assert linalg.delta_energy(layer) == pytest.approx(float(dense.delta(layer).square().sum()), rel=1e-9)


@shapes
def test_cosine_is_that_of_the_dense_updates(out_features: int, in_features: int, rank: int) -> None:
    """I3, for updates of different ranks."""
    one, two = made(out_features, in_features, rank), made(out_features, in_features, rank + 2, seed=7)

    found = linalg.low_rank_cosine(linalg.Factors(b=one.b, a=one.a), linalg.Factors(b=two.b, a=two.a))

    assert found == pytest.approx(dense.cosine(dense.delta(one), dense.delta(two)), rel=1e-9, abs=1e-12)


@shapes
def test_spectrum_is_that_of_the_dense_update(out_features: int, in_features: int, rank: int) -> None:
    """I5: values, and factors that multiply back."""
    layer = made(out_features, in_features, rank)
    wanted = torch.linalg.svdvals(dense.delta(layer))

    found = linalg.spectrum(layer.b, layer.a, layer.scale)

    torch.testing.assert_close(found.values, wanted[: len(found.values)], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close((found.u * found.values) @ found.v.T, dense.delta(layer))


def test_spectrum_keeps_small_singular_values() -> None:
    """Through QR: a value 1e-7 times the largest survives, which Grams in float32 would lose."""
    b = torch.linalg.qr(torch.randn(61, 2, generator=tiny.generator(0))).Q * torch.tensor([1.0, 1e-7])
    a = torch.linalg.qr(torch.randn(53, 2, generator=tiny.generator(1))).Q.T.contiguous()

    values = linalg.spectrum(b, a).values

    assert float(values[1]) == pytest.approx(1e-7, rel=1e-3)


@shapes
def test_balanced_factors_are_the_same_update(out_features: int, in_features: int, rank: int) -> None:
    """Equal norms, equal product."""
    layer = made(out_features, in_features, rank)

    found = linalg.balanced(layer.b, layer.a, layer.scale)

    torch.testing.assert_close(found.b @ found.a, dense.delta(layer))
    assert float(found.a.norm()) == pytest.approx(float(found.b.norm()))


@shapes
def test_row_energies_are_those_of_the_rows(out_features: int, in_features: int, rank: int) -> None:
    """I6."""
    layer = made(out_features, in_features, rank)

    found = linalg.row_energies(layer.b, layer.a, layer.scale)

    torch.testing.assert_close(found, dense.delta(layer).square().sum(1))


def test_row_norms_of_the_adapted_weight_need_no_delta() -> None:
    """I7 by rows, several updates in one pass over the weight."""
    weight = torch.randn(61, 53, generator=tiny.generator(3))
    layers = [made(61, 53, 3), made(61, 53, 5, seed=1)]
    reference = LayerReference(name="x", aligned=InMemory(weight), tile_rows=7)

    norms = linalg.row_norms(layers, reference)

    for layer, found in zip(layers, norms, strict=True):
        torch.testing.assert_close(found, (weight.double() + dense.delta(layer)).norm(dim=1), rtol=1e-6, atol=0)


def test_a_bias_counts_as_a_column_that_reads_one() -> None:
    """The energy of the update of (x, 1)."""
    bias = torch.randn(61, generator=tiny.generator(9))
    layer = tiny.layer(shape=(61, 53), bias=bias)
    wanted = float(dense.delta(layer).square().sum() + (layer.scale * bias.double()).square().sum())

    assert linalg.delta_energy(layer) == pytest.approx(wanted)


def test_sampled_entries_are_entries() -> None:
    """I12: every sample is found in the dense matrix, and their quartile is near the true one."""
    layer = tiny.layer(shape=(61, 53))
    whole = (layer.b @ layer.a).flatten()

    found = linalg.sampled_entries(layer.b, layer.a, 20_000, seed=4)

    assert torch.isin(found, whole).float().mean() > 0.5  # the order of summation moves the last bit of the others
    assert float(found.quantile(0.25)) == pytest.approx(float(whole.quantile(0.25)), rel=0.1)


class InMemory:
    """A weight that is already loaded."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def rows(self, start: int, stop: int) -> torch.Tensor:
        return self.values[start:stop]

    def fetch(self) -> None:
        pass


def pair(out_features: int, in_features: int, tile_rows: int, dtype: torch.dtype) -> LayerReference:
    base = tiny.weights({"w": (out_features, in_features)}, dtype=dtype)
    aligned = tiny.aligned_from(base)
    return LayerReference(
        name="w", aligned=InMemory(aligned["w.weight"]), base=InMemory(base["w.weight"]), tile_rows=tile_rows
    )


def displacement(reference: LayerReference) -> torch.Tensor:
    assert isinstance(reference.aligned, InMemory)
    assert isinstance(reference.base, InMemory)
    return reference.aligned.values.double() - reference.base.values.double()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("tile_rows", [1, 16, 1000])
def test_alignment_products_are_those_of_the_operator(tile_rows: int, dtype: torch.dtype) -> None:
    """I10, whatever the tiles and the number format."""
    reference = pair(61, 53, tile_rows, dtype)
    x = torch.randn(61, 4, generator=tiny.generator(5))
    v = displacement(reference)

    found = alignment.alignment_products([x], reference)

    assert found.norm == pytest.approx(float(v.norm()), rel=1e-5)
    assert dense.relative(found.groups[0], dense.published_operator(v) @ x.double()) < 1e-5


def test_what_is_remembered_never_changes_a_bit() -> None:
    """The second adapter on a warm reference gets what it would have got on a cold one."""
    warm, cold = pair(61, 53, 16, torch.bfloat16), pair(61, 53, 16, torch.bfloat16)
    one, two = (torch.randn(61, 3, generator=tiny.generator(seed)) for seed in (1, 2))
    alignment.published_projection(one, warm)
    assert warm.remembered

    found, wanted = alignment.published_projection(two, warm), alignment.published_projection(two, cold)

    assert found is not None
    assert wanted is not None
    assert torch.equal(found.columns, wanted.columns)
    assert found.blank == wanted.blank


def test_alignment_products_without_alignment_are_zero() -> None:
    """The operator is 0/0 there; nothing must become NaN."""
    weight = InMemory(torch.randn(61, 53, generator=tiny.generator(0)))
    reference = LayerReference(name="w", aligned=weight, base=weight)

    found = alignment.alignment_products([torch.ones(61, 2)], reference)

    assert found.norm == 0
    assert not found.groups[0].any()
    assert alignment.alignment_basis(reference, 5) is None


def test_a_displacement_below_rounding_counts_as_none() -> None:
    """``|V| < 1e-9 |W|`` is noise of the format."""
    weight = torch.randn(61, 53, generator=tiny.generator(0), dtype=torch.float64)
    moved = weight.clone()
    moved[0, 0] += 1e-9
    reference = LayerReference(name="w", aligned=InMemory(moved), base=InMemory(weight))

    assert alignment.alignment_products([torch.ones(61, 2)], reference).norm == 0


def test_alignment_basis_spans_the_top_singular_vectors() -> None:
    """The same projector as the dense SVD gives, and the same values."""
    reference = pair(97, 53, 16, torch.float32)
    v = displacement(reference)

    found = alignment.alignment_basis(reference, 4)

    assert found is not None
    torch.testing.assert_close(found.values.double(), torch.linalg.svdvals(v)[:4], rtol=1e-4, atol=0)
    projector = (found.u @ found.u.T).double()
    assert float((projector - dense.truncated_projector(v, 4)).norm()) < 1e-3


@settings(max_examples=60)
@given(
    out_features=st.integers(1, 24),
    in_features=st.integers(1, 24),
    rank=st.integers(1, 30),
    scale=st.floats(-4, 4, allow_subnormal=False),
    seed=st.integers(0, 1000),
    zero=st.booleans(),
)
def test_comparison_agrees_with_dense_for_any_shape(
    *, out_features: int, in_features: int, rank: int, scale: float, seed: int, zero: bool
) -> None:
    """Rank 1, rank above both dimensions, rank-deficient and zero factors included."""
    layer = tiny.layer(shape=(out_features, in_features), rank=rank, seed=seed, scale=scale)
    b = torch.zeros_like(layer.b) if zero else layer.b
    if rank > 1 and seed % 2:
        b = b[:, :1].expand(-1, rank).contiguous()  # rank-deficient
    edited = torch.randn(b.shape, generator=tiny.generator(seed + 1))
    d, e = b.double() @ layer.a.double(), edited.double() @ layer.a.double()

    found = linalg.compare(edited, b, row_gram(layer.a))

    size = float(d.norm() + e.norm())
    assert math.sqrt(found.energy) == pytest.approx(float(d.norm()), rel=1e-5, abs=1e-6)
    assert math.sqrt(found.edited) == pytest.approx(float(e.norm()), rel=1e-5, abs=1e-6)
    assert found.distance == pytest.approx(float((e - d).norm()), rel=1e-5, abs=1e-6 * (1 + size))
    assert found.cosine == pytest.approx(0.0 if zero else dense.cosine(e, d), rel=1e-5, abs=1e-6)
