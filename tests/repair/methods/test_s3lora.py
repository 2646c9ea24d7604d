"""`s3lora` against its reconstruction, written out with whole matrices in float64."""

from dataclasses import replace

import pytest
import torch

from repair.context import RepairContext
from repair.errors import BadParameters
from repair.lora import LoraAdapter, LoraLayer
from repair.method import Decision
from repair.methods.s3lora import S3Lora, type_of
from repair.run import Repaired, repair_adapter
from tests import tiny
from tests.repair import dense, refactored

FORMS = ["largest_share", "energy_share", "largest_over_mean", "weighted_energy_share"]
Q = "model.layers.{}.self_attn.q_proj"
UP = "model.layers.{}.mlp.up_proj"


def run(adapter: LoraAdapter | None = None, **parameters: object) -> Repaired:
    return repair_adapter(adapter or tiny.adapter(), S3Lora.parse(parameters), RepairContext())


def dropped(repaired: Repaired) -> set[str]:
    return {verdict.name for verdict in repaired.verdicts if verdict.decision is Decision.DROPPED}


def index(layer: LoraLayer, form: str) -> float:
    """Rows at unit length, the global magnitude restored, then what is asked of the singular values."""
    d = dense.delta(layer)
    if layer.bias is not None:
        d = torch.cat([d, layer.scale * layer.bias.double()[:, None]], dim=1)
    norms = d.norm(dim=1, keepdim=True)
    spherical = torch.where(norms > 1e-6 * norms.square().mean().sqrt(), d / norms, 0.0)
    spherical = spherical * d.norm() / spherical.norm()
    values = torch.linalg.svdvals(spherical)[: min(*d.shape, layer.rank + (layer.bias is not None))]
    return {
        "largest_share": float(values[0] / values.sum()),
        "energy_share": float(values[0] ** 2 / values.square().sum()),
        "largest_over_mean": float(values[0] / values.mean()),
        "weighted_energy_share": float(spherical.norm() * values[0] ** 2 / values.square().sum()),
    }[form]


def flat(name: str, sharpness: float, seed: int, size: float = 1.0) -> LoraLayer:
    """A module of rank 3 whose first component has ``sharpness`` times the size of the other two."""
    out_features, in_features = tiny.SHAPES.get(name, (61, 53))
    b = torch.linalg.qr(torch.randn(out_features, 3, generator=tiny.generator(seed))).Q
    a = torch.linalg.qr(torch.randn(in_features, 3, generator=tiny.generator(seed + 1))).Q.T
    return LoraLayer(name=name, b=b * torch.tensor([sharpness, 1.0, 1.0]) * size, a=a.contiguous(), scale=1.0)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rank", [2, 3, 60])
def test_the_score_is_the_sharpness_of_the_normalised_update(form: str, rank: int) -> None:
    """The four forms, for every shape of module, a rank above a dimension included."""
    adapter = tiny.adapter(rank=rank)

    for verdict in run(adapter, index=form).verdicts:
        assert verdict.score == pytest.approx(index(adapter.by_name[verdict.name], form), rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_very_unequal_size_weigh_the_same(form: str) -> None:
    """Spherical: one large row does not decide, and a row of nothing stays nothing, also where b does not show it."""
    layer = flat(UP.format(0), 1.0, 3)
    b = layer.b * torch.logspace(-3, 3, 97)[:, None]
    b[5] = 0.0
    a = layer.a.clone()
    a[2] = a[1]
    b[7] = torch.tensor([0.0, 1.0, -1.0])  # b is not zero there, b a is
    odd = replace(layer, b=b, a=a)

    verdict = run(LoraAdapter(layers=(odd,)), index=form).verdicts[0]

    assert verdict.score == pytest.approx(index(odd, form), rel=1e-5)
    assert form == "weighted_energy_share" or verdict.score != pytest.approx(index(layer, form), rel=1e-3)


def test_a_bias_is_part_of_the_update() -> None:
    """One more column."""
    layer = tiny.layer(bias=torch.randn(97, generator=tiny.generator(8)))

    verdict = run(LoraAdapter(layers=(layer,))).verdicts[0]

    assert verdict.score == pytest.approx(index(layer, "energy_share"), rel=1e-5)


def test_drops_the_sharpest_of_each_type() -> None:
    """q_proj is flatter than up_proj throughout; its sharpest goes all the same, before the second up_proj."""
    adapter = LoraAdapter(
        layers=(
            flat(Q.format(0), 1.0, 10),
            flat(Q.format(1), 1.6, 20),
            flat(UP.format(0), 9.0, 30),
            flat(UP.format(1), 20.0, 40),
        )
    )
    scores = {verdict.name: verdict.score or 0.0 for verdict in run(adapter, count=0).verdicts}
    assert scores[Q.format(0)] < scores[Q.format(1)] < scores[UP.format(0)] < scores[UP.format(1)]

    assert dropped(run(adapter, count=2)) == {Q.format(1), UP.format(1)}
    assert dropped(run(adapter, share=0.5)) == {Q.format(1), UP.format(1)}
    assert dropped(run(adapter, count=1)) == {Q.format(1)}  # it is further above the middle of its type
    assert len(dropped(run(adapter, count=3))) == 3


def test_types_give_in_proportion_to_their_size() -> None:
    """Of two alike q_proj and four very unlike o_proj: the sharpest of each before the second o_proj."""
    q, o = "model.layers.{}.self_attn.q_proj", "model.layers.{}.self_attn.o_proj"
    layers = [flat(q.format(at), value, 10 + at) for at, value in enumerate([3.0, 4.0])]
    layers += [flat(o.format(at), value, 30 + at) for at, value in enumerate([1.0, 1.2, 8.0, 20.0])]
    adapter = LoraAdapter(layers=tuple(layers))

    assert dropped(run(adapter, count=2)) == {o.format(3), q.format(1)}
    assert dropped(run(adapter, share=0.5)) == {o.format(3), q.format(1), o.format(2)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [0, 1, 4, 8])
def test_count_drops_that_many_and_no_flatter_one_of_a_type(form: str, count: int) -> None:
    """Within a type nothing that stays is sharper than what goes."""
    verdicts = run(count=count, index=form).verdicts

    assert len(dropped(run(count=count, index=form))) == count
    for one in verdicts:
        for two in verdicts:
            if one.decision is Decision.DROPPED and two.decision is Decision.KEPT:
                assert type_of(one.name) != type_of(two.name) or one.score >= two.score


def test_share_is_rounded_up() -> None:
    """A tenth of eight modules is one."""
    for share, wanted in [(0.0, 0), (0.1, 1), (0.25, 2), (0.26, 3), (1.0, 8)]:
        assert len(dropped(run(share=share))) == wanted


def test_default_is_ten() -> None:
    """Or all, where there are fewer."""
    assert len(dropped(run())) == len(tiny.SHAPES)


def test_rank_one_falls_back_to_the_norm() -> None:
    """A single singular value is always sharp: there the largest update goes, and the score is its norm."""
    adapter = tiny.adapter(rank=1)
    sizes = {layer.name: float(dense.delta(layer).norm()) for layer in adapter.layers}

    repaired = run(adapter, count=4)

    for name in (name for name in sizes if ".0." in name):
        other = name.replace(".0.", ".1.")
        assert dropped(repaired) & {name, other} == {max(name, other, key=lambda one: sizes[one])}
    for verdict in repaired.verdicts:
        assert verdict.score == pytest.approx(sizes[verdict.name], rel=1e-6)
        assert verdict.decision is Decision.DROPPED or "ranked by norm" in verdict.reason


def test_one_module_of_rank_one_makes_its_type_fall_back_and_no_other() -> None:
    """Within a type only like is compared with like."""
    adapter = tiny.adapter()
    thin = tiny.layer(Q.format(0), tiny.SHAPES[Q.format(0)], rank=1)
    mixed = replace(adapter, layers=tuple(thin if one.name == thin.name else one for one in adapter.layers))

    for verdict in run(mixed, count=0).verdicts:
        layer = mixed.by_name[verdict.name]
        by_norm = "q_proj" in verdict.name
        wanted = float(dense.delta(layer).norm()) if by_norm else index(layer, "energy_share")
        assert verdict.score == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_other_factors_of_the_same_update_give_the_same_scores(form: str) -> None:
    """It acts on the update, not on its factors."""
    one, two = (run(each, count=3, index=form) for each in (tiny.adapter(), refactored.adapter(tiny.adapter())))

    assert dropped(one) == dropped(two)
    assert [v.score for v in two.verdicts] == pytest.approx([v.score for v in one.verdicts], rel=1e-6)


def test_types_are_paths_without_their_numbers() -> None:
    """GPT-2 has two c_proj that are not alike; experts of one block are."""
    assert type_of("transformer.h.0.attn.c_proj") != type_of("transformer.h.0.mlp.c_proj")
    assert type_of("model.layers.3.mlp.experts.11.w1") == type_of("model.layers.4.mlp.experts.0.w1")
    assert type_of("model.layers.3.w1") != type_of("model.layers.3.w2")


def test_says_that_it_is_a_reconstruction() -> None:
    """In the catalogue too: nobody is to take it for the published method."""
    assert "reconstruction" in S3Lora.catalogue_entry()["summary"]


def test_refuses_impossible_parameters() -> None:
    """Two numbers, a form that does not exist."""
    wrong: list[tuple[dict[str, object], str]] = [({"count": 1, "share": 0.1}, "share"), ({"index": "e"}, "index")]
    for parameters, field in wrong:
        with pytest.raises(BadParameters) as caught:
            S3Lora.parse(parameters)
        assert caught.value.field == f"s3lora.{field}"
