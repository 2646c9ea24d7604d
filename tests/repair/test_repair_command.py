"""`python -m repair` as a user's shell meets it: one JSON object out, one JSON problem on error, exit codes."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from gate.digest import sha256_file
from repair.__main__ import main
from repair.adapter_file import read_adapter
from repair.commands import device_of
from repair.errors import BadParameters
from repair.methods import METHODS
from tests import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """An adapter folder and the pair it belongs to."""
    tiny.tiny_pair(tmp_path)
    tiny.tiny_adapter_dir(tmp_path / "adapter", dtype=torch.bfloat16)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Exit code, the object on stdout, the problem on stderr."""
    try:
        code = main([str(word) for word in words])
    except SystemExit as leave:
        code = int(leave.code or 0)
    finally:
        torch.use_deterministic_algorithms(mode=False)
    said = capsys.readouterr()
    problem = said.err.splitlines()[-1] if code == 1 else "{}"  # above it stands progress
    return code, json.loads(said.out or "{}"), json.loads(problem)


def test_repair_prints_one_account_of_everything(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Verdict, all parameters, every module, digests of what went in and came out."""
    pair = ("--aligned", folders / "aligned", "--base", folders / "base", "--device", "cpu")

    code, said, _ = run(
        capsys, "repair", folders / "adapter", *pair, "--method", "safe_lora",
        "--set", "mode=truncated", "--set", "count=3", "--set", "rank=4", "--out", folders / "out", "--json",
    )  # fmt: skip

    assert (code, said["verdict"], said["method"]) == (0, "repaired", "safe_lora")
    given = {"mode": "truncated", "count": 3, "rank": 4}
    assert said["parameters"] == METHODS["safe_lora"].parse(given).model_dump(mode="json")
    assert given.items() <= said["parameters"].items()
    assert [module["name"] for module in said["modules"]] == sorted(tiny.SHAPES)
    assert {"name", "decision", "score", "null", "shrink", "energy_before", "energy_after", "reason"} == set(
        said["modules"][0]
    )
    assert said["summary"] == {"kept": 5, "projected": 3}
    assert set(said["inputs"]) == {"adapter", "aligned", "base"}
    weights = "adapter_model.safetensors"
    assert said["inputs"]["adapter"]["files"][weights] == sha256_file(folders / "adapter" / weights)
    assert said["outputs"]["adapter"]["files"][weights] == sha256_file(folders / "out" / weights)
    assert said["environment"]["deterministic_algorithms"] is True
    assert read_adapter(folders / "out").names == tuple(sorted(tiny.SHAPES))


def test_repair_twice_gives_the_same_bytes(folders: Path) -> None:
    """Same inputs, parameters and device: the same digest, from processes of their own."""
    digests = set()
    for name in ("one", "two"):
        words = ["repair", folders / "adapter", "--aligned", folders / "aligned", "--base", folders / "base",
                 "--method", "safe_lora", "--out", folders / name, "--json"]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "repair", *map(str, words)], cwd=ROOT, capture_output=True, check=True, text=True
        )
        digests.add(json.loads(done.stdout)["outputs"]["adapter"]["digest"])

    assert len(digests) == 1


def test_an_unchanged_adapter_leaves_as_its_own_bytes(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """README and all."""
    (folders / "adapter" / "README.md").write_text("what it is for")

    code, said, _ = run(
        capsys, "repair", folders / "adapter", "--method", "scale", "--set", "strength=1",
        "--out", folders / "out", "--json",
    )  # fmt: skip

    assert code == 0
    assert said["outputs"]["adapter"]["unchanged"] is True
    assert said["outputs"]["adapter"]["digest"] == said["inputs"]["adapter"]["digest"]
    for path in (folders / "adapter").iterdir():
        assert (folders / "out" / path.name).read_bytes() == path.read_bytes()


def test_a_patch_is_among_the_inputs(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With its digest."""
    tiny.tiny_adapter_dir(folders / "patch", seed=50)

    code, said, _ = run(
        capsys, "repair", folders / "adapter", "--method", "patch", "--set", f"patch={folders / 'patch'}",
        "--out", folders / "out", "--json",
    )  # fmt: skip

    assert code == 0
    assert said["inputs"]["patch"]["digest"].startswith("sha256:")
    assert said["outputs"]["adapter"]["rank"] == 6


def problems(folders: Path) -> list[tuple[list[object], str, str]]:
    adapter, out = folders / "adapter", ["--out", folders / "out"]
    return [
        (["repair", adapter, "--method", "nonsense", *out], "method", "bad-parameters"),
        (["repair", adapter, "--method", "scale", "--set", "strength=7", *out], "scale.strength", "bad-parameters"),
        (["repair", adapter, "--method", "scale", "--set", "strength", *out], "scale.strength", "bad-parameters"),
        (["repair", adapter, "--method", "scale", "--device", "abacus", *out], "device", "bad-parameters"),
        (["repair", adapter, "--method", "scale", "--rank-limit", 1, *out], "rank-limit", "bad-parameters"),
        (["repair", adapter, "--method", "scale", "--replacements", "keep", *out], "replacements", "bad-parameters"),
        (["repair", adapter, "--method", "scale", "--out", adapter], "", "output-exists"),
        (["repair", adapter, "--method", "safe_lora", *out], "aligned", "missing-reference"),
        (["repair", adapter, "--method", "scale", "--aligned", folders, *out], "", "wrong-reference"),
        (["repair", adapter], "arguments", "bad-parameters"),
        (["inspect", folders / "nowhere"], "", "io"),
    ]


@pytest.mark.parametrize("number", range(11))
def test_an_error_is_one_problem_and_exit_code_one(
    folders: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    """File, field, rule, detail; never a traceback, never a half-made folder, never 2, which is the policy's."""
    words, field, rule = problems(folders)[number]

    code, said, problem = run(capsys, *words, "--json")

    assert (code, said) == (1, {})
    assert set(problem) == {"file", "field", "rule", "detail"}
    assert (problem["field"], problem["rule"]) == (field, rule)
    assert problem["detail"]
    assert not (folders / "out").exists()


@pytest.mark.parametrize(
    ("words", "flags"),
    [
        (["repair", "a", "--out", "o", "--policy", "demo", "--set", "strength=1"], ("--set", "--policy")),
        (["repair", "a", "--out", "o", "--policy", "demo", "--balanced"], ("--balanced", "--policy")),
        (["repair", "a", "--out", "o", "--policy", "demo", "--rank-limit", "8"], ("--rank-limit", "--policy")),
        (
            ["repair", "a", "--out", "o", "--method", "scale", "--drop-replacements", "--replacements", "drop"],
            ("--drop-replacements", "--replacements"),
        ),
        (["repair", "a", "--out", "o", "--method", "scale", "--samples", "s.jsonl"], ("--samples", "--method")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_a_flag_that_would_change_nothing_is_an_error(
    capsys: pytest.CaptureFixture[str], words: list[str], flags: tuple[str, str]
) -> None:
    """Before anything is read, and the line names both flags."""
    code, said, problem = run(capsys, *words, "--json")

    assert (code, said) == (1, {})
    assert (problem["field"], problem["rule"]) == ("arguments", "bad-parameters")
    assert all(flag in problem["detail"] for flag in flags)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:7"])
def test_a_device_that_is_not_there_is_one_line(
    folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """No traceback out of torch: what was asked for, and what there is."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)

    code, said, problem = run(
        capsys, "repair", folders / "adapter", "--method", "scale", "--device", name, "--out", folders / "out"
    )

    assert (code, said) == (1, {})
    assert (problem["field"], problem["detail"]) == (
        "device",
        f"{name} was asked for, this machine shows 0 CUDA devices",
    )
    assert not (folders / "out").exists()


@pytest.mark.parametrize("name", ["meta", "mps", "cuda:x", "cuda:-1", ""])
def test_a_device_without_numbers_is_no_device(name: str) -> None:
    """`torch.device` takes names whose tensors hold nothing."""
    with pytest.raises(BadParameters, match="no such device"):
        device_of(name)


def test_a_hostile_file_is_refused_by_the_gate(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not a number in the weights: file, tensor and rule."""
    made = tiny.adapter()
    tensors = tiny.adapter_tensors(made)
    key = next(iter(tensors))
    tensors[key][0, 0] = float("nan")
    tiny.write_adapter_files(folders / "bad", tensors, made.config)

    how = ["--method", "scale", "--out", folders / "out"]
    for words in (["inspect", folders / "bad"], ["repair", folders / "bad", *how]):
        code, _, problem = run(capsys, *words, "--json")
        assert code == 1
        assert (problem["file"], problem["field"], problem["rule"]) == ("adapter_model.safetensors", key, "nan-weight")


def test_inspect_tells_what_is_inside(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Modules with shapes, scales and spectra, from the adapter alone."""
    code, said, _ = run(capsys, "inspect", folders / "adapter", "--json")

    assert code == 0
    assert (said["ranks"], said["scales"], said["dora"], said["rslora"]) == ([3], [2.0], False, False)
    module = next(one for one in said["modules"] if one["name"] == "model.layers.0.mlp.up_proj")
    assert (module["out_features"], module["in_features"], module["dtype"]) == (97, 53, "bfloat16")
    assert 0 < module["largest_singular_value"] <= module["norm"]
    assert 1 <= module["stable_rank"] <= 3


def test_methods_prints_the_catalogue(capsys: pytest.CaptureFixture[str]) -> None:
    """Every method in the folder, and the policies with their digests."""
    code, said, _ = run(capsys, "methods", "--json")

    assert code == 0
    assert [method["name"] for method in said["methods"]] == list(METHODS)
    assert all(policy["digest"].startswith("sha256:") for policy in said["policies"])


def test_words_for_people_name_every_module(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without --json: a line for each module."""
    assert main(["repair", str(folders / "adapter"), "--method", "scale", "--out", str(folders / "out")]) == 0
    torch.use_deterministic_algorithms(mode=False)

    said = capsys.readouterr().out

    assert "verdict: repaired" in said
    assert all(f"  {name}  decision scaled" in said for name in tiny.SHAPES)


def test_help_and_inspect_do_not_load_transformers(folders: Path) -> None:
    """They answer at once."""
    code = (
        "import sys; from repair.__main__ import main\n"
        f"main(['inspect', {str(folders / 'adapter')!r}, '--json'])\n"
        "assert 'transformers' not in sys.modules, 'transformers'\n"
    )

    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)


def test_a_policy_that_tries_what_no_method_takes_is_refused_at_once(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With file, field and reason, before a model is read: the one that is named here is not even there."""
    own = folders / "own.toml"
    text = (ROOT / "repair" / "policies" / "demo.toml").read_text("utf-8")
    trials = '[[trials]]\nmethod = "safe_lora"\ngrid = { threshold = [0.3], count = [3] }\n'
    own.write_text(text[: text.index("[[trials]]")] + trials)

    code, _, problem = run(
        capsys, "repair", folders / "adapter", "--aligned", folders / "nowhere", "--policy", own,
        "--device", "cpu", "--out", folders / "out", "--json",
    )  # fmt: skip

    assert (code, problem["rule"], problem["field"]) == (1, "policy-invalid", "trials.0")
    assert "safe_lora.count: give one of threshold, count" in problem["detail"]
    assert not (folders / "out").exists()
