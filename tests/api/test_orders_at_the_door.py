"""Orders that could never be carried out are refused when they are opened, and open nothing."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from api.catalogue import Catalogue
from ledger import adapters
from ledger.adapters import NewAdapter
from tests.api.conftest import IN, MODULE, OUT, RANK, Api, Problem, adapter_files

OTHER = "model.layers.0.self_attn.k_proj"
ELSEWHERE: list[tuple[dict[str, tuple[int, int]], str]] = [
    ({MODULE: (OUT + 1, IN)}, "shape-mismatch"),
    ({MODULE: (OUT, IN + 1)}, "shape-mismatch"),
    ({MODULE: (IN, OUT)}, "shape-mismatch"),
    ({OTHER: (OUT, IN)}, "unknown-module"),
]


@pytest.fixture
def real(api: Api) -> Api:
    """The service with the catalogue that it is shipped with."""
    api.app.state.service = replace(api.service, catalogue=Catalogue.load())
    return api


def order(api: Api, wish: dict[str, Any], path: str = "jobs", key: str = "k") -> Any:
    return api.client.post(f"/v1/{path}", json=wish, headers={"Idempotency-Key": key})


def opened(api: Api) -> int:
    return sum(len(api.client.get(f"/v1/{path}").json()["items"]) for path in ("jobs", "batches"))


@pytest.mark.parametrize(("shapes", "rule"), ELSEWHERE)
def test_an_adapter_of_another_model_is_refused_when_it_is_ordered(
    api: Api, problem: Problem, shapes: dict[str, tuple[int, int]], rule: str
) -> None:
    """With file, field, rule and what to do; against its own model it is taken."""
    api.seed_reference("elsewhere", shapes)
    adapter = api.upload()["id"]

    body = problem(
        order(api, {"adapter_id": adapter, "policy": "demo", "reference": "elsewhere"}), 422, "adapter-refused"
    )

    assert (body["file"], body["field"], body["rule"]) == ("adapter_model.safetensors", MODULE, rule)
    assert "elsewhere" in body["detail"]
    assert "name the reference of the model that it was trained on" in body["detail"]
    assert [error["pointer"] for error in body["errors"]] == ["/reference"]
    assert opened(api) == 0
    assert order(api, {"adapter_id": adapter, "policy": "demo", "reference": "tiny"}).status_code == 202


def test_nor_is_one_taken_that_was_uploaded_for_a_reference_and_ordered_for_another(api: Api, problem: Problem) -> None:
    """What was judged at the upload speaks of one model only."""
    api.seed_reference("elsewhere", {OTHER: (OUT, IN)})
    adapter = api.upload(reference="tiny")["id"]
    problem(order(api, {"adapter_id": adapter, "policy": "demo", "reference": "elsewhere"}), 422, "adapter-refused")
    assert order(api, {"adapter_id": adapter, "policy": "demo"}).status_code == 202


def test_a_model_that_stores_its_weights_turned_takes_adapters_that_say_so(api: Api) -> None:
    """As GPT-2 does."""
    api.seed_reference("turned", {MODULE: (IN, OUT)})
    adapter = api.upload(adapter_files(fan_in_fan_out=True))["id"]
    assert order(api, {"adapter_id": adapter, "policy": "demo", "reference": "turned"}).status_code == 202


@pytest.mark.parametrize("by", ["ids", "filter"])
def test_a_batch_with_an_adapter_of_another_model_is_not_opened(api: Api, problem: Problem, by: str) -> None:
    """All of them are named; a batch exists whole or not at all."""
    fits, foreign = api.upload(), api.upload(other_files())
    named: dict[str, Any] = (
        {"adapter_ids": [fits["id"], foreign["id"]]} if by == "ids" else {"filter": {"name": "unnamed"}}
    )

    body = problem(order(api, {**named, "policy": "demo", "reference": "tiny"}, "batches"), 422, "adapter-refused")

    (error,) = body["errors"]
    assert error["pointer"] == ("/adapter_ids/1" if by == "ids" else "/filter")
    assert foreign["id"] in error["detail"]
    assert (body["field"], body["rule"]) == (OTHER, "unknown-module")
    assert opened(api) == 0
    only = {"adapter_ids": [fits["id"]], "policy": "demo", "reference": "tiny"}
    assert order(api, only, "batches", key="only").status_code == 202


def other_files() -> dict[str, bytes]:
    """An adapter of a module that `tiny` does not have."""
    weights = {
        f"base_model.model.{OTHER}.lora_A.weight": np.ones((RANK, IN), np.float32),
        f"base_model.model.{OTHER}.lora_B.weight": np.ones((OUT, RANK), np.float32),
    }
    return {**adapter_files(target_modules=["k_proj"]), "adapter_model.safetensors": save(weights)}


def test_a_row_from_before_inspections_told_modules_is_left_to_the_worker(api: Api) -> None:
    """Nothing is known here that could be held against it."""
    api.seed_reference("elsewhere", {OTHER: (OUT, IN)})
    wish = {"adapter_id": api.seed_adapter(), "policy": "demo", "reference": "elsewhere"}
    assert order(api, wish).status_code == 202


@pytest.mark.parametrize(
    ("method", "parameters", "pointer", "says"),
    [
        ("safe_lora", {"threshold": 0.3, "count": 1}, "/parameters/count", "threshold or count"),
        ("safe_lora", {"mode": "paper", "adaptive": True}, "/parameters/adaptive", "mode soft"),
        ("splora", {"count": 1, "share": 0.5}, "/parameters/share", "not both"),
        ("refusal_tune", {"first": 0.9, "last": 0.1}, "/parameters/first", "before last"),
        ("random_modules", {"count": 2}, "/parameters/count", "the adapter has 1"),
        ("scale", {"strengths": {"*.k_proj": 0.5}}, "/parameters/strengths", "*.k_proj"),
        ("scale", {"strengths": {"*.q_proj": 0.5, "*.k_proj": 0.5}}, "/parameters/strengths", "*.k_proj"),
        (
            "compose",
            {"steps": [{"method": "spectral"}, {"method": "s3lora", "parameters": {"count": 9}}]},
            "/parameters/steps/1/parameters/count",
            "the adapter has 1",
        ),
        (
            "compose",
            {"steps": [{"method": "safe_lora", "parameters": {"unit_norm": True, "norm_share": 0.5}}]},
            "/parameters/steps/0/parameters/norm_share",
            "not both",
        ),
    ],
)
@pytest.mark.parametrize("path", ["jobs", "batches"])
def test_parameters_that_cannot_be_are_refused_when_they_are_ordered(
    *, real: Api, problem: Problem, path: str, method: str, parameters: dict[str, Any], pointer: str, says: str
) -> None:
    """With the place, the rule and the reason; alone, in a batch and inside a composition."""
    real.seed_reference("pair", {MODULE: (OUT, IN)}, base_digest=f"sha256:{'7' * 64}", base_path="/nowhere")
    adapter = real.upload()["id"]
    named: dict[str, Any] = {"adapter_id": adapter} if path == "jobs" else {"adapter_ids": [adapter]}

    wish = {**named, "method": method, "parameters": parameters, "reference": "pair"}
    body = problem(order(real, wish, path), 422, "invalid-wish")

    assert body["errors"][0]["pointer"] == pointer
    assert says in body["errors"][0]["detail"]
    assert body["rule"] == "bad-parameters"
    assert body["field"] == pointer[1:].replace("/", ".")
    assert body["field"] in body["detail"]
    assert says in body["detail"]
    assert opened(real) == 0


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("random_modules", {"count": 1}),
        ("random_modules", {}),  # ten by default, or all of fewer
        ("scale", {"strengths": [["*.q_proj", 0.5], ["*", 1]]}),
        # A patch may adapt what the upload does not: what is meant behind it only the worker knows.
        (
            "compose",
            {"steps": [{"method": "patch"}, {"method": "scale", "parameters": {"strengths": {"*.v_proj": 0}}}]},
        ),
    ],
)
def test_what_means_something_is_taken(real: Api, method: str, parameters: dict[str, Any]) -> None:
    files = {"patch": {"adapter_model.safetensors": "x"}}
    patch = {"patch_digest": f"sha256:{'7' * 64}", "patch_path": "/nowhere", "files": files}
    real.seed_reference("patched", {MODULE: (OUT, IN)}, **patch)
    wish = {"adapter_id": real.upload()["id"], "method": method, "parameters": parameters, "reference": "patched"}
    answer = order(real, wish)
    assert answer.status_code == 202, answer.text


def test_fused_experts_are_modules_of_their_own(real: Api) -> None:
    """As methods see them: each counts and can be named."""
    module = {"name": "l.0.mlp.experts.down_proj", "experts": 4, "rank": 2, "out_features": 8, "in_features": 6}
    inspection = {"modules": [{**module, "dtype": "F32", "kind": "linear", "scale": 1.0}]}
    new = NewAdapter(name="fused", digest=f"sha256:{'b' * 64}", size=1, files=[], inspection=inspection)
    with real.service.database.begin() as tx:
        adapter = adapters.create(tx, new, uploaded_by="token:x").id
    real.seed_reference("moe", {"l.0.mlp.experts.down_proj": (4, 8, 6)})  # type: ignore[dict-item] # of experts

    numbers = itertools.count()

    def answer(parameters: dict[str, Any], method: str) -> int:
        wish = {"adapter_id": adapter, "reference": "moe", "method": method, "parameters": parameters}
        return int(order(real, wish, key=f"{method}-{next(numbers)}").status_code)

    assert answer({"count": 4}, "random_modules") == 202
    assert answer({"count": 5}, "random_modules") == 422
    assert answer({"strengths": {"l.0.mlp.experts.3.down_proj": 0.5}}, "scale") == 202
    assert answer({"strengths": {"l.0.mlp.experts.4.down_proj": 0.5}}, "scale") == 422


POLICIES: dict[str, tuple[str, str, str]] = {
    "rule": (
        '[[trials]]\nmethod = "safe_lora"\ngrid = {threshold = [0.3], count = [3]}',
        "trials.0",
        "threshold or count",
    ),
    "second": (
        '[[trials]]\nmethod = "scale"\n[[trials]]\nmethod = "refusal_tune"\ngrid = {first = [0.1, 0.9]}',
        "trials.1",
        "before last",
    ),
    "range": ('[[trials]]\nmethod = "scale"\ngrid = {strength = [0.5, 2]}', "trials.0", "scale.strength"),
    "step": (
        '[[trials]]\nsteps = [{method = "scale"}, {method = "splora", grid = {count = [1], share = [0.5]}}]',
        "trials.0.steps.1",
        "splora.share",
    ),
    "unknown": ('[[trials]]\nmethod = "bless"', "trials.0", "bless"),
    "form": ('[[trials]]\nmethod = "scale"\ngrid = [1]', "trials.0.grid", "dictionary"),
}


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_that_tries_what_no_method_takes_cannot_be_ordered(real: Api, problem: Problem, name: str) -> None:
    """The operator's file is named, with the trial and the reason, instead of a failed job for each adapter."""
    text, field, says = POLICIES[name]
    lay(real, f'name = "own"\nversion = 1\n{text}\n')

    body = problem(order(real, {"adapter_id": real.seed_adapter(), "policy": "own"}), 422, "invalid-wish")

    assert (body["file"], body["field"], body["rule"]) == ("own.toml", field, "policy-invalid")
    assert says in body["detail"]
    assert body["errors"][0]["pointer"] == "/policy"
    assert opened(real) == 0


def test_a_policy_may_name_folders_of_the_machine_that_repairs(real: Api) -> None:
    """What is offered to nobody over HTTP is an operator's to say."""
    lay(
        real,
        'name = "own"\nversion = 1\n[[trials]]\nmethod = "resta"\ngrid = {twin = ["/srv/twin"], strength = [0.5]}\n',
    )
    assert order(real, {"adapter_id": real.seed_adapter(), "policy": "own"}).status_code == 202
    wish = {"adapter_id": real.seed_adapter(), "method": "resta", "parameters": {"twin": "/srv/twin"}}
    assert order(real, wish, key="other").status_code == 422


def lay(api: Api, text: str) -> None:
    """Where the operator's policies lie."""
    folder = api.service.settings.policies_dir
    folder.mkdir(parents=True)
    (folder / "own.toml").write_text(text)
