"""How an addition relates to the update it joins, against whole matrices in float64."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from repair.context import RepairContext
from repair.interaction import Addition, interaction
from repair.lora import LoraAdapter, LoraLayer
from repair.methods import METHODS
from repair.moments import Side, Topic
from repair.run import repair_adapter
from tests import tiny
from tests.repair import dense, gauge
from tests.repair.calibrated import context_in, covariance, known

UP = "model.layers.0.mlp.up_proj"


def whole(layer: LoraLayer) -> Tensor:
    """The update with its bias as one more column."""
    bias = torch.zeros(layer.shape[0]) if layer.bias is None else layer.bias
    return torch.cat([dense.delta(layer), layer.scale * bias.double()[:, None]], dim=1)


def expected(own: LoraLayer, added: LoraLayer) -> tuple[float, float, float, float]:
    """Cosine, overlaps of outputs and inputs, opposed share, from the definitions."""
    d, p = whole(own), whole(added)
    ranks = min(int(torch.linalg.matrix_rank(x, rtol=1e-6)) for x in (d, p))
    outputs = float(torch.trace(projector(d) @ projector(p))) / ranks
    inputs = float(torch.trace(projector(d.T) @ projector(p.T))) / ranks
    u, values, vh = torch.linalg.svd(p, full_matrices=False)
    lost = 0.0
    for i, value in enumerate(values.tolist()):
        along = float(u[:, i] @ d @ vh[i])
        lost += value**2 - max(value + min(along, 0.0), 0.0) ** 2
    return dense.cosine(d, p), outputs, inputs, lost / float(values.square().sum())


def projector(x: Tensor) -> Tensor:
    """Onto the column space."""
    found: Tensor = x @ torch.linalg.pinv(x, rtol=1e-6)
    return found


def numbers(found: Addition) -> tuple[float | None, ...]:
    return found.cosine, found.output_overlap, found.input_overlap, found.opposed


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("bias", [None, "own", "added"])
def test_numbers_are_the_definitions(seed: int, bias: str | None) -> None:
    """With different ranks and scales, a part in common, and a bias on either side."""
    own, added = tiny.layer(UP, seed=seed, scale=-1.5), tiny.layer(UP, rank=2, seed=seed + 50, scale=0.7)
    added = replace(added, b=added.b + 0.6 * own.b[:, :2], a=added.a + own.a[1:])
    shift = torch.randn(97, generator=tiny.generator(seed))
    own = replace(own, bias=shift) if bias == "own" else own
    added = replace(added, bias=shift) if bias == "added" else added

    found = interaction(own, added)

    assert numbers(found) == pytest.approx(expected(own, added), rel=1e-5)
    assert found.energy == pytest.approx(float(whole(added).square().sum()), rel=1e-6)
    assert found.rank == 2


@pytest.mark.parametrize(("share", "opposed"), [(-1.0, 1.0), (-0.5, 0.75), (-3.0, 1.0), (0.5, 0.0)])
def test_an_adapter_along_the_addition_opposes_what_it_takes_away(share: float, opposed: float) -> None:
    """Minus half of it leaves a quarter of its energy; more than all of it takes no more than all; plus takes none."""
    added = tiny.layer(UP)

    found = interaction(added.scaled(share), added)

    assert numbers(found) == pytest.approx((1.0 if share > 0 else -1.0, 1.0, 1.0, opposed), abs=1e-5)


def test_updates_with_nothing_in_common_do_not_meet() -> None:
    """Other inputs and other outputs: zero everywhere."""
    layer = tiny.layer(UP)
    left, right = torch.arange(53) < 20, torch.arange(97) < 40
    one = replace(layer, a=layer.a * left, b=layer.b * right[:, None])
    two = replace(layer, a=layer.a * ~left, b=layer.b * ~right[:, None])

    assert numbers(interaction(one, two)) == pytest.approx((0, 0, 0, 0), abs=1e-9)


def test_other_factors_of_the_same_updates_give_the_same_numbers() -> None:
    """The account is of updates, not of factors."""
    own, added = tiny.adapter(), tiny.adapter(seed=60, rank=2)
    turned, other = gauge.refactored(own).by_name, gauge.refactored(added, seed=70).by_name

    for layer in own.layers:
        plain = interaction(layer, added.by_name[layer.name])
        assert numbers(interaction(turned[layer.name], other[layer.name])) == pytest.approx(numbers(plain), rel=1e-4)


def test_a_rank_that_is_not_used_does_not_count_as_a_direction() -> None:
    """Columns of nothing, and columns that repeat others, span no more."""
    own, added = tiny.layer(UP), tiny.layer(UP, rank=2, seed=9)
    padded = replace(own, b=torch.cat([own.b, own.b], dim=1), a=torch.cat([own.a, torch.zeros_like(own.a)]))

    assert numbers(interaction(padded, added)) == pytest.approx(numbers(interaction(own, added)), rel=1e-5)


@pytest.mark.parametrize("zero", ["own", "added", "none"])
def test_without_two_updates_there_is_nothing_to_compare(zero: str) -> None:
    """None, not NaN; rank and energy are still told."""
    own, added = tiny.layer(UP), tiny.layer(UP, rank=2, seed=9)
    first = {"own": own.zeroed(), "added": own, "none": None}[zero]
    second = added.zeroed() if zero == "added" else added

    found = interaction(first, second)

    assert (found.rank, numbers(found)) == (2, (None, None, None, None))
    assert (found.energy > 0) is (zero != "added")


def test_verdicts_carry_the_account_and_the_report_the_growth() -> None:
    """One for each module that grew, none elsewhere, and a note with the largest rank."""
    shapes = dict(list(tiny.SHAPES.items())[:3])
    patch = tiny.adapter({**shapes, "model.layers.9.mlp.up_proj": (97, 53)}, rank=2, seed=60)
    adapter = tiny.adapter()

    repaired = repair_adapter(adapter, METHODS["patch"](), RepairContext(patch=patch))

    for verdict in repaired.verdicts:
        own = adapter.by_name.get(verdict.name)
        added = patch.by_name.get(verdict.name)
        assert verdict.addition == (None if added is None else interaction(own, added))
        assert ("addition" in verdict.as_dict()) is (added is not None)
    rank, serving = repaired.notes
    assert rank == "rank: 4 modules grew; the largest was 3 and is 5"
    assert serving.startswith("serving: TGI will leave out ")


def test_a_method_that_adds_nothing_reports_no_growth() -> None:
    """Neither note nor account."""
    repaired = repair_adapter(LoraAdapter(layers=(tiny.layer(UP),)), METHODS["scale"](), RepairContext())

    assert repaired.notes == ()
    assert repaired.verdicts[0].addition is None


@pytest.mark.parametrize("bias", [None, "own", "added"])
def test_the_response_ratio_is_by_the_harmful_inputs(tmp_path: Path, bias: str | None) -> None:
    """``|D x| / |g D_p x|``, root mean squares, against the whole second moment; both scales count."""
    context = context_in(tmp_path)
    own, added = tiny.layer(UP, scale=-1.5), tiny.layer(UP, rank=2, seed=50, scale=0.7)
    shift = torch.randn(97, generator=tiny.generator(3))
    own = replace(own, bias=shift) if bias == "own" else own
    added = replace(added, bias=shift) if bias == "added" else added
    module = known(context, own)
    second = covariance(context, own, Side.INPUTS, Topic.HARMFUL)
    mean = module.moments(Side.INPUTS, Topic.HARMFUL).mean.double()
    second = torch.cat([torch.cat([second, mean[:, None]], 1), torch.cat([mean, torch.ones(1)])[None]], 0)

    def loud(layer: LoraLayer) -> float:
        return float(torch.trace(whole(layer) @ second @ whole(layer).T).sqrt())

    assert interaction(own, added, module).response == pytest.approx(loud(own) / loud(added), rel=1e-5)
    assert interaction(own, added).response is None


def test_a_report_has_the_response_ratio_where_there_is_a_calibration(tmp_path: Path) -> None:
    """Of what is in the end added, at its strength: twice the patch is half the ratio."""
    context = replace(context_in(tmp_path), patch=tiny.adapter(seed=5))
    found = {
        strength: repair_adapter(tiny.adapter(), METHODS["patch"].parse({"strength": strength}), context).verdicts
        for strength in (1.0, 2.0)
    }
    for one, two in zip(found[1.0], found[2.0], strict=True):
        assert one.addition is not None
        assert two.addition is not None
        assert one.addition.response == pytest.approx(2 * (two.addition.response or 0), rel=1e-6)
