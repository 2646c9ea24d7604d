"""Gradients on the way to an adapter: those of a model whose weights are really there, by autograd in float64."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from repair.calibration import Calibration
from repair.checks.packs import Prompt, load_pack, ordered
from repair.context import RepairContext
from repair.errors import BadParameters, MissingReference
from repair.first_order import adapter_damage
from repair.lora import LoraAdapter, LoraLayer
from repair.method import Decision
from repair.methods import METHODS
from repair.run import Repaired, repair_adapter
from repair.slopes import Slope, on_the_way
from tests.repair import dense, families
from tests.repair.calibrated import refactored
from tests.repair.living_families import SETTINGS, World

pytestmark = [
    pytest.mark.usefixtures("threads"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*did not match any targeted module.*"),  # it does not look at parameters
]
Worlds = Callable[[str], World]
PROMPTS = SETTINGS.gradient_prompts
HALF = Slope(at=0.5, prompts=PROMPTS)
HEARD = ("llama", "qwen2", "phi3", "gpt2", "mixtral", "gpt_oss", "llama4")
"""Plain, with biases, with fused linears, turned round, and with experts of three kinds."""


def merged(world: World, adapter: LoraAdapter) -> Any:
    """The model in float64, every update added to its weights."""
    model = copy.deepcopy(world.model)
    if world.family in families.FUSED:
        model.set_experts_implementation("eager")  # the others know no float64
    for layer in adapter.layers:
        families.merge(model, layer)
    return model.double().requires_grad_()


def loss(world: World, model: Any, row: Prompt) -> Tensor:
    """Of refusing, spelt out."""
    tokenizer = world.chat.tokenizer
    question = world.chat.encode(row.text)
    message = [{"role": "user", "content": row.text}, {"role": "assistant", "content": row.answers[0]}]
    ids = tokenizer.encode(tokenizer.apply_chat_template(message, tokenize=False), add_special_tokens=False)
    logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return -torch.stack([logs[at - 1, ids[at]] for at in range(len(question), len(ids))]).mean()


def mean_loss(world: World, adapter: LoraAdapter) -> float:
    model = merged(world, adapter)
    with torch.no_grad():
        return sum(share * float(loss(world, model, row)) for share, row in asked(world))


def asked(world: World, *, contrast: bool = False) -> list[tuple[float, Prompt]]:
    """Refusals of harmful prompts and, for a contrast, the same refusals of look-alikes with the other sign."""
    refused = world.rows.harmful[:PROMPTS]
    found = [(1 / PROMPTS, row) for row in refused]
    if contrast:
        others = ordered((row for row in load_pack("calibration").rows if row.category == "lookalike"), seed=0)
        found += [(-1 / PROMPTS, replace(others[at], answers=row.answers)) for at, row in enumerate(refused)]
    return found


def slopes(world: World, adapter: LoraAdapter, *, contrast: bool = False) -> Callable[[LoraLayer], Tensor]:
    """The gradient of the mean loss with respect to the weight of a layer, out x in."""
    model = merged(world, adapter)
    for share, row in asked(world, contrast=contrast):
        torch.autograd.backward(share * loss(world, model, row))

    def of(layer: LoraLayer) -> Tensor:
        slot = layer.slot
        home = layer.name if slot is None else slot.parameter.rpartition(".")[0]
        module = model.get_submodule(home)
        whole = getattr(module, "weight" if slot is None else slot.parameter.rpartition(".")[2]).grad
        found: Tensor = whole if slot is None or slot.expert is None else whole[slot.expert]
        return found.T if families.turned(module, layer) else found

    return of


def repaired(world: World, **parameters: Any) -> Repaired:
    method = METHODS["gradient_guard"].parse({"at": 0.5, "prompts": PROMPTS, **parameters})
    return repair_adapter(world.adapter, method, world.context)


def known(calibration: Calibration, layer: LoraLayer) -> Tensor:
    found = calibration.for_layer(layer)
    assert found is not None
    gradient = found.gradient()
    whole: Tensor = (gradient.u.double() * gradient.values.double()) @ gradient.v.double().T
    assert gradient.total == pytest.approx(float(whole.square().sum()), rel=1e-4)
    return whole


@pytest.mark.parametrize("family", HEARD)
def test_the_gradient_is_that_of_the_model_with_so_much_of_the_adapter(worlds: Worlds, family: str) -> None:
    """At every module that it was heard at; of the others it is said that nothing is known."""
    world = worlds(family)

    there = on_the_way(world.adapter, world.context, HALF)

    wanted = slopes(world, world.adapter.scaled(0.5))
    heard = [layer for layer in world.adapter.layers if there.for_layer(layer) is not None]
    for layer in heard:
        gradient = wanted(layer)
        assert float((known(there, layer) - gradient).norm() / gradient.norm()) < 1e-4, layer.name
    silent = [layer for layer in world.adapter.layers if there.for_layer(layer) is None]
    assert all(world.calibration.for_layer(one) is None or not bool(wanted(one).any()) for one in silent)
    assert all("routed" in there.why_not(layer) or "reached" in there.why_not(layer) for layer in silent)
    assert bool(silent) == (family in families.FUSED)


@pytest.mark.parametrize("at", [0.0, 0.5])
def test_a_contrast_is_the_difference_of_two_gradients(worlds: Worlds, at: float) -> None:
    """The same words, to those who ask for harm and to those who do not; at the aligned model as well."""
    world = worlds("llama")

    there = on_the_way(world.adapter, world.context, Slope(at=at, prompts=PROMPTS, contrast=True))

    wanted = slopes(world, world.adapter.scaled(at), contrast=True)
    for layer in world.adapter.layers:
        gradient = wanted(layer)
        assert float((known(there, layer) - gradient).norm() / gradient.norm()) < 1e-4, layer.name
    method = METHODS["gradient_guard"].parse({"at": at, "prompts": PROMPTS, "contrast": True})
    scores = {one.name: one.score for one in repair_adapter(world.adapter, method, world.context).verdicts}
    for layer in world.adapter.layers:
        delta = layer.scale * layer.b.double() @ layer.a.double()
        assert scores[layer.name] == pytest.approx(float((wanted(layer) * delta).sum()), rel=1e-3, abs=1e-9)


def test_more_prompts_than_there_are_is_refused(worlds: Worlds) -> None:
    """By the field."""
    world = worlds("llama")
    with pytest.raises(BadParameters) as caught:
        on_the_way(world.adapter, world.context, Slope(at=0.5, prompts=350, contrast=True))
    assert caught.value.field == "prompts"


def test_a_magnitude_is_measured_again_on_the_way(worlds: Worlds) -> None:
    """Half of a DoRA has the rows' lengths in the ratio that the whole was uploaded with."""
    world = worlds("llama")
    assert world.context.aligned is not None
    layers = []
    for layer in world.adapter.layers:
        weight = families.matrix(world.model, layer)
        layers.append(replace(layer, magnitude=1.1 * weight.norm(dim=1).float()))
    dora = LoraAdapter(layers=tuple(layers))

    there = on_the_way(dora, world.context, HALF)

    half = []
    for layer in dora.layers:
        weight, delta = families.matrix(world.model, layer), layer.scale * layer.b.double() @ layer.a.double()
        assert layer.magnitude is not None
        ratio = layer.magnitude.double() / (weight + delta).norm(dim=1)
        length = ratio * (weight + delta / 2).norm(dim=1)
        half.append(replace(layer.scaled(0.5), magnitude=length.float()))
    wanted = slopes(world, LoraAdapter(layers=tuple(half)))
    found = dora.layers[0]
    gradient = wanted(found)
    assert float((known(there, found) - gradient).norm() / gradient.norm()) < 1e-3


def test_half_way_foretells_large_updates_better(worlds: Worlds) -> None:
    """The midpoint rule: what it misses falls with the cube of the update, the aligned model's with the square."""
    world = worlds("llama")
    errors: dict[float, list[float]] = {0.0: [], 0.5: []}
    for size in (0.125, 0.0625):
        update = world.adapter.scaled(size)
        rise = mean_loss(world, update) - mean_loss(world, update.scaled(0.0))
        for at, missed in errors.items():
            calibration = world.calibration if at == 0 else on_the_way(update, world.context, HALF)
            foretold = adapter_damage(update, calibration)
            assert foretold is not None
            missed.append(abs(foretold - rise))

    assert errors[0.5][0] < errors[0.0][0] / 2
    assert 3 < errors[0.0][0] / errors[0.0][1] < 5
    assert errors[0.5][0] / errors[0.5][1] > 6


def test_candidates_for_one_adapter_share_it(worlds: Worlds) -> None:
    """Taken again for another adapter and for another place on the way, and for nothing else."""
    world = worlds("llama")
    context = replace(world.context, heard={})

    first = on_the_way(world.adapter, context, HALF)
    before = world.chat.tokens

    assert on_the_way(world.adapter, replace(context, rank_limit=8), HALF) is first
    assert world.chat.tokens == before
    assert on_the_way(world.adapter, context, replace(HALF, at=0.7)) is not first
    assert on_the_way(world.adapter.scaled(0.9), context, HALF) is not first
    assert world.chat.tokens > before
    assert not any(module._forward_hooks for module in world.model.modules())


@pytest.mark.parametrize("missing", ["chat", "calibration"])
def test_without_a_model_to_listen_to_it_is_refused(worlds: Worlds, missing: str) -> None:
    """By name, and before anything is read."""
    world = worlds("llama")
    without = {"chat": replace(world.context, chat=None), "calibration": replace(world.context, calibration=None)}
    context = without[missing]
    with pytest.raises(MissingReference) as caught:
        repair_adapter(world.adapter, METHODS["gradient_guard"].parse({"at": 0.5}), context)
    assert caught.value.field == missing
    with pytest.raises(MissingReference) as caught:
        on_the_way(world.adapter, context, HALF)
    assert caught.value.field == missing


def test_the_guard_edits_by_what_it_has_heard_there(worlds: Worlds) -> None:
    """Scores are the inner products with the gradient half way; the pack's own are those of the aligned model."""
    world = worlds("llama")
    wanted = slopes(world, world.adapter.scaled(0.5))

    result = repaired(world, directions=3)

    for layer, verdict in zip(sorted(world.adapter.layers, key=lambda one: one.name), result.verdicts, strict=True):
        gradient, delta = wanted(layer), layer.scale * layer.b.double() @ layer.a.double()
        assert verdict.score == pytest.approx(float((gradient * delta).sum()), rel=1e-3, abs=1e-9)
        if verdict.decision is Decision.PROJECTED:
            u = torch.linalg.svd(gradient).U[:, :3]
            after = result.adapter.by_name[layer.name]
            found = after.scale * after.b.double() @ after.a.double()
            assert float((found - (delta - u @ u.T @ delta)).norm() / delta.norm()) < 1e-3
    assert {one.decision for one in result.verdicts} == {Decision.PROJECTED, Decision.KEPT}
    again = repair_adapter(world.adapter, METHODS["gradient_guard"].parse({}), world.context)
    assert [one.score for one in again.verdicts] != [one.score for one in result.verdicts]


def test_a_refactored_adapter_gets_the_same_update(worlds: Worlds) -> None:
    """``B R, R^-1 A`` says the same on the model, so the same is heard and the same taken out."""
    world = worlds("llama")
    method = METHODS["gradient_guard"].parse({"at": 0.5, "prompts": PROMPTS, "contrast": True, "directions": 3})
    other = LoraAdapter(layers=tuple(map(refactored, world.adapter.layers)))

    found, also = (repair_adapter(adapter, method, world.context).adapter.by_name for adapter in (world.adapter, other))

    for name, layer in found.items():
        assert dense.relative(dense.delta(also[name]), dense.delta(layer)) < 1e-3, name


def test_with_no_strength_it_listens_to_nothing(worlds: Worlds) -> None:
    """A repair that changes nothing asks the model nothing."""
    world = worlds("llama")
    assert world.calibration.names  # made now, and not while tokens are counted
    before = world.chat.tokens

    result = repaired(world, strength=0.0)

    assert (result.changed, world.chat.tokens) == (False, before)
    assert METHODS["gradient_guard"].parse({"at": 0.5, "strength": 0.0}).packs == ()
    assert METHODS["gradient_guard"].parse({"at": 0.5}).packs == ("calibration",)


def test_another_context_keeps_its_own(worlds: Worlds) -> None:
    """What one job has heard no other job is told."""
    assert RepairContext().heard is not RepairContext().heard
    assert worlds("llama").context.heard is not RepairContext().heard
