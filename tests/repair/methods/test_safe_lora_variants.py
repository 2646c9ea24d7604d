"""What `safe_lora` offers beyond the paper, against whole matrices: sizes, adaptive steps, the ratio to the null."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from repair.checkpoint import Checkpoint
from repair.context import RepairContext
from repair.errors import BadParameters
from repair.lora import LayerReference, LoraAdapter
from repair.method import Decision
from repair.methods.safe_lora import SafeLora
from repair.operator_norm import published_norm
from repair.run import LayerVerdict, Repaired, repair_adapter
from tests import tiny
from tests.repair import dense, refactored

UP = "model.layers.0.mlp.up_proj"
ALL = {"threshold": 1.0}
VARIANTS: list[dict[str, Any]] = [
    {**ALL, "unit_norm": True},
    {**ALL, "norm_share": 0.4},
    {**ALL, "mode": "truncated", "rank": 3, "norm_share": 0.9},
    {"mode": "soft", "rank": 3, "strength": 1.0, "adaptive": True, "ratio": 2.0},
    {"ratio_count": 3},
    {**ALL, "mode": "closest", "rank": 3, "penalty": 2.0, "norm_share": 0.5},
    {**ALL, "mode": "truncated", "rank": 8, "energy": 0.8},
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny.tiny_pair(tmp_path_factory.mktemp("pair"))


def context(pair: tuple[Path, Path]) -> RepairContext:
    aligned, base = pair
    return RepairContext(aligned=Checkpoint.open(aligned), base=Checkpoint.open(base), tile_rows=16)


def run(pair: tuple[Path, Path], adapter: LoraAdapter | None = None, **parameters: object) -> Repaired:
    return repair_adapter(adapter or tiny.adapter(), SafeLora.parse(parameters), context(pair))


def projected(repaired: Repaired) -> set[str]:
    return {verdict.name for verdict in repaired.verdicts if verdict.decision is Decision.PROJECTED}


def ratio(verdict: LayerVerdict) -> float:
    assert verdict.score is not None
    assert verdict.null is not None
    return verdict.score / verdict.null


def test_unit_norm_divides_the_operator_by_its_spectral_norm(pair: tuple[Path, Path]) -> None:
    """``V V^T D / sigma_1(V)^2``; cosines and the choice are those of the published operator."""
    adapter = tiny.adapter()

    repaired = run(pair, adapter, **ALL, unit_norm=True)

    for layer in repaired.adapter.layers:
        v, d = dense.displacement(*pair, layer.name), dense.delta(adapter.by_name[layer.name])
        wanted = v @ (v.T @ d) / torch.linalg.svdvals(v)[0] ** 2
        assert dense.relative(dense.delta(layer), wanted) < 1e-3
        assert float(dense.delta(layer).norm()) <= float(d.norm())
    plain = run(pair, adapter, **ALL)
    assert [v.score for v in repaired.verdicts] == [v.score for v in plain.verdicts]


def test_unit_norm_keeps_the_strongest_direction_as_it_is(pair: tuple[Path, Path]) -> None:
    """An update along the first singular vector passes; the published operator gives it another size."""
    v = dense.displacement(*pair, UP)
    u = torch.linalg.svd(v).U[:, :1].float()
    layer = tiny.layer(UP, rank=1)
    along = LoraAdapter(layers=(replace(layer, b=u),))

    unit, published = (run(pair, along, **ALL, unit_norm=unit).verdicts[0].shrink for unit in (True, False))

    assert unit == pytest.approx(1.0, rel=1e-3)
    assert published == pytest.approx(float(torch.linalg.svdvals(v)[0] ** 2 / v.norm()), rel=1e-3)
    assert published != pytest.approx(1.0, rel=0.05)


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


def reference(v: torch.Tensor) -> LayerReference:
    base = torch.randn(v.shape, generator=tiny.generator(9))
    return LayerReference(name="w", aligned=InMemory(base + v), base=InMemory(base), tile_rows=16)


@pytest.mark.parametrize("shape", [(97, 53), (53, 97), (11, 7), (1, 9), (300, 200)])
@pytest.mark.parametrize("kind", ["noise", "one direction"])
def test_the_spectral_norm_is_found_without_the_operator(shape: tuple[int, int], kind: str) -> None:
    """From below, and close, even where no direction stands out; asked once for each weight."""
    source = tiny.generator(4)
    v = torch.randn(shape, generator=source) * 0.1
    if kind == "one direction":
        v = v * 0.01 + torch.randn(shape[0], 1, generator=source) @ torch.randn(1, shape[1], generator=source)
    made = reference(v)
    seen = made.aligned.values.double() - made.base.values.double()  # type: ignore[union-attr] # see above
    wanted = float(torch.linalg.matrix_norm(dense.published_operator(seen), 2))

    found = published_norm(made)

    assert found == pytest.approx(wanted, rel=5e-3)
    assert found <= wanted * (1 + 1e-5)
    made.remembered["published_norm"] = 2 * found
    assert published_norm(made) == 2 * found


def test_the_spectral_norm_of_no_displacement_is_zero() -> None:
    """Not 0/0."""
    assert published_norm(reference(torch.zeros(9, 5))) == 0.0


@pytest.mark.parametrize("share", [1.0, 0.3])
@pytest.mark.parametrize("mode", ["paper", "truncated", "soft"])
def test_norm_share_keeps_the_direction_and_sets_the_size(pair: tuple[Path, Path], mode: str, share: float) -> None:
    """The edited update, brought to ``share`` of the uploaded norm whatever the mode did to its size."""
    adapter, chosen = tiny.adapter(), {**ALL, "mode": mode, "rank": 3}
    plain = run(pair, adapter, **chosen).adapter.by_name

    for layer in run(pair, adapter, **chosen, norm_share=share).adapter.layers:
        d = dense.delta(plain[layer.name])
        wanted = d * (share * dense.delta(adapter.by_name[layer.name]).norm() / d.norm())
        assert dense.relative(dense.delta(layer), wanted) < 1e-5


def test_norm_share_counts_the_bias(pair: tuple[Path, Path]) -> None:
    """It is part of the update, so it has a part of the norm."""
    layer = tiny.layer(UP, bias=torch.randn(97, generator=tiny.generator(8)))

    verdict = run(pair, LoraAdapter(layers=(layer,)), **ALL, norm_share=0.5).verdicts[0]

    assert verdict.shrink == pytest.approx(0.5, rel=1e-5)


def test_norm_share_cannot_bring_back_what_is_gone(tmp_path: Path) -> None:
    """An update outside what alignment changed is projected to nothing, and nothing is not rescaled to NaN."""
    base = {f"{UP}.weight": torch.randn(97, 53, generator=tiny.generator(0))}
    moved = base[f"{UP}.weight"].clone()
    moved[:3] += 1.0
    folders = (
        tiny.write_checkpoint(tmp_path / "a", {f"{UP}.weight": moved}),
        tiny.write_checkpoint(tmp_path / "b", base),
    )
    b = torch.zeros(97, 3)
    b[10:] = 0.1
    layer = replace(tiny.layer(UP), b=b)

    found = run(folders, LoraAdapter(layers=(layer,)), **ALL, norm_share=1.0)

    assert not found.adapter.layers[0].b.any()
    assert found.verdicts[0].shrink == 0


@pytest.mark.parametrize("strength", [0.4, 1.0])
def test_adaptive_steps_are_as_long_as_the_cosine_is_low(pair: tuple[Path, Path], strength: float) -> None:
    """``strength * max(0, 1 - rho / null)`` of the way to the projection; none at the null or above."""
    adapter = tiny.adapter()

    repaired = run(pair, adapter, **ALL, mode="soft", rank=3, strength=strength, adaptive=True)

    steps = []
    for layer, verdict in zip(repaired.adapter.layers, repaired.verdicts, strict=True):
        d = dense.delta(adapter.by_name[layer.name])
        inside = dense.truncated_projector(dense.displacement(*pair, layer.name), 3) @ d
        assert verdict.null is not None
        steps.append(strength * max(0.0, 1.0 - dense.cosine(inside, d) / verdict.null))
        assert dense.relative(dense.delta(layer), d - steps[-1] * (d - inside)) < 1e-3
        if steps[-1] == 0:
            assert layer is adapter.by_name[layer.name]
            assert verdict.decision is Decision.KEPT
            assert "null" in verdict.reason
    assert min(steps) == 0 < max(steps)  # both kinds of modules were seen


def test_ratio_takes_modules_at_or_below_it(pair: tuple[Path, Path]) -> None:
    """The score stays the cosine; what is compared is its quotient with the null of that weight."""
    ratios = {verdict.name: ratio(verdict) for verdict in run(pair, count=0).verdicts}
    edge = sorted(ratios.values())[3]

    repaired = run(pair, ratio=edge)

    assert projected(repaired) == {name for name, value in ratios.items() if value <= edge}
    assert [ratio(verdict) for verdict in repaired.verdicts] == list(ratios.values())
    assert all("times its null" in v.reason for v in repaired.verdicts if v.decision is Decision.KEPT)


@pytest.mark.parametrize("count", [0, 1, 4, 8])
def test_ratio_count_takes_the_lowest_ratios(pair: tuple[Path, Path], count: int) -> None:
    """Exactly that many."""
    verdicts = run(pair, ratio_count=count).verdicts
    ranked = sorted(verdicts, key=ratio)

    assert {v.name for v in verdicts if v.decision is Decision.PROJECTED} == {v.name for v in ranked[:count]}


def test_the_ratio_ranks_otherwise_than_the_cosine(pair: tuple[Path, Path]) -> None:
    """The null differs between modules; were the orders the same, the tests above would prove nothing."""
    verdicts = run(pair, count=0).verdicts

    assert sorted(verdicts, key=ratio) != sorted(verdicts, key=lambda v: v.score or 0.0)


def test_a_projector_that_keeps_the_size_is_still_idempotent(pair: tuple[Path, Path]) -> None:
    """A second run finds everything inside already."""
    chosen: dict[str, Any] = {**ALL, "mode": "truncated", "rank": 5, "norm_share": 1.0}
    once = run(pair, **chosen).adapter

    for layer in run(pair, once, **chosen).adapter.layers:
        torch.testing.assert_close(layer.b, once.by_name[layer.name].b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("parameters", VARIANTS)
def test_other_factors_of_the_same_update_give_the_same_repair(
    pair: tuple[Path, Path], parameters: dict[str, Any]
) -> None:
    """Every variant acts on the update."""
    one = run(pair, **parameters)
    two = run(pair, refactored.adapter(tiny.adapter()), **parameters)

    assert projected(one) == projected(two)
    for layer in one.adapter.layers:
        assert dense.relative(dense.delta(two.adapter.by_name[layer.name]), dense.delta(layer)) < 1e-4


def sides(pair: tuple[Path, Path], name: str, kept: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Projectors onto the leading left and right singular vectors of the whole displacement."""
    u, _, vh = torch.linalg.svd(dense.displacement(*pair, name), full_matrices=False)
    return u[:, :kept] @ u[:, :kept].T, vh[:kept].T @ vh[:kept]


@pytest.mark.parametrize("penalty", [0.3, 4.0])
def test_the_closest_update_minimises_its_penalised_distance(pair: tuple[Path, Path], penalty: float) -> None:
    """The closed form, and no small step away from it costs less."""
    adapter = tiny.adapter()
    repaired = run(pair, adapter, **ALL, mode="closest", rank=3, penalty=penalty)
    step = 1e-3

    for layer, verdict in zip(repaired.adapter.layers, repaired.verdicts, strict=True):
        d, x = dense.delta(adapter.by_name[layer.name]), dense.delta(layer)
        p, q = sides(pair, layer.name, 3)
        in_p, in_q = torch.eye(len(p), dtype=torch.float64) - p, torch.eye(len(q), dtype=torch.float64) - q

        def cost(x: torch.Tensor) -> float:
            mixed = (p @ x @ in_q).square().sum() + (in_p @ x @ q).square().sum()  # noqa: B023 - used at once
            outside = ((1 + penalty) ** 2 - 1) * (in_p @ x @ in_q).square().sum()  # noqa: B023 - used at once
            return float((x - d).square().sum() + penalty * mixed + outside)  # noqa: B023 - used at once

        c = 1 / (1 + penalty)
        assert dense.relative(x, (p + c * in_p) @ d @ (q + c * in_q)) < 1e-3
        assert layer.rank == adapter.by_name[layer.name].rank
        assert verdict.score == pytest.approx(dense.cosine(p @ d, d), rel=1e-3)
        least = cost((p + c * in_p) @ d @ (q + c * in_q))
        assert cost(x) == pytest.approx(least, rel=1e-4)
        for seed in range(3):
            away = torch.randn(d.shape, generator=tiny.generator(seed), dtype=torch.float64)
            assert cost(x + step * away * d.norm() / away.norm()) > least


@pytest.mark.parametrize("share", [0.5, 0.9])
@pytest.mark.parametrize("mode", ["truncated", "soft", "closest"])
def test_energy_keeps_as_many_directions_as_hold_it(pair: tuple[Path, Path], mode: str, share: float) -> None:
    """As if that rank had been asked for, module by module."""
    adapter, ranks = tiny.adapter(), set()
    repaired = run(pair, adapter, **ALL, mode=mode, rank=16, energy=share)
    for layer in repaired.adapter.layers:
        values = torch.linalg.svdvals(dense.displacement(*pair, layer.name)).square()
        kept = min(16, int((values.cumsum(0) < share * values.sum()).sum()) + 1)
        alone = LoraAdapter(layers=(adapter.by_name[layer.name],), config=adapter.config)
        wanted = run(pair, alone, **ALL, mode=mode, rank=kept).adapter.layers[0]
        assert dense.relative(dense.delta(layer), dense.delta(wanted)) < 1e-2
        ranks.add(kept)
    assert len(ranks) > 1 or max(ranks) < 16


def test_refuses_impossible_parameters() -> None:
    """Two rules, an option without effect in its mode, two sizes."""
    wrong: list[dict[str, object]] = [
        {"threshold": 0.3, "ratio": 1.0},
        {"count": 3, "ratio_count": 3},
        {"ratio": 1.0, "ratio_count": 3},
        {"ratio": -1.0},
        {"adaptive": True},
        {"adaptive": True, "mode": "truncated"},
        {"unit_norm": True, "mode": "soft"},
        {"unit_norm": True, "norm_share": 1.0},
        {"norm_share": 0.0},
        {"norm_share": 1.5},
        {"penalty": 1.0},
        {"penalty": 1.0, "mode": "soft"},
        {"penalty": 0.0, "mode": "closest"},
        {"energy": 0.9},
        {"energy": 0.0, "mode": "truncated"},
    ]
    for parameters in wrong:
        with pytest.raises(BadParameters) as caught:
            SafeLora.parse(parameters)
        assert caught.value.field.startswith("safe_lora.")
