"""Policies of the operator: files below the data folder, offered beside the bundled ones."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from safetensors.numpy import load, save

from tests.api.conftest import adapter_files, as_parts

if TYPE_CHECKING:
    from tests.api.conftest import Api, Problem


def test_a_policy_file_is_offered_at_once_and_can_be_ordered(api: Api) -> None:
    """No restart; the job names the file's policy."""
    wish = {"adapter_id": api.seed_adapter(), "policy": "strict"}
    headers = {"Idempotency-Key": "before"}
    assert api.client.post("/v1/jobs", json=wish, headers=headers).status_code == 422

    folder = api.service.settings.policies_dir
    folder.mkdir(parents=True)
    (folder / "strict.toml").write_text('name = "strict"\nversion = 3\n')
    (folder / "broken.toml").write_text("this is no TOML")

    offered = {policy["name"]: policy for policy in api.client.get("/v1/policies").json()["items"]}
    assert offered.keys() == {"demo", "standard", "strict"}
    assert offered["strict"]["version"] == 3
    answer = api.client.post("/v1/jobs", json=wish, headers={"Idempotency-Key": "after"})
    assert (answer.status_code, answer.json()["policy"]) == (202, "strict")


def whole() -> dict[str, bytes]:
    """An adapter that brings a head of its own."""
    files = adapter_files(modules_to_save=["lm_head"])
    tensors = load(files["adapter_model.safetensors"])
    tensors["base_model.model.lm_head.weight"] = np.ones((5, 4), np.float32)
    return {**files, "adapter_model.safetensors": save(tensors)}


def test_whole_tensors_come_in_where_a_policy_settles_them(api: Api, problem: Problem) -> None:
    """At the door as long as there is none, afterwards at the order, by the policy that would refuse them."""
    refused = problem(api.client.post("/v1/adapters", files=as_parts(whole())), 422, "adapter-refused")
    assert "lm_head" in str(refused)

    folder = api.service.settings.policies_dir
    folder.mkdir(parents=True)
    (folder / "dropping.toml").write_text('name = "dropping"\nversion = 1\nreplacements = "drop"\n')
    (folder / "broken.toml").write_text("replacements = 3")
    uploaded = api.client.post("/v1/adapters", files=as_parts(whole()), data={"reference": "tiny"})
    assert uploaded.status_code == 201
    wish = {"adapter_id": uploaded.json()["id"], "policy": "demo"}
    told = problem(api.client.post("/v1/jobs", json=wish, headers={"Idempotency-Key": "one"}), 422, "invalid-wish")
    assert told["errors"][0]["pointer"] == "/policy"
    assert "lm_head" in told["errors"][0]["detail"]
    assert "dropping" in told["errors"][0]["detail"]
    answer = api.client.post("/v1/jobs", json={**wish, "policy": "dropping"}, headers={"Idempotency-Key": "two"})
    assert answer.status_code == 202
    offered = {one["name"]: one["replacements"] for one in api.client.get("/v1/policies").json()["items"]}
    assert offered == {"demo": "refuse", "standard": "refuse", "dropping": "drop"}
