"""`spectral` against a singular value decomposition of the whole update in float64."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from repair.context import RepairContext
from repair.errors import BadParameters, MissingReference
from repair.lora import LoraAdapter, LoraLayer
from repair.method import Decision
from repair.methods.spectral import Spectral
from repair.moments import Side, Topic
from repair.run import Repaired, repair_adapter
from tests import tiny
from tests.repair import dense, refactored
from tests.repair.calibrated import context_in, covariance, known, one, with_bias

UP = "model.layers.0.mlp.up_proj"


def run(adapter: LoraAdapter | None = None, **parameters: object) -> Repaired:
    return repair_adapter(adapter or tiny.adapter(), Spectral.parse(parameters), RepairContext())


def attenuated(update: torch.Tensor, top: int, gain: float) -> torch.Tensor:
    """The definition: the first singular values times ``gain``, put together again."""
    u, values, vh = torch.linalg.svd(update, full_matrices=False)
    values[:top] *= gain
    found: torch.Tensor = (u * values) @ vh
    return found


def alone(layer: LoraLayer) -> LoraAdapter:
    return LoraAdapter(layers=(layer,))


@pytest.mark.parametrize("gain", [0.0, 0.3, 0.99])
@pytest.mark.parametrize("top", [1, 2, 3, 50])
@pytest.mark.parametrize("scale", [2.0, -0.5])
def test_the_top_components_are_attenuated(top: int, gain: float, scale: float) -> None:
    """Every shape of module, any scale; the scale itself stays where it is."""
    adapter = tiny.adapter(scale=scale)

    repaired = run(adapter, top=top, gain=gain)

    for layer, verdict in zip(repaired.adapter.layers, repaired.verdicts, strict=True):
        d = dense.delta(adapter.by_name[layer.name])
        wanted = attenuated(d, top, gain)
        assert float((dense.delta(layer) - wanted).norm() / d.norm()) < 1e-6
        assert verdict.shrink == pytest.approx(float(wanted.norm() / d.norm()), rel=1e-5, abs=1e-7)
        assert layer.scale == scale
        assert layer.rank == 3


def test_the_score_is_the_share_of_the_largest_component() -> None:
    """Of the energy: how suspicious it is without any clean prompt."""
    for verdict in run().verdicts:
        values = torch.linalg.svdvals(dense.delta(tiny.adapter().by_name[verdict.name]))
        assert verdict.score == pytest.approx(float(values[0] ** 2 / values.square().sum()), rel=1e-6)


def test_factors_come_out_balanced() -> None:
    """However unequal they went in, neither under- nor overflows in 16 bits."""
    repaired = run(refactored.adapter(tiny.adapter()), top=1, gain=0.5)

    for layer in repaired.adapter.layers:
        torch.testing.assert_close(layer.b.T @ layer.b, layer.a @ layer.a.T, rtol=1e-6, atol=1e-9)


def test_other_factors_of_the_same_update_give_the_same_repair() -> None:
    """It acts on the update, not on its factors."""
    one, two = (run(adapter, top=2, gain=0.2) for adapter in (tiny.adapter(), refactored.adapter(tiny.adapter())))

    for layer in one.adapter.layers:
        assert dense.relative(dense.delta(two.adapter.by_name[layer.name]), dense.delta(layer)) < 1e-6


@pytest.mark.parametrize("top", [1, 2, 4])
def test_a_bias_is_the_column_that_reads_one(top: int) -> None:
    """The components are those of the update of (x, 1), bias and all."""
    layer = tiny.layer(UP, bias=torch.randn(97, generator=tiny.generator(8)) * 0.3)
    assert layer.bias is not None

    found = run(alone(layer), top=top, gain=0.25).adapter.layers[0]

    wanted = attenuated(torch.cat([dense.delta(layer), layer.scale * layer.bias.double()[:, None]], dim=1), top, 0.25)
    assert found.bias is not None
    assert dense.relative(dense.delta(found), wanted[:, :-1]) < 1e-5
    assert dense.relative(found.scale * found.bias, wanted[:, -1]) < 1e-5


@pytest.mark.parametrize(("shape", "rank"), [((7, 11), 13), ((1, 5), 2), ((5, 1), 1), ((17, 53), 1)])
def test_any_rank_stays_what_it_is(shape: tuple[int, int], rank: int) -> None:
    """Rank 1, and a rank above both dimensions, whose factors are padded again."""
    layer = tiny.layer(UP, shape, rank=rank)

    found = run(alone(layer), top=1, gain=0.5).adapter.layers[0]

    assert (found.rank, found.shape) == (rank, shape)
    assert dense.relative(dense.delta(found), attenuated(dense.delta(layer), 1, 0.5)) < 1e-6


def test_rank_deficient_factors_are_fine() -> None:
    """Three equal columns are one component: removing it leaves nothing but rounding."""
    layer = tiny.layer(UP)
    layer = replace(layer, b=layer.b[:, :1].expand(-1, 3).contiguous())

    verdict = run(alone(layer), top=1, gain=0.0).verdicts[0]

    assert verdict.score == pytest.approx(1.0)
    assert verdict.shrink == pytest.approx(0.0, abs=1e-6)


def test_attenuating_every_component_is_scaling() -> None:
    """The same bits as multiplying B, and exactly nothing at gain 0."""
    adapter = tiny.adapter()

    for layer in run(adapter, top=3, gain=0.4).adapter.layers:
        assert torch.equal(layer.b, adapter.by_name[layer.name].b * 0.4)
        assert layer.a is adapter.by_name[layer.name].a
    assert not any(layer.b.any() for layer in run(adapter, top=3, gain=0.0).adapter.layers)


@pytest.mark.parametrize(
    ("top", "gain", "wanted"),
    [(1, 0.5, Decision.SCALED), (1, 0, Decision.PROJECTED), (3, 0, Decision.DROPPED), (9, 1, Decision.KEPT)],
)
def test_verdicts_say_what_was_done(top: int, gain: float, wanted: Decision) -> None:
    """Scaled components, removed ones, or all of them removed; nothing at gain 1."""
    repaired = run(top=top, gain=gain)

    assert {verdict.decision for verdict in repaired.verdicts} == {wanted}
    assert repaired.changed is (wanted is not Decision.KEPT)


def test_refuses_impossible_parameters() -> None:
    """Named by field; a weight of clean prompts is not offered, since none are read."""
    for parameters in ({"top": 0}, {"gain": 1.5}, {"gain": -0.1}, {"mu": 1.0}):
        with pytest.raises(BadParameters) as caught:
            Spectral.parse(parameters)
        assert caught.value.field == f"spectral.{next(iter(parameters))}"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("protect", [0.4, 3.0])
def test_what_ordinary_prompts_need_is_protected(tmp_path: Path, protect: float, bias: bool) -> None:
    """Suspicion: share of the energy less ``protect`` times the share of the benign response, by whole matrices."""
    context = context_in(tmp_path)
    layer = with_bias() if bias else tiny.layer(UP)
    second = covariance(context, layer, Side.INPUTS, Topic.BENIGN)
    mean = known(context, layer).moments(Side.INPUTS, Topic.BENIGN).mean.double()
    d = dense.delta(layer)
    if layer.bias is not None:
        d = torch.cat([d, layer.scale * layer.bias.double()[:, None]], dim=1)
        second = torch.cat([torch.cat([second, mean[:, None]], 1), torch.cat([mean, torch.ones(1)])[None]], 0)
    u, values, vh = torch.linalg.svd(d, full_matrices=False)
    rank = layer.rank + bias  # the bias is one component more
    said = torch.stack([values[k] * (vh[k] @ second @ vh[k]).sqrt() for k in range(rank)])
    suspicion = values[:rank].square() / values.square().sum() - protect * said / said.sum()
    order = suspicion.argsort(descending=True)
    changed = values.clone()
    changed[order[:2]] *= 0.25

    found, verdict = one(context, "spectral", layer, top=2, gain=0.25, protect=protect)

    got = dense.delta(found)
    if found.bias is not None:
        got = torch.cat([got, found.scale * found.bias.double()[:, None]], dim=1)
    assert dense.relative(got, (u * changed) @ vh) < 1e-5
    assert verdict.score == pytest.approx(float(suspicion.max()), rel=1e-5)


def test_protection_turns_the_choice_to_what_nothing_ordinary_uses(tmp_path: Path) -> None:
    """A large component that ordinary prompts feed stays; without protection it goes, and needs no calibration."""
    context = context_in(tmp_path)
    benign = known(context, tiny.layer(UP)).moments(Side.INPUTS, Topic.BENIGN)
    fed = benign.basis[:, 0]
    idle = torch.linalg.qr(torch.cat([benign.basis, torch.randn(53, 1, generator=tiny.generator(1))], 1))[0][:, -1]
    out = torch.linalg.qr(torch.randn(97, 2, generator=tiny.generator(2)))[0]
    layer = LoraLayer(name=UP, a=torch.stack([fed, idle]), b=out * torch.tensor([1.2, 1.0]), scale=1.0)

    plain = run(alone(layer), top=1, gain=0.0).adapter.layers[0]
    guarded, _ = one(context, "spectral", layer, top=1, gain=0.0, protect=2.0)

    assert float((dense.delta(plain) @ fed.double()).norm()) < 1e-6
    assert float((dense.delta(guarded) @ fed.double()).norm()) == pytest.approx(1.2, rel=1e-5)
    assert float((dense.delta(guarded) @ idle.double()).norm()) < 1e-6
    with pytest.raises(MissingReference) as caught:
        run(alone(layer), protect=2.0)
    assert caught.value.field in {"aligned", "calibration"}
