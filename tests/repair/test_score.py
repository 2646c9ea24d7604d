"""Many adapters in one pass against one by one, and against the dense definition."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from repair.__main__ import main
from repair.checkpoint import Checkpoint
from repair.context import RepairContext
from repair.lora import LayerReference, LoraAdapter
from repair.methods import METHODS
from repair.run import repair_adapter
from repair.score import score_adapters
from tests import tiny
from tests.repair import dense


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny.tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def context(pair: tuple[Path, Path]) -> RepairContext:
    return RepairContext(aligned=Checkpoint.open(pair[0]), base=Checkpoint.open(pair[1]), tile_rows=16)


def several() -> dict[str, LoraAdapter]:
    """Other seeds and ranks; one has a module less, one a module that adds nothing, one a bias."""
    whole = {f"adapter {seed}": tiny.adapter(seed=10 * seed, rank=2 + seed) for seed in range(4)}
    first, *rest = whole["adapter 1"].layers
    whole["adapter 1"] = replace(whole["adapter 1"], layers=tuple(rest))
    first, *rest = whole["adapter 2"].layers
    whole["adapter 2"] = replace(whole["adapter 2"], layers=(first.zeroed(), *rest))
    first, *rest = whole["adapter 3"].layers
    bias = torch.randn(first.shape[0], generator=tiny.generator(5))
    whole["adapter 3"] = replace(whole["adapter 3"], layers=(replace(first, bias=bias), *rest))
    return whole


def test_together_is_one_by_one_up_to_rounding(context: RepairContext) -> None:
    """Whoever else is scored changes no more than the rounding of sums; alone, the scores are those of a repair."""
    adapters = several()
    together = {(one.adapter, one.name): one for one in score_adapters(adapters, context)}

    alone = {(one.adapter, one.name): one for key in adapters for one in score_adapters({key: adapters[key]}, context)}

    assert together.keys() == alone.keys()
    for which, found in together.items():
        one = alone[which]
        assert (found.null, found.reason) == (one.null, one.reason)
        assert [found.score, found.shrink] == [
            None if x is None else pytest.approx(x, rel=1e-6) for x in (one.score, one.shrink)
        ]
    for key, adapter in adapters.items():
        for verdict in repair_adapter(adapter, METHODS["safe_lora"].parse({}), context).verdicts:
            one = alone.pop((key, verdict.name))
            assert (one.score, one.null, one.reason) == (
                verdict.score,
                verdict.null,
                verdict.reason if verdict.score is None else "",
            )
    assert alone == {}


def test_factors_that_cancel_add_nothing(context: RepairContext) -> None:
    """Neither factor is zero, but their product is: there is no cosine."""
    first, *rest = tiny.adapter(rank=2).layers
    b, a = first.b.clone(), first.a.clone()
    b[:, 0], a[1] = 0, 0
    adapter = LoraAdapter(layers=(replace(first, b=b, a=a), *rest))

    found = next(one for one in score_adapters({"one": adapter}, context) if one.name == first.name)

    assert (found.score, found.null, found.shrink) == (None, None, None)
    assert "zero adapter" in found.reason


def test_scores_are_the_dense_cosines(pair: tuple[Path, Path], context: RepairContext) -> None:
    """Of ``V V^T D / |V|`` and ``D``, with the size of the projection."""
    adapters = {"one": tiny.adapter(), "two": tiny.adapter(seed=50, rank=5)}
    for one in score_adapters(adapters, context):
        d = dense.delta(adapters[one.adapter].by_name[one.name])
        projected = dense.published_operator(dense.displacement(*pair, one.name)) @ d
        assert one.score == pytest.approx(dense.cosine(projected, d), rel=1e-5)
        assert one.shrink == pytest.approx(float(projected.norm() / d.norm()), rel=1e-5)


def test_the_weights_are_read_once_for_all(context: RepairContext, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many passes over each weight for four adapters as for one."""
    passes: list[str] = []
    tiles = LayerReference.alignment_tiles

    def counted(self: LayerReference, **how: bool) -> Iterator[Any]:
        passes.append(self.name)
        return tiles(self, **how)

    monkeypatch.setattr(LayerReference, "alignment_tiles", counted)
    list(score_adapters(several(), context))
    many, passes[:] = sorted(passes), []
    list(score_adapters({"one": tiny.adapter()}, context))

    assert many == sorted(passes)


def test_what_alignment_left_alone_says_so(tmp_path: Path) -> None:
    """No cosine is made up."""
    base = tiny.weights()
    folder = tiny.write_checkpoint(tmp_path / "a", base), tiny.write_checkpoint(tmp_path / "b", base)
    context = RepairContext(aligned=Checkpoint.open(folder[0]), base=Checkpoint.open(folder[1]))

    for one in score_adapters({"one": tiny.adapter()}, context):
        assert (one.score, one.null, one.shrink) == (None, None, None)
        assert "alignment did not change this weight" in one.reason


def test_the_command_prints_every_module_of_every_adapter(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under the folder that was named; the same folder twice is an error."""
    folders = [str(tiny.tiny_adapter_dir(tmp_path / f"adapter{seed}", seed=seed)) for seed in (0, 30)]
    models = ["--aligned", str(pair[0]), "--base", str(pair[1]), "--device", "cpu", "--json"]

    code = main(["score", *folders, *models])
    said = json.loads(capsys.readouterr().out)
    wrong = main(["score", folders[0], folders[0], *models])
    problem = json.loads(capsys.readouterr().err)

    torch.use_deterministic_algorithms(mode=False)
    assert (code, wrong, problem["field"]) == (0, 1, "adapters")
    assert {(one["adapter"], one["name"]) for one in said["modules"]} == {
        (f, name) for f in folders for name in tiny.SHAPES
    }
    assert set(said["inputs"]) == {*folders, "aligned", "base"}
    assert all(one["score"] > 0 for one in said["modules"])
