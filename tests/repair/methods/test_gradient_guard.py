"""`gradient_guard` against whole gradients and updates in float64."""

import math
from dataclasses import replace

import pytest
import torch

from repair.context import RepairContext
from repair.method import Decision
from tests import tiny
from tests.repair import dense
from tests.repair.calibrated import UP, context_in, damaging, known, one, refactored, run, whole_gradient, with_bias


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> RepairContext:
    return context_in(tmp_path_factory.mktemp("model"))


def test_predicted_damage_is_the_inner_product(context: RepairContext) -> None:
    """``<G, D>`` of whole matrices, plus the bias with its gradient; only what raises the loss is edited."""
    adapter = tiny.adapter()
    wanted = {
        layer.name: float((whole_gradient(context, layer) * dense.delta(layer)).sum()) for layer in adapter.layers
    }

    repaired = run(context, "gradient_guard")

    for verdict in repaired.verdicts:
        assert verdict.score == pytest.approx(wanted[verdict.name], rel=1e-4)
        assert (verdict.decision is Decision.PROJECTED) == (wanted[verdict.name] > 0)
    assert {v.decision for v in repaired.verdicts} == {Decision.PROJECTED, Decision.KEPT}
    layer = with_bias()
    assert layer.bias is not None
    shift = layer.scale * layer.bias.double() @ known(context, layer).gradient().bias.double()
    _, verdict = one(context, "gradient_guard", layer)
    assert verdict.score == pytest.approx(float((whole_gradient(context, layer) * dense.delta(layer)).sum() + shift))


@pytest.mark.parametrize(("strength", "directions"), [(1.0, 2), (0.4, 5)])
def test_projection_is_that_onto_the_top_left_singular_vectors(
    context: RepairContext, strength: float, directions: int
) -> None:
    """``(I - strength U U^T) D`` with U from the whole gradient's SVD."""
    layer = damaging(context, tiny.layer(UP))
    u = torch.linalg.svd(whole_gradient(context, layer)).U[:, :directions]

    found, _ = one(context, "gradient_guard", layer, strength=strength, directions=directions)

    wanted = dense.delta(layer) - strength * u @ u.T @ dense.delta(layer)
    assert dense.relative(dense.delta(found), wanted) < 1e-5
    assert found.rank == layer.rank


@pytest.mark.parametrize("directions", [2, 5])
def test_minimal_form_leaves_no_predicted_damage(context: RepairContext, directions: int) -> None:
    """``D - (<G, D> / |G_k|^2) G_k``: exactly that, at rank r + k, and with all of G no smaller change does it."""
    layer = damaging(context, tiny.layer(UP))
    g = whole_gradient(context, layer)
    u, values, vh = torch.linalg.svd(g)
    kept = (u[:, :directions] * values[:directions]) @ vh[:directions]
    d = dense.delta(layer)

    found, verdict = one(context, "gradient_guard", layer, form="minimal", directions=directions)

    wanted = d - (g * d).sum() / kept.square().sum() * kept
    assert dense.relative(dense.delta(found), wanted) < 1e-5
    assert abs(float((g * dense.delta(found)).sum())) < 1e-5 * float((g * d).sum())
    assert (found.rank, verdict.decision) == (layer.rank + directions, Decision.PATCHED)


@pytest.mark.parametrize(("share", "strength"), [(1.0, 1.0), (0.5, 0.4)])
def test_scale_shrinks_the_modules_that_do_most_damage(context: RepairContext, share: float, strength: float) -> None:
    """The right share of those with a positive inner product, the largest first, and nothing else."""
    adapter = tiny.adapter()
    damage = {
        layer.name: float((whole_gradient(context, layer) * dense.delta(layer)).sum()) for layer in adapter.layers
    }
    harmful = sorted((name for name in damage if damage[name] > 0), key=lambda name: -damage[name])
    chosen = set(harmful[: math.ceil(share * len(harmful))])
    assert 0 < len(chosen) <= len(harmful) < len(damage)

    repaired = run(context, "gradient_guard", form="scale", share=share, strength=strength)

    for layer in adapter.layers:
        kept = 1 - strength if layer.name in chosen else 1
        found = dense.delta(repaired.adapter.by_name[layer.name])
        torch.testing.assert_close(found, kept * dense.delta(layer), rtol=1e-5, atol=1e-8)
    assert {v.name for v in repaired.verdicts if v.decision is Decision.SCALED} == chosen


def test_minimal_form_shares_the_change_with_the_bias(context: RepairContext) -> None:
    """Update and bias together lose their predicted damage, each along its own gradient."""
    layer = with_bias()
    layer = replace(layer, b=damaging(context, layer).b)
    g, g_bias = whole_gradient(context, layer), known(context, layer).gradient().bias.double()
    assert layer.bias is not None
    before = float((g * dense.delta(layer)).sum() + layer.scale * layer.bias.double() @ g_bias)
    layer = layer if before > 0 else replace(layer, b=-layer.b, bias=-layer.bias)
    assert layer.bias is not None

    found, _ = one(context, "gradient_guard", layer, form="minimal", directions=5)

    assert found.bias is not None
    step = abs(before) / float(g.square().sum() + g_bias.square().sum())
    assert dense.relative(dense.delta(found), dense.delta(layer) - step * g) < 1e-5
    assert dense.relative(found.scale * found.bias, layer.scale * layer.bias.double() - step * g_bias) < 1e-5


def test_a_refactored_adapter_gets_the_same_update(context: RepairContext) -> None:
    """``B R, R^-1 A`` is the same adapter."""
    layer = damaging(context, tiny.layer(UP))

    (one_, said), (two, also) = (one(context, "gradient_guard", x, directions=3) for x in (layer, refactored(layer)))

    assert dense.relative(dense.delta(two), dense.delta(one_)) < 1e-4
    assert also.score == pytest.approx(said.score, rel=1e-4)
