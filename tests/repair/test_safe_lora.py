"""Safe LoRA against its definition, written out with whole matrices in float64."""

from pathlib import Path

import pytest
import torch

from repair.alignment import gaussian_probe
from repair.checkpoint import Checkpoint
from repair.context import RepairContext
from repair.errors import BadParameters, MissingReference
from repair.lora import LayerKind, LoraAdapter
from repair.method import Decision
from repair.methods import METHODS
from repair.run import Repaired, repair_adapter
from tests import tiny
from tests.repair import dense

UP = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny.tiny_pair(tmp_path_factory.mktemp("pair"))


def context(pair: tuple[Path, Path], tile_rows: int = 16) -> RepairContext:
    aligned, base = pair
    return RepairContext(aligned=Checkpoint.open(aligned), base=Checkpoint.open(base), tile_rows=tile_rows)


def run(pair: tuple[Path, Path], adapter: LoraAdapter | None = None, **parameters: object) -> Repaired:
    return repair_adapter(adapter or tiny.adapter(), METHODS["safe_lora"].parse(parameters), context(pair))


def test_paper_mode_is_the_published_operator(pair: tuple[Path, Path]) -> None:
    """``B <- V V^T B / |V|``, cosine of flattened matrices, A untouched, for every shape of module."""
    adapter = tiny.adapter()

    repaired = run(pair, adapter, threshold=1.0)

    for layer, verdict in zip(repaired.adapter.layers, repaired.verdicts, strict=True):
        uploaded = adapter.by_name[layer.name]
        d = dense.delta(uploaded)
        wanted = dense.published_operator(dense.displacement(*pair, layer.name)) @ d
        assert dense.relative(dense.delta(layer), wanted) < 1e-5
        assert torch.equal(layer.a, uploaded.a)
        assert verdict.score == pytest.approx(dense.cosine(wanted, d), rel=1e-5)
        assert verdict.shrink == pytest.approx(float(wanted.norm() / d.norm()), rel=1e-5)
        assert verdict.decision is Decision.PROJECTED


def test_null_is_the_cosine_of_an_update_without_preference(pair: tuple[Path, Path]) -> None:
    """The dense operator on the fixed probe; near theory for Gaussian columns; the same for any adapter."""
    repaired, other = run(pair), run(pair, tiny.adapter(seed=40, rank=2))

    for verdict in repaired.verdicts:
        v = dense.displacement(*pair, verdict.name)
        probe = gaussian_probe(v.shape[0]).double()
        squares = torch.linalg.svdvals(v).square()
        theory = float(squares.sum() / (v.shape[0] * squares.square().sum()).sqrt())
        assert verdict.null == pytest.approx(dense.cosine(dense.published_operator(v) @ probe, probe), rel=1e-5)
        assert verdict.null == pytest.approx(theory, rel=0.5)
    assert [v.null for v in other.verdicts] == pytest.approx([v.null for v in repaired.verdicts], rel=1e-6)


def test_truncated_mode_projects_onto_the_top_singular_vectors(pair: tuple[Path, Path]) -> None:
    """``P_k D``; the cosine is the root of the energy inside."""
    adapter = tiny.adapter()

    repaired = run(pair, adapter, mode="truncated", rank=3, threshold=1.0)

    for layer, verdict in zip(repaired.adapter.layers, repaired.verdicts, strict=True):
        d = dense.delta(adapter.by_name[layer.name])
        wanted = dense.truncated_projector(dense.displacement(*pair, layer.name), 3) @ d
        assert dense.relative(dense.delta(layer), wanted) < 1e-3
        assert verdict.score == pytest.approx(float(wanted.norm() / d.norm()), rel=1e-3)


@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_soft_mode_goes_part_of_the_way(pair: tuple[Path, Path], strength: float) -> None:
    """``D - strength (D - P_k D)``."""
    adapter = tiny.adapter()

    repaired = run(pair, adapter, mode="soft", rank=3, strength=strength, threshold=1.0)

    for layer in repaired.adapter.layers:
        d = dense.delta(adapter.by_name[layer.name])
        projected = dense.truncated_projector(dense.displacement(*pair, layer.name), 3) @ d
        assert dense.relative(dense.delta(layer), d - strength * (d - projected)) < 1e-3


def test_soft_mode_of_strength_zero_changes_nothing(pair: tuple[Path, Path]) -> None:
    """Not by a bit."""
    assert not run(pair, mode="soft", strength=0.0, threshold=1.0).changed


def test_threshold_takes_modules_at_or_below_it(pair: tuple[Path, Path]) -> None:
    """At most, as in the reference code; the others keep their bits and say why."""
    scores = {verdict.name: verdict.score or 0.0 for verdict in run(pair).verdicts}
    edge = sorted(scores.values())[3]
    adapter = tiny.adapter()

    repaired = run(pair, adapter, threshold=edge)

    for verdict in repaired.verdicts:
        chosen = scores[verdict.name] <= edge
        assert (verdict.decision is Decision.PROJECTED) is chosen
        assert chosen or repaired.adapter.by_name[verdict.name] is adapter.by_name[verdict.name]
        assert chosen or "would have kept" in verdict.reason


@pytest.mark.parametrize("count", [0, 1, 5, 8])
def test_count_takes_that_many_of_the_lowest(pair: tuple[Path, Path], count: int) -> None:
    """Exactly that many."""
    verdicts = run(pair, count=count).verdicts
    chosen = {v.name for v in verdicts if v.decision is Decision.PROJECTED}
    ranked = sorted(verdicts, key=lambda v: v.score or 0.0)

    assert chosen == {v.name for v in ranked[:count]}


def test_default_is_the_published_threshold(pair: tuple[Path, Path]) -> None:
    """0.35."""
    assert run(pair).verdicts == run(pair, threshold=0.35).verdicts


def test_tiles_do_not_change_the_numbers(pair: tuple[Path, Path]) -> None:
    """One row at a time or all at once."""
    method = METHODS["safe_lora"].parse({"threshold": 1.0})
    one, all_ = (repair_adapter(tiny.adapter(), method, context(pair, rows)) for rows in (1, 4096))

    for layer in one.adapter.layers:
        torch.testing.assert_close(layer.b, all_.adapter.by_name[layer.name].b, rtol=1e-4, atol=1e-6)


def test_a_zero_module_is_unjudged_not_nan(pair: tuple[Path, Path]) -> None:
    """0/0 is no cosine."""
    adapter = tiny.adapter()
    zero = LoraAdapter(layers=(adapter.layers[0].zeroed(), *adapter.layers[1:]), config=adapter.config)

    verdict = run(pair, zero, threshold=1.0).verdicts[0]

    assert (verdict.decision, verdict.score) == (Decision.UNJUDGED, None)
    assert "zero adapter" in verdict.reason


@pytest.mark.parametrize("mode", ["paper", "truncated"])
def test_a_weight_that_alignment_left_alone_is_unjudged(tmp_path: Path, mode: str) -> None:
    """The operator is undefined; the module is kept and says so, and does not count among the lowest."""
    base = tiny.weights()
    aligned = tiny.aligned_from(base)
    aligned[f"{UP}.weight"] = base[f"{UP}.weight"]
    folders = (tiny.write_checkpoint(tmp_path / "a", aligned), tiny.write_checkpoint(tmp_path / "b", base))

    repaired = run(folders, mode=mode, count=7)

    decisions = {verdict.name: verdict.decision for verdict in repaired.verdicts}
    assert decisions.pop(UP) is Decision.UNJUDGED
    assert set(decisions.values()) == {Decision.PROJECTED}


def test_a_bias_is_projected_with_its_module(pair: tuple[Path, Path]) -> None:
    """``lora_B.bias`` is part of the update: the same operator acts on it."""
    bias = torch.randn(97, generator=tiny.generator(8))
    adapter = LoraAdapter(layers=(tiny.layer(UP, bias=bias),))

    layer = run(pair, adapter, threshold=1.0).adapter.layers[0]

    assert layer.bias is not None
    operator = dense.published_operator(dense.displacement(*pair, UP))
    assert dense.relative(layer.bias, operator @ bias.double()) < 1e-5


def test_embeddings_are_projected_on_the_side_of_the_model_width(tmp_path: Path) -> None:
    """Dim x dim, not vocabulary x vocabulary."""
    name = "model.embed_tokens"
    folders = tiny.tiny_pair(tmp_path, shapes={name: (131, 53)})
    layer = tiny.layer(name, (53, 131), kind=LayerKind.EMBEDDING, transposed=True)

    found = run(folders, LoraAdapter(layers=(layer,)), threshold=1.0).adapter.layers[0]

    v = dense.displacement(*folders, name).T
    assert dense.relative(dense.delta(found), dense.published_operator(v) @ dense.delta(layer)) < 1e-5


def test_transposed_weights_give_the_same_result(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """fan_in_fan_out: the same model stored the other way round."""
    turned = []
    for folder in pair:
        stored = {key: tensor.T.to(torch.bfloat16) for key, tensor in dense.model(folder).items()}
        turned.append(tiny.write_checkpoint(tmp_path / folder.name, stored))
    layer = tiny.layer(UP, transposed=True)
    straight = tiny.layer(UP)

    one = run((turned[0], turned[1]), LoraAdapter(layers=(layer,)), threshold=1.0).adapter.layers[0]
    two = run(pair, LoraAdapter(layers=(straight,)), threshold=1.0).adapter.layers[0]

    torch.testing.assert_close(one.b, two.b, rtol=1e-4, atol=1e-6)


def test_refuses_impossible_parameters() -> None:
    """Both rules, unknown names, values out of range: named by field."""
    method = METHODS["safe_lora"]
    wrong: list[tuple[dict[str, object], str]] = [
        ({"threshold": 0.3, "count": 3}, "count"),
        ({"tau": 0.3}, "tau"),
        ({"count": -1}, "count"),
        ({"mode": "exact"}, "mode"),
        ({"threshold": float("nan")}, "threshold"),
    ]
    for parameters, field in wrong:
        with pytest.raises(BadParameters) as caught:
            method.parse(parameters)
        assert field in caught.value.field


def test_needs_both_models(pair: tuple[Path, Path]) -> None:
    """Without the base there is no alignment to look at."""
    method = METHODS["safe_lora"]()
    with pytest.raises(MissingReference) as caught:
        repair_adapter(tiny.adapter(), method, RepairContext(aligned=Checkpoint.open(pair[0])))
    assert caught.value.field == "base"
