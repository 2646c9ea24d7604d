"""`scale` and `patch`: exact where they promise to be."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repair.checkpoint import Checkpoint
from repair.context import RepairContext
from repair.errors import MissingReference, MissingWeight
from repair.lora import LoraAdapter
from repair.method import Decision
from repair.methods import METHODS
from repair.run import repair_adapter
from tests import tiny
from tests.repair import dense

UP = "model.layers.0.mlp.up_proj"


@settings(deadline=None)  # the first call pays for the imports of others
@given(strength=st.floats(0, 1, allow_subnormal=False), seed=st.integers(0, 50))
def test_scale_is_the_line_to_the_aligned_model(strength: float, seed: int) -> None:
    """``strength * D``, bias included, A untouched."""
    layer = tiny.layer(UP, seed=seed, bias=torch.randn(97, generator=tiny.generator(seed)))
    method = METHODS["scale"].parse({"strength": strength})

    found = repair_adapter(LoraAdapter(layers=(layer,)), method, RepairContext()).adapter.layers[0]

    torch.testing.assert_close(dense.delta(found), strength * dense.delta(layer), rtol=1e-6, atol=1e-8)
    assert found.bias is not None
    assert layer.bias is not None
    torch.testing.assert_close(found.bias, strength * layer.bias)
    assert found.a is layer.a


def test_scale_touches_only_the_modules_of_its_pattern() -> None:
    """Per module; the others are the same objects."""
    adapter = tiny.adapter()
    method = METHODS["scale"].parse({"strength": 0.5, "modules": "*.mlp.*"})

    repaired = repair_adapter(adapter, method, RepairContext())

    for verdict in repaired.verdicts:
        touched = ".mlp." in verdict.name
        assert (verdict.decision is Decision.SCALED) is touched
        assert touched or repaired.adapter.by_name[verdict.name] is adapter.by_name[verdict.name]


def test_patch_adds_exactly_the_patch(tmp_path: Path) -> None:
    """``D + strength * D_p`` from a folder, with modules that only one of the two has."""
    adapter = tiny.adapter()
    names = dict(list(tiny.SHAPES.items())[:3])
    patch = tiny.adapter(names, rank=2, seed=60, scale=1.5)
    folder = tiny.write_adapter_files(tmp_path / "patch", tiny.adapter_tensors(patch), patch.config)
    method = METHODS["patch"].parse({"patch": str(folder), "strength": 0.5})

    repaired = repair_adapter(adapter, method, RepairContext())

    for layer, verdict in zip(repaired.adapter.layers, repaired.verdicts, strict=True):
        wanted = dense.delta(adapter.by_name[layer.name])
        if layer.name in names:
            wanted = wanted + 0.5 * dense.delta(patch.by_name[layer.name])
        assert dense.relative(dense.delta(layer), wanted) < 1e-6
        assert verdict.decision is (Decision.PATCHED if layer.name in names else Decision.KEPT)


def test_patch_may_bring_modules_of_the_model_only(tmp_path: Path) -> None:
    """New modules are listed; a module that the aligned model does not have is an error."""
    aligned, _ = tiny.tiny_pair(tmp_path)
    context = RepairContext(aligned=Checkpoint.open(aligned), patch=tiny.adapter({UP: (97, 53)}, seed=70))
    adapter = tiny.adapter({"model.layers.0.self_attn.q_proj": (61, 53)})

    repaired = repair_adapter(adapter, METHODS["patch"](), context)

    assert [v.decision for v in repaired.verdicts] == [Decision.ADDED, Decision.KEPT]
    strange = RepairContext(aligned=context.aligned, patch=tiny.adapter({"model.elsewhere": (97, 53)}))
    with pytest.raises(MissingWeight):
        repair_adapter(adapter, METHODS["patch"](), strange)


def test_patch_without_a_patch_says_what_is_missing() -> None:
    """An error by name."""
    with pytest.raises(MissingReference) as caught:
        repair_adapter(tiny.adapter(), METHODS["patch"](), RepairContext())
    assert caught.value.field == "patch"


def test_a_local_path_is_not_offered_over_http() -> None:
    """A folder means something on this machine only."""
    assert set(METHODS["patch"].catalogue_entry()["parameters"]["properties"]) == {"strength", "decouple"}


def test_progress_ends_at_one() -> None:
    """Every module is told, in order."""
    seen: list[float] = []

    repair_adapter(tiny.adapter(), METHODS["scale"](), RepairContext(progress=lambda _, share: seen.append(share)))

    assert seen == sorted(seen)
    assert len(seen) == len(tiny.SHAPES)
    assert seen[-1] == 1.0
