"""What a calibration knows about fused experts and fused linears: equal to the definitions, expert by expert.

Each family's experts are written out here once more, from their papers: what goes in, what comes between, which rows of
a fused weight belong to which channel.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from repair.body import body_of
from repair.calibrate import measure_modules
from repair.checks.backend import Sample
from repair.errors import ShapeMismatch, WrongReference
from repair.fused_products import FusedExperts
from repair.listening import Ears
from repair.lora import LoraAdapter, LoraLayer, ParameterSlot
from repair.method import Need
from repair.methods import METHODS
from repair.moments import LayerCalibration, Side, Topic
from repair.run import repair_adapter
from tests import tiny
from tests.repair import families
from tests.repair.living_families import SETTINGS, World

pytestmark = pytest.mark.usefixtures("threads")
Worlds = Callable[[str], World]
LEAVES = ("gate_up_proj", "down_proj")
fused = pytest.mark.parametrize("family", families.FUSED)


def experts_of(family: str, model: Any, block: int) -> Any:
    inner = model.model.layers[block]
    return (inner.feed_forward if family == "llama4" else inner.mlp).experts


def name_of(family: str, block: int, expert: int, leaf: str) -> str:
    return f"model.layers.{block}.{'feed_forward' if family == 'llama4' else 'mlp'}.experts.{expert}.{leaf}"


def up_and_down(family: str, experts: Any, expert: int) -> tuple[Tensor, Tensor]:
    """Both weights as out x in."""
    up, down = experts.gate_up_proj[expert], experts.down_proj[expert]
    return (up.T, down.T) if family in {"gpt_oss", "llama4"} else (up, down)


def between(family: str, experts: Any, expert: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the first weight writes, and what the second reads."""
    written = x @ up_and_down(family, experts, expert)[0].T
    if family == "gpt_oss":
        biased = written + experts.gate_up_proj_bias[expert]
        gate, up = biased[:, ::2].clamp(max=7.0), biased[:, 1::2].clamp(-7.0, 7.0)
        return written, (up + 1) * gate * torch.sigmoid(1.702 * gate)
    gate, up = written[:, : written.shape[1] // 2], written[:, written.shape[1] // 2 :]
    return written, functional.silu(gate) * up


def routed(family: str, args: tuple[Any, ...], expert: int) -> tuple[Tensor, Tensor]:
    """The tokens that an expert is given, and where they stand."""
    if family == "llama4":
        inputs = args[0].view(4, -1, args[0].shape[-1])[expert]
        places = inputs.abs().sum(1).nonzero()[:, 0]
    else:
        inputs, places = args[0], (args[1] == expert).any(1).nonzero()[:, 0]
    return inputs[places], places


def in_double(world: World) -> Any:
    """The same model in float64, one expert after the other: the faster ways know no such numbers."""
    model = copy.deepcopy(world.model).double()
    if world.family != "llama4":  # it has no other way
        model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def listened(world: World, model: Any, prompts: Any, block: int, expert: int) -> dict[str, Tensor]:
    """Inputs and outputs of both weights at the tokens that count, one row at a time and in float64."""
    found: dict[str, list[Tensor]] = {}
    calls: list[tuple[Any, ...]] = []
    experts = experts_of(world.family, model, block)
    handle = experts.register_forward_pre_hook(lambda _module, args: calls.append(args))
    for row in prompts:
        question = world.chat.encode(row.text)
        answer = world.chat.tokenizer.encode(row.answers[0], add_special_tokens=False)[: SETTINGS.answer_tokens]
        model(input_ids=torch.tensor([question + answer]))
        x, places = routed(world.family, calls.pop(), expert)
        x = x[places >= len(question) - SETTINGS.question_tokens]
        written, inner = between(world.family, experts, expert, x)
        down = inner @ up_and_down(world.family, experts, expert)[1].T
        parts = {"gate_up_proj.inputs": x, "gate_up_proj.outputs": written}
        for key, value in {**parts, "down_proj.inputs": inner, "down_proj.outputs": down}.items():
            found.setdefault(key, []).append(value)
    handle.remove()
    return {key: torch.cat(values) for key, values in found.items()}


def known(world: World, name: str) -> LayerCalibration | None:
    entry = world.calibration.header["modules"].get(name)
    if entry is None:
        return None
    return world.calibration.for_layer(tiny.layer(name, (entry["shape"][0], entry["shape"][1])))


@fused
@pytest.mark.parametrize("topic", Topic)
def test_moments_of_an_expert_are_those_of_the_tokens_routed_to_it(worlds: Worlds, family: str, topic: Topic) -> None:
    """On both sides of both weights; an expert that no token reached is not in the pack."""
    world = worlds(family)
    model = in_double(world)
    prompts = world.rows.harmful if topic is Topic.HARMFUL else world.rows.benign
    seen = 0
    for expert in range(4):
        wanted = listened(world, model, prompts, 1, expert)
        for leaf in LEAVES:
            found = known(world, name_of(family, 1, expert, leaf))
            if not len(wanted["gate_up_proj.inputs"]):
                assert found is None
            if found is None:
                continue
            seen += 1
            for side in Side:
                x, held = wanted[f"{leaf}.{side}"], found.moments(side, topic)
                whole = x.T @ x / len(x)
                inside = (held.basis.double() * held.values.double()) @ held.basis.double().T
                assert float((inside - whole).norm() / whole.norm()) < 1e-5
                torch.testing.assert_close(held.mean.double(), x.mean(0), rtol=1e-3, atol=1e-6)
    assert seen >= 4


@fused
def test_the_gradient_of_an_expert_is_that_of_its_slice(worlds: Worlds, family: str) -> None:
    """Autograd on the fused parameter itself, in float64."""
    world = worlds(family)
    model = in_double(world)
    prompts = world.rows.harmful[: SETTINGS.gradient_prompts]
    for row in prompts:
        question, answer = world.chat.encode_sample(Sample(prompt=row.text, answer=row.answers[0]))
        logits = model(input_ids=torch.tensor([question + answer])).logits[0, len(question) - 1 : -1]
        torch.autograd.backward(functional.cross_entropy(logits, torch.tensor(answer)) / len(prompts))
    seen = 0
    for block in range(2):
        experts = experts_of(family, model, block)
        for expert in range(4):
            for leaf in LEAVES:
                found = known(world, name_of(family, block, expert, leaf))
                if found is None:
                    continue
                wanted = getattr(experts, leaf).grad[expert]
                wanted = wanted.T if family in {"gpt_oss", "llama4"} else wanted
                gradient = found.gradient()
                held = (gradient.u.double() * gradient.values.double()) @ gradient.v.double().T
                assert float((held - wanted).norm() / wanted.norm()) < 1e-4
                assert gradient.total == pytest.approx(float(wanted.square().sum()), rel=1e-4)
                seen += 1
    assert seen >= 8


@fused
def test_the_model_is_left_as_it_was(worlds: Worlds, family: str) -> None:
    """No hook, no other way to compute experts, no gradient; also when something breaks inside."""
    model: Any = worlds(family).chat.model
    before = (families.logits(model), model.get_experts_implementation())

    measure_modules(worlds(family).chat, worlds(family).rows, SETTINGS)
    with pytest.raises(ZeroDivisionError), FusedExperts(model).listening(lambda _: None):
        raise ZeroDivisionError

    assert torch.equal(families.logits(model), before[0])
    assert model.get_experts_implementation() == before[1]
    assert not any(module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_tokens_that_the_routing_does_not_name_are_not_believed() -> None:
    """A model class that hands its experts something else than it says is left out, with the reason."""
    model = families.model("mixtral")
    experts = FusedExperts(model)
    heard: list[str] = []

    def doubled(_module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (args[0] * 2, *args[1:])

    with experts.listening(lambda product: heard.append(product.name)):
        model.model.layers[0].mlp.experts.register_forward_pre_hook(doubled)
        families.logits(model)

    assert {name.split(".")[2] for name in heard} == {"1"}
    assert {name.split(".")[2] for name in experts.strange} == {"0"}


APART = {"qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"), "mixtral": ("block_sparse_moe", "w1", "w3", "w2")}


@pytest.mark.parametrize("family", APART)
def test_an_expert_that_is_spelt_apart_is_some_rows_of_the_fused_one(worlds: Worlds, family: str) -> None:
    """Every form and the gradient are those of the whole on its rows; every calibrated method judges it."""
    world = worlds(family)
    place, gate, up, down = APART[family]
    expert = next(at for at in range(4) if known(world, name_of(family, 0, at, "gate_up_proj")) is not None)
    home = f"model.layers.0.{place}.experts.{expert}"
    whole = known(world, name_of(family, 0, expert, "gate_up_proj"))
    assert whole is not None
    for at, name in enumerate((gate, up)):
        rows = slice(24 * at, 24 * (at + 1))
        found = world.calibration.for_layer(tiny.layer(f"{home}.{name}", (24, 32)))
        assert found is not None
        probe = torch.randn(3, 24, generator=tiny.generator(2))
        wide = torch.zeros(3, 48)
        wide[:, rows] = probe
        for topic in Topic:
            ours, theirs = (one.moments(Side.OUTPUTS, topic) for one in (found, whole))
            torch.testing.assert_close(ours.form(probe), theirs.form(wide), rtol=1e-4, atol=1e-9)
            torch.testing.assert_close(ours.basis.T @ ours.basis, torch.eye(ours.basis.shape[1]), rtol=0, atol=1e-4)
            inputs = (one.moments(Side.INPUTS, topic).squares for one in (found, whole))
            torch.testing.assert_close(*inputs)
        ours, theirs = ((one.u * one.values) @ one.v.T for one in (found.gradient(), whole.gradient()))
        torch.testing.assert_close(ours, theirs[rows], rtol=1e-4, atol=1e-7)
    layers = [tiny.layer(f"{home}.{name}", (24, 32)) for name in (gate, up)] + [tiny.layer(f"{home}.{down}", (32, 24))]
    for method in (name for name, kind in METHODS.items() if Need.CALIBRATION in kind.needs):
        verdicts = repair_adapter(LoraAdapter(layers=tuple(layers)), METHODS[method](), world.context).verdicts
        assert all(verdict.score is not None for verdict in verdicts), method
    strange = tiny.layer(f"{home}.{gate}", (25, 32))
    with pytest.raises(ShapeMismatch):
        world.calibration.for_layer(strange)


def test_many_experts_keep_few_directions_each() -> None:
    """All of one parameter hold as much as eight linears do; a linear holds what was asked for."""
    config = transformers.MixtralConfig(**{**families.EXPERTS, "num_hidden_layers": 1}, num_local_experts=64)
    ears = Ears(transformers.MixtralForCausalLM(config), SETTINGS)
    rows = torch.randn(100, 24, generator=tiny.generator(0))
    for name, count in (("model.layers.0.mlp.experts.63.down_proj", 8), ("model.layers.0.self_attn.q_proj", 24)):
        sketch = ears.moments(name)
        for row in rows:
            sketch.add(row[None])
        found = sketch.finish()
        assert len(found.values) == count
        torch.testing.assert_close(found.squares, rows.double().square().mean(0))
        assert float(found.values[0]) == pytest.approx(
            float(torch.linalg.eigvalsh(rows.double().T @ rows.double() / 100)[-1]), rel=0.1
        )


MLP = {
    **dict.fromkeys(families.MODELS, (("gate_proj", "up_proj"), "down_proj")),
    "phi": (("fc1",), "fc2"),
    "phi3": (("gate_up_proj",), "down_proj"),
    "gpt2": (("c_fc",), "c_proj"),
    **dict.fromkeys(families.FUSED, (("gate_up_proj",), "down_proj")),
}
ATTENTION = {
    **dict.fromkeys(families.MODELS, (("q_proj", "k_proj", "v_proj"), "o_proj")),
    "phi": (("q_proj", "k_proj", "v_proj"), "dense"),
    "phi3": (("qkv_proj",), "o_proj"),
    "gpt2": (("c_attn",), "c_proj"),
}


def frozen(world: World, names: dict[str, tuple[int, int]], share: float) -> dict[str, Tensor]:
    """Which rows of each module that writes, or columns of the one that reads, safety_freeze takes the update off."""
    layers = [
        tiny.layer(name, shape, transposed=turned(world, name), slot=slot_of(name)) for name, shape in names.items()
    ]
    found = repair_adapter(
        LoraAdapter(layers=tuple(layers)), METHODS["safety_freeze"].parse({"share": share}), world.context
    )
    return {layer.name: freed(layer) for layer in found.adapter.layers}


def freed(layer: LoraLayer) -> Tensor:
    """Rows of B that are zero, else columns of A."""
    rows: Tensor = ~layer.b.any(1)
    columns: Tensor = ~layer.a.any(0)
    assert bool(rows.any()) != bool(columns.any())
    return rows if bool(rows.any()) else columns


def turned(world: World, name: str) -> bool:
    return world.family == "gpt2"


def slot_of(name: str) -> ParameterSlot | None:
    if ".experts." not in name:
        return None
    home, leaf = name.split(".experts.")
    expert, kind = leaf.split(".")
    return ParameterSlot(parameter=f"{home}.experts.{kind}", expert=int(expert), experts=4)


@torch.no_grad()
def read_by(model: Any, name: str) -> Tensor:
    """What a module reads in one pass."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
    families.logits(model)
    handle.remove()
    return seen[0].flatten(0, -2)


@torch.no_grad()
def shaken(model: Any, name: str, rows: Tensor) -> Any:
    """A copy of the model with other numbers in these output rows of one weight."""
    changed = copy.deepcopy(model)
    module = changed.get_submodule(name)
    weight = module.weight.data.T if type(module).__name__ == "Conv1D" else module.weight.data
    weight[rows] += torch.randn(weight[rows].shape, generator=tiny.generator(5))
    return changed


@pytest.mark.parametrize("family", [one for one in families.MODELS if one not in families.FUSED])
@pytest.mark.parametrize("kind", ["mlp", "attention"])
def test_frozen_rows_write_what_frozen_columns_read(worlds: Worlds, family: str, kind: str) -> None:
    """Other numbers in the frozen rows of a writer reach the reader in its frozen columns, and nowhere else.

    A key-value head is read by all query heads that it serves.
    """
    world = worlds(family)
    writers, reader = (MLP if kind == "mlp" else ATTENTION)[family]
    place = {"mlp": "mlp", "attention": "attn" if family == "gpt2" else "self_attn"}[kind]
    home = f"{'transformer.h' if family == 'gpt2' else 'model.layers'}.0.{place}"
    shapes = {f"{home}.{leaf}": shape_of(world, f"{home}.{leaf}") for leaf in (*writers, reader)}

    marks = frozen(world, shapes, share=0.01)  # one unit

    columns = marks.pop(f"{home}.{reader}")
    before = read_by(world.model, f"{home}.{reader}")
    for name, rows in marks.items():
        after = read_by(shaken(world.model, name, rows), f"{home}.{reader}")
        touched = (after - before).abs().amax(0) > 1e-7
        assert bool(touched[columns].all()), name
        served = 2 if kind == "attention" and name.rpartition(".")[2] in {"k_proj", "v_proj", "qkv_proj"} else 1
        assert int(touched.sum()) <= served * int(columns.sum()), name


def shape_of(world: World, name: str) -> tuple[int, int]:
    module = world.model.get_submodule(name)
    first, second = module.weight.shape
    return (second, first) if type(module).__name__ == "Conv1D" else (first, second)


@fused
def test_frozen_rows_of_an_expert_write_what_its_frozen_columns_read(worlds: Worlds, family: str) -> None:
    """Gate and up of the same channel, whether they take turns or stand one part below the other."""
    world = worlds(family)
    expert = next(at for at in range(4) if known(world, name_of(family, 0, at, "down_proj")) is not None)
    up, down = (name_of(family, 0, expert, leaf) for leaf in LEAVES)

    marks = frozen(world, {up: (48, 32), down: (32, 24)}, share=0.01)

    assert (int(marks[up].sum()), int(marks[down].sum())) == (2, 1)
    experts = copy.deepcopy(experts_of(family, world.model, 0))
    x = torch.randn(7, 32, generator=tiny.generator(3))
    with torch.no_grad():
        before = between(family, experts, expert, x)[1]
        for row in marks[up].nonzero()[:, 0].tolist():
            other = copy.deepcopy(experts)
            up_and_down(family, other, expert)[0][row] += torch.randn(32, generator=tiny.generator(row))
            touched = (between(family, other, expert, x)[1] - before).abs().amax(0) > 0
            assert torch.equal(touched, marks[down])


def test_a_model_class_without_a_body_below_its_head_is_refused() -> None:
    """Llama 4 answers for its body with itself; the body is found all the same, and where there is none it is said."""
    llama4 = families.model("llama4")
    assert llama4.base_model is llama4
    assert body_of(llama4) is llama4.model
    assert body_of(families.model("gpt2")).__class__.__name__ == "GPT2Model"

    class Headstrong(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(2, 2)
            self.base_model = self.head

        def get_output_embeddings(self) -> nn.Module:
            return self.head

    with pytest.raises(WrongReference, match="Headstrong"):
        body_of(Headstrong())
