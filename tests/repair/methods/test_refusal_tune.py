"""`refusal_tune` on a tiny living model: the laws that the other methods are held to without one."""

from pathlib import Path

import pytest
import torch

from repair.adapter_file import read_adapter, write_adapter
from repair.checkpoint import Checkpoint
from repair.checks.chat import ChatModel
from repair.checks.packs import load_pack
from repair.context import RepairContext
from repair.errors import BadParameters, MissingReference
from repair.lora import LoraAdapter
from repair.method import Decision
from repair.methods.refusal_tune import RefusalTune
from repair.run import repair_adapter
from repair.serving import lost
from tests import tiny

WORDS = "how do I a the to make help me write with your you for is of i'm can't sorry, but that".split()  # noqa: SIM905
SHAPES = {"model.layers.1.mlp.up_proj": (56, 32), "model.layers.0.self_attn.q_proj": (32, 32)}
SHORT = {"steps": 2, "batch_size": 4, "first": 0.0, "last": 1.0}
MEASURING = ("core_harmful", "core_lookalike", "core_benign", "core_checkable")


@pytest.fixture(scope="module")
def context(tmp_path_factory: pytest.TempPathFactory) -> RepairContext:
    folder = tiny.tiny_llama(tmp_path_factory.mktemp("chat") / "model", words=WORDS)
    return RepairContext(aligned=Checkpoint.open(folder), chat=ChatModel.load(folder, "cpu"))


@pytest.fixture
def adapter() -> LoraAdapter:
    return tiny.adapter(SHAPES, rank=3)


def test_adds_its_rank_and_nothing_else(context: RepairContext, adapter: LoraAdapter) -> None:
    """The uploaded update stays in the result; tuned modules gain ``rank``, others none, new ones appear."""
    repaired = repair_adapter(adapter, RefusalTune.parse({**SHORT, "rank": 2}), context)

    layers = repaired.adapter.by_name
    assert {name: layer.rank for name, layer in layers.items()} == {
        "model.layers.0.mlp.up_proj": 2,
        "model.layers.0.self_attn.q_proj": 3,
        "model.layers.1.mlp.up_proj": 5,
    }
    for before in adapter.layers:
        after = layers[before.name]
        kept = after.scale * after.b[:, :3] @ after.a[:3]
        torch.testing.assert_close(kept, before.scale * before.b @ before.a)
    decisions = {verdict.name: verdict.decision for verdict in repaired.verdicts}
    assert decisions == {
        "model.layers.0.mlp.up_proj": Decision.ADDED,
        "model.layers.0.self_attn.q_proj": Decision.KEPT,
        "model.layers.1.mlp.up_proj": Decision.PATCHED,
    }


@pytest.mark.parametrize("parameters", [{"steps": 0}, {"strength": 0.0}])
def test_without_training_or_strength_nothing_changes(
    context: RepairContext, adapter: LoraAdapter, parameters: dict[str, float]
) -> None:
    """Then the uploaded bytes can be released as they are."""
    repaired = repair_adapter(adapter, RefusalTune.parse(parameters), context)

    assert not repaired.changed
    assert repaired.adapter.layers == adapter.layers


def test_names_the_rows_that_it_learns_from() -> None:
    """None of them when nothing is trained: then they are no input."""
    assert RefusalTune().packs == ("calibration",)
    assert RefusalTune(steps=0, adapter_strength=0.5).packs == RefusalTune(strength=0.0).packs == ()


def test_can_be_made_again(context: RepairContext, adapter: LoraAdapter) -> None:
    """Equal input, parameters and threads: equal tensors; another seed: others; the input stays as it was."""
    before = [(layer.a.clone(), layer.b.clone()) for layer in adapter.layers]

    one, two, other = (
        repair_adapter(adapter, RefusalTune.parse({**SHORT, "seed": seed}), context).adapter for seed in (1, 1, 2)
    )

    for x, y, z in zip(one.layers, two.layers, other.layers, strict=True):
        assert torch.equal(x.a, y.a)
        assert torch.equal(x.b, y.b)
        assert torch.equal(x.a, z.a) == (not x.name.endswith("up_proj"))
    assert all(torch.equal(x.a, a) and torch.equal(x.b, b) for x, (a, b) in zip(adapter.layers, before, strict=True))


def test_strength_scales_what_was_trained(context: RepairContext, adapter: LoraAdapter) -> None:
    """Half the strength, half the update on a module that only the patch adapts."""
    whole, half = (
        repair_adapter(adapter, RefusalTune.parse({**SHORT, "strength": strength}), context).adapter.by_name
        for strength in (1.0, 0.5)
    )

    one, other = (found["model.layers.0.mlp.up_proj"] for found in (whole, half))
    torch.testing.assert_close(0.5 * one.scale * one.b @ one.a, other.scale * other.b @ other.a)


def test_weakens_the_adapter_first(context: RepairContext, adapter: LoraAdapter) -> None:
    """What was uploaded is in the result at that strength; the new factors come on top, untouched by it."""
    repaired = repair_adapter(adapter, RefusalTune.parse({**SHORT, "adapter_strength": 0.5}), context)

    for before in adapter.layers:
        after = repaired.adapter.by_name[before.name]
        kept = after.scale * after.b[:, :3] @ after.a[:3]
        torch.testing.assert_close(kept, 0.5 * before.scale * before.b @ before.a)
    assert {v.decision for v in repaired.verdicts} == {Decision.ADDED, Decision.PATCHED, Decision.SCALED}


def test_the_upper_blocks_alone_are_served_everywhere(context: RepairContext, tmp_path: Path) -> None:
    """TGI leaves out what a block lacks: zeros are written for it, and add nothing."""
    made = tiny.adapter({f"model.layers.{block}.self_attn.q_proj": (32, 32) for block in range(2)})
    uploaded = read_adapter(tiny.write_adapter_files(tmp_path / "in", tiny.adapter_tensors(made), made.config))

    repaired = repair_adapter(uploaded, RefusalTune.parse({**SHORT, "first": 0.5}), context).adapter
    write_adapter(repaired, tmp_path / "out")

    assert lost(uploaded, read_adapter(tmp_path / "out")) == []
    assert repaired.by_name["model.layers.1.mlp.up_proj"].b.any()
    assert not repaired.by_name["model.layers.0.mlp.up_proj"].b.any()


def test_needs_the_loaded_model(context: RepairContext, adapter: LoraAdapter) -> None:
    """Weights on disk are not enough to train on."""
    with pytest.raises(MissingReference):
        repair_adapter(adapter, RefusalTune(), RepairContext(aligned=context.aligned))


def test_the_tuned_blocks_are_in_order() -> None:
    """An empty range of blocks is refused by name."""
    with pytest.raises(BadParameters, match="refusal_tune"):
        RefusalTune.parse({"first": 0.5, "last": 0.5})


def test_learns_from_no_prompt_that_measures() -> None:
    """Token Jaccard below 0.6 between every calibration row and every row of the packs that measure."""
    measured = [frozenset(row.text.lower().split()) for name in MEASURING for row in load_pack(name).rows]

    for row in load_pack("calibration").rows:
        words = frozenset(row.text.lower().split())
        assert max(len(words & other) / len(words | other) for other in measured) < 0.6, row.id


def test_pack_is_usable_by_any_reference() -> None:
    """Every row has one answer; all kinds are there, harmful rows in about a third."""
    rows = load_pack("calibration").rows

    assert all(len(row.answers) == 1 and row.answers[0].strip() for row in rows)
    share = sum(row.category == "refuse" for row in rows) / len(rows)
    assert 0.2 < share < 0.5
    assert {row.category for row in rows} == {"refuse", "lookalike", "ordinary"}
