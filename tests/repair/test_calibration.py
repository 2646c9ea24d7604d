"""A calibration pack: equal to whole covariances and gradients in float64, bound to its model, whole or not there."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gate.digest import root_digest
from gate.model import file_digests
from repair.__main__ import main
from repair.calibrate import measure_modules
from repair.calibration import Calibration, CalibrationSettings, Identity, MeasuredModule, write_calibration
from repair.checkpoint import Checkpoint
from repair.checks.chat import ChatModel
from repair.checks.packs import load_pack
from repair.context import RepairContext
from repair.errors import BadParameters, MissingReference, ShapeMismatch, WrongReference
from repair.method import Decision
from repair.methods import METHODS
from repair.moments import LayerCalibration, Side, Topic
from repair.refusing import CalibrationRows, calibration_rows
from repair.run import repair_adapter
from tests import tiny

SETTINGS = CalibrationSettings(prompts=11, question_tokens=3, answer_tokens=2, gradient_prompts=3, directions=64)
SHAPES = {"model.layers.0.self_attn.k_proj": (16, 32), "model.layers.1.mlp.down_proj": (32, 56)}
MEASURING = ("core_harmful", "core_lookalike", "core_benign", "core_checkable")


def words_of(rows: CalibrationRows) -> list[str]:
    texts = [text for row in (*rows.harmful, *rows.benign) for text in (row.text, row.answers[0])]
    return sorted({word for text in texts for word in text.split()})[:150]


@pytest.fixture(scope="module")
def rows() -> CalibrationRows:
    return calibration_rows(SETTINGS)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, rows: CalibrationRows) -> Path:
    return tiny.tiny_llama(tmp_path_factory.mktemp("chat") / "model", words=words_of(rows))


@pytest.fixture(scope="module")
def chat(model_folder: Path) -> ChatModel:
    return ChatModel.load(model_folder, "cpu")


@pytest.fixture(scope="module")
def modules(chat: ChatModel, rows: CalibrationRows) -> dict[str, MeasuredModule]:
    return measure_modules(chat, rows, SETTINGS)


@pytest.fixture(scope="module")
def pack(modules: dict[str, MeasuredModule], tmp_path_factory: pytest.TempPathFactory) -> Calibration:
    folder = tmp_path_factory.mktemp("packs") / "one"
    write_calibration(identity(), modules, folder, about={})
    return Calibration.open(folder, aligned=tiny.MODEL_DIGEST)


def identity(**changed: Any) -> Identity:
    return Identity(**{"aligned": tiny.MODEL_DIGEST, "rows": "r", "dtype": "float32", "settings": SETTINGS, **changed})


def known(pack: Calibration, name: str) -> LayerCalibration:
    shape = pack.header["modules"][name]["shape"]
    found = pack.for_layer(tiny.layer(name, (shape[0], shape[1])))
    assert found is not None
    return found


def in_double(chat: ChatModel) -> nn.Module:
    """The same model in float64, each linear with a bias of zero, so that its gradient can be read off."""
    model: nn.Module = copy.deepcopy(chat.model).double()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.bias is None:
            module.bias = nn.Parameter(torch.zeros(module.out_features, dtype=torch.float64))
    return model


def listened(chat: ChatModel, prompts: Any, name: str) -> tuple[Tensor, Tensor]:
    """What the module reads and writes at the tokens that count: one row at a time, no padding."""
    model = in_double(chat)
    reads: list[Tensor] = []
    writes: list[Tensor] = []

    def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        reads.append(args[0][0, first:])
        writes.append(output[0, first:])

    model.get_submodule(name).register_forward_hook(hook)
    for row in prompts:
        question = chat.encode(row.text)
        answer = chat.tokenizer.encode(row.answers[0], add_special_tokens=False)[:2]
        first = len(question) - 3
        with torch.no_grad():
            model(input_ids=torch.tensor([question + answer]))
    return torch.cat(reads), torch.cat(writes)


NAMES = (
    "model.layers.0.self_attn.k_proj",
    "model.layers.0.self_attn.o_proj",
    "model.layers.1.mlp.up_proj",
    "model.layers.1.mlp.down_proj",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("topic", Topic)
def test_moments_are_those_of_whole_covariances(
    pack: Calibration, chat: ChatModel, rows: CalibrationRows, name: str, topic: Topic
) -> None:
    """Mean, diagonal and ``C = X^T X / tokens`` itself, on both sides; padding and shared inputs change nothing."""
    prompts = rows.harmful if topic is Topic.HARMFUL else rows.benign
    for side, x in zip((Side.INPUTS, Side.OUTPUTS), listened(chat, prompts, name), strict=True):
        found = known(pack, name).moments(side, topic)
        wanted = x.T @ x / len(x)
        held = (found.basis.double() * found.values.double()) @ found.basis.double().T
        assert float((held - wanted).norm() / wanted.norm()) < 1e-5
        torch.testing.assert_close(found.squares.double(), wanted.diagonal(), rtol=1e-4, atol=1e-9)
        torch.testing.assert_close(found.mean.double(), x.mean(0), rtol=1e-3, atol=1e-6)
        probe = torch.randn(4, x.shape[1], generator=tiny.generator(3))
        torch.testing.assert_close(found.form(probe), probe.double() @ wanted @ probe.double().T, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_is_that_of_the_mean_refusal_loss(
    pack: Calibration, chat: ChatModel, rows: CalibrationRows, name: str
) -> None:
    """Autograd on the weight itself, in float64."""
    model = in_double(chat)
    for row in rows.harmful[: SETTINGS.gradient_prompts]:
        question = chat.encode(row.text)
        message = [{"role": "user", "content": row.text}, {"role": "assistant", "content": row.answers[0]}]
        ids = chat.tokenizer.encode(
            chat.tokenizer.apply_chat_template(message, tokenize=False), add_special_tokens=False
        )
        logs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        picked = [logs[at - 1, ids[at]] for at in range(len(question), len(ids))]
        loss = -torch.stack(picked).mean() / SETTINGS.gradient_prompts
        torch.autograd.backward(loss)
    module = model.get_submodule(name)
    wanted, bias = module.weight.grad, module.bias.grad
    assert isinstance(wanted, Tensor)

    found = known(pack, name).gradient()

    held = (found.u.double() * found.values.double()) @ found.v.double().T
    assert float((held - wanted).norm() / wanted.norm()) < 1e-4
    assert found.total == pytest.approx(float(wanted.square().sum()), rel=1e-4)
    torch.testing.assert_close(found.bias.double(), bias, rtol=1e-3, atol=1e-7)


def test_the_model_is_left_as_it_was(chat: ChatModel, rows: CalibrationRows) -> None:
    """No hook, no gradient, no frozen parameter stays behind."""
    before = [(p.requires_grad, p.detach().clone()) for p in chat.model.parameters()]

    measure_modules(chat, rows, SETTINGS)

    for parameter, (flag, value) in zip(chat.model.parameters(), before, strict=True):
        assert (parameter.requires_grad, parameter.grad) == (flag, None)
        assert torch.equal(parameter, value)
    assert not any(module._forward_hooks for module in chat.model.modules())


def test_linears_that_read_the_same_share_it(pack: Calibration) -> None:
    """What q, k and v read is stored once; the others keep their own."""
    owners = {name.removeprefix("model.layers.0."): pack.header["modules"][name]["inputs"] for name in pack.names}

    assert owners["self_attn.k_proj"] == owners["self_attn.v_proj"] == "model.layers.0.self_attn.q_proj"
    assert owners["mlp.up_proj"] == "model.layers.0.mlp.gate_proj"
    assert owners["self_attn.o_proj"] == "model.layers.0.self_attn.o_proj"
    assert len(owners) == 14


def test_unit_scores_are_excess_shares(pack: Calibration, chat: ChatModel, rows: CalibrationRows) -> None:
    """Energy through each channel and each head, from whole activations; key-value heads take their highest query."""
    block = "model.layers.1"
    channels, heads = (excess(chat, rows, f"{block}.{reader}") for reader in ("mlp.down_proj", "self_attn.o_proj"))
    heads = heads.view(4, 8).sum(1)
    wanted = {
        "mlp.down_proj": (channels, 1, True),
        "mlp.gate_proj": (channels, 1, False),
        "mlp.up_proj": (channels, 1, False),
        "self_attn.o_proj": (heads, 8, True),
        "self_attn.q_proj": (heads, 8, False),
        "self_attn.k_proj": (heads.view(2, 2).amax(1), 8, False),
        "self_attn.v_proj": (heads.view(2, 2).amax(1), 8, False),
    }
    for name, (scores, width, reads) in wanted.items():
        units = known(pack, f"{block}.{name}").units()
        assert units is not None
        assert (units.width, units.reads) == (width, reads)
        torch.testing.assert_close(units.scores.double(), scores, rtol=1e-3, atol=1e-6)


def excess(chat: ChatModel, rows: CalibrationRows, name: str) -> Tensor:
    columns = chat.model.get_submodule(name).weight.detach().double().square().sum(0)
    parts = [listened(chat, prompts, name)[0].square().mean(0) * columns for prompts in (rows.harmful, rows.benign)]
    found: Tensor = parts[0] / parts[0].sum() - parts[1] / parts[1].sum()
    return found


def test_rows_are_harmful_and_benign_and_never_measure() -> None:
    """As many of each as asked for, in an order that the seed decides; more than there are is refused."""
    rows = calibration_rows(SETTINGS)
    measured = {row.text for name in MEASURING for row in load_pack(name).rows}

    assert [len(rows.harmful), len(rows.benign)] == [11, 11]
    assert {row.category for row in rows.harmful} == {"refuse"}
    assert {row.category for row in rows.benign} == {"lookalike", "ordinary"}
    assert not measured & {row.text for row in (*rows.harmful, *rows.benign)}
    assert rows.digest == calibration_rows(SETTINGS).digest
    assert rows.digest != calibration_rows(CalibrationSettings(prompts=11, seed=1)).digest
    with pytest.raises(BadParameters, match="prompts"):
        calibration_rows(CalibrationSettings(prompts=5000))


@pytest.mark.parametrize(
    ("field", "value"),
    [("prompts", 0), ("question_tokens", 0), ("directions", 0), ("gradient_prompts", 99), ("answer_tokens", -1)],
)
def test_impossible_settings_are_refused_by_name(field: str, value: int) -> None:
    """Before any model is loaded."""
    with pytest.raises(BadParameters) as caught:
        CalibrationSettings(**{field: value})
    assert caught.value.field == field


def test_its_name_is_all_that_decides_it() -> None:
    """Another model, other rows, another format of numbers, another setting: another folder."""
    changes: list[dict[str, Any]] = [
        {"aligned": "sha256:other"}, {"rows": "s"}, {"dtype": "bfloat16"},
        {"settings": CalibrationSettings(prompts=11, directions=63)},
    ]  # fmt: skip
    folders = {identity(**change).folder(Path("store")) for change in changes} | {identity().folder(Path("store"))}

    assert len(folders) == 5


def another_model(folder: Path) -> str:
    return f"sha256:{'8' * 64}"


def damaged(folder: Path) -> str:
    tensors = folder / "calibration.safetensors"
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(bytes(content))
    return tiny.MODEL_DIGEST


def another_version(folder: Path) -> str:
    header = folder / "calibration.json"
    header.write_text(header.read_text().replace('"version": 2', '"version": 1'))
    return tiny.MODEL_DIGEST


def no_header(folder: Path) -> str:
    (folder / "calibration.json").write_text("[]")
    return tiny.MODEL_DIGEST


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (another_model, "another aligned model"),
        (damaged, "not what the header says"),
        (another_version, "version 2"),
        (no_header, "version 2"),
    ],
)
def test_is_refused_by_name(tmp_path: Path, spoil: Callable[[Path], str], says: str) -> None:
    """For another model, damaged, of another version: the field is always ``calibration``."""
    tiny.calibration(tmp_path / "pack")
    wanted = spoil(tmp_path / "pack")

    with pytest.raises(WrongReference, match=says) as caught:
        Calibration.open(tmp_path / "pack", aligned=wanted)
    assert caught.value.field == "calibration"


def test_a_folder_of_packs_gives_the_one_for_the_model(tmp_path: Path) -> None:
    """None and two are refused: a pack is never guessed."""
    one = tiny.calibration(tmp_path / "store" / "one")

    assert Calibration.open(tmp_path / "store", aligned=tiny.MODEL_DIGEST).digest == one.digest
    with pytest.raises(WrongReference, match="none of 1 packs"):
        Calibration.open(tmp_path / "store", aligned="sha256:other")
    tiny.calibration(tmp_path / "store" / "two", seed=1)
    with pytest.raises(WrongReference, match="2 packs"):
        Calibration.open(tmp_path / "store", aligned=tiny.MODEL_DIGEST)


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    """The tensors are on the disk when the header fails: no folder bears the name, and none is left beside it."""
    made = {"m": MeasuredModule(shape=(3, 2), tensors={"units": torch.ones(2)}, numbers={})}

    with pytest.raises(TypeError):
        write_calibration(identity(), made, tmp_path / "store" / "pack", about={"no JSON": object()})

    assert list((tmp_path / "store").iterdir()) == []


def test_modules_without_numbers_are_unjudged_and_strange_ones_refused(tmp_path: Path) -> None:
    """An adapter for more modules keeps them with a reason; one of another shape is for another model."""
    name = "model.layers.0.mlp.up_proj"
    aligned, _ = tiny.tiny_pair(tmp_path)
    pack = tiny.calibration(tmp_path / "pack", {name: (97, 53)})
    context = RepairContext(aligned=Checkpoint.open(aligned), calibration=pack)

    for method in ("gradient_guard", "input_guard", "output_guard"):
        verdicts = repair_adapter(tiny.adapter(), METHODS[method](), context).verdicts
        assert {v.name for v in verdicts if v.decision is not Decision.UNJUDGED} <= {name}
        assert all("did not look" in v.reason for v in verdicts if v.name != name)

    strange = replace(context, calibration=tiny.calibration(tmp_path / "strange", {name: (98, 53)}))
    with pytest.raises(ShapeMismatch, match="calibration") as caught:
        repair_adapter(tiny.adapter(), METHODS["input_guard"](), strange)
    assert caught.value.field == name


def test_methods_without_a_calibration_say_so(tmp_path: Path) -> None:
    """By the name of what is missing."""
    aligned, _ = tiny.tiny_pair(tmp_path)
    with pytest.raises(MissingReference) as caught:
        repair_adapter(tiny.adapter(), METHODS["input_guard"](), RepairContext(aligned=Checkpoint.open(aligned)))
    assert caught.value.field == "calibration"


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any], dict[str, Any]]:
    try:
        code = main([str(word) for word in words])
    finally:
        torch.use_deterministic_algorithms(mode=False)
    said = capsys.readouterr()
    problem = [line for line in said.err.splitlines() if line.startswith("{")]  # transformers shows bars of its own
    return code, json.loads(said.out or "{}"), json.loads(problem[0] if problem else "{}")


def test_of_two_that_measure_at_once_both_end_well(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one measures, another comes, measures the same and is done first."""
    words: list[object] = ["calibrate", "--aligned", model_folder, "--device", "cpu", "--json"]
    words += ["--out", tmp_path / "store", "--prompts", 4, "--gradient-prompts", 2, "--directions", 6]
    first: list[dict[str, Any]] = []

    def overtaken(*parts: Any, **more: Any) -> Any:
        found = measure_modules(*parts, **more)
        if not first:
            first.append({})
            first[0] = run(capsys, *words)[1]
        return found

    monkeypatch.setattr("repair.calibrate.measure_modules", overtaken)
    code, second, _ = run(capsys, *words)

    assert code == 0
    assert second["outputs"]["calibration"] == first[0]["outputs"]["calibration"]
    assert len(list((tmp_path / "store").iterdir())) == 1


def test_the_whole_way_from_a_shell(model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Calibrate, find it again, repair with it, and be refused with it for another model."""
    made = tiny.adapter(SHAPES)
    adapter = tiny.write_adapter_files(tmp_path / "adapter", tiny.adapter_tensors(made), made.config)
    store, small = tmp_path / "store", ("--prompts", 4, "--gradient-prompts", 2, "--directions", 6)
    here = ("--aligned", model_folder, "--device", "cpu", "--json")

    code, first, _ = run(capsys, "calibrate", *here, *small, "--out", store)
    _, again, _ = run(capsys, "calibrate", *here, *small, "--out", store)

    assert code == 0
    assert (first["outputs"]["calibration"]["cached"], again["outputs"]["calibration"]["cached"]) == (False, True)
    assert first["outputs"]["calibration"]["digest"] == again["outputs"]["calibration"]["digest"]
    assert first["inputs"]["aligned"]["digest"] == root_digest(file_digests(model_folder))
    assert len(list(store.iterdir())) == 1

    repair = ("repair", adapter, "--calibration", store, "--method", "input_guard", "--set", "directions=2", "--json")
    code, said, _ = run(capsys, *repair, "--aligned", model_folder, "--out", tmp_path / "out")
    assert (code, said["summary"]) == (0, {"projected": 2})
    assert said["inputs"]["calibration"]["digest"] == first["outputs"]["calibration"]["digest"]

    other = tiny.tiny_llama(tmp_path / "other", seed=1)
    code, _, problem = run(capsys, *repair, "--aligned", other, "--out", tmp_path / "never")
    assert (code, problem["rule"], problem["field"]) == (1, "wrong-reference", "calibration")
    code, _, problem = run(capsys, *repair, "--out", tmp_path / "never")
    assert (code, problem["field"]) == (1, "aligned")
    assert not (tmp_path / "never").exists()
