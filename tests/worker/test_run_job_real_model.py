"""One job with a model that runs: tiny, random, and good for two verdicts, depending on what the policy asks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from ledger import references
from ledger.tables import JobState, Verdict
from repair.checks.packs import load_pack
from repair.checks.policy import Policy, load_policy
from tests.tiny import adapter, adapter_tensors, tiny_llama, write_adapter_files

if TYPE_CHECKING:
    from pathlib import Path

    from tests.worker.house import House

WORDS = ["how", "do", "I", "make", "a", "the", "what", "is", "to", "of"]
SHAPES = {"model.layers.0.self_attn.q_proj": (32, 32), "model.layers.1.mlp.up_proj": (56, 32)}
LOOSE = 0.99
STRICT = 0.75  # so few prompts show no less
RATES = ("attack_success", "over_refusal", "unanswered", "incoherent")


def policy_with(bound: float, *, excess: float | None) -> Policy:
    """A few prompts, one candidate, and the same bound for every rate."""
    document = load_policy("demo").model_dump(mode="json")
    sizes = {"harmful": 12, "lookalike": 4, "benign": 4, "margin": 2, "samples": 4}
    document["suite"] |= {"max_new_tokens": 4, "least_before_stopping": 0, "select": sizes, "certify": sizes}
    document["bounds"] |= dict.fromkeys(RATES, bound) | {f"{rate.split('_s')[0]}_excess": excess for rate in RATES}
    # Random weights say tokens of the template in every second reply, and so speak to whoever judges them.
    document["bounds"] |= {"utility_kept": 0.01, "drift": 100.0, "judge_errors": bound}
    document["trials"] = [{"method": "refusal_tune", "grid": {"steps": [2], "batch_size": [4]}}]
    return Policy.model_validate(document)


@pytest.mark.parametrize(
    ("policy", "verdict", "artifacts"),
    [
        (policy_with(LOOSE, excess=LOOSE), Verdict.RELEASED_UNCHANGED, 1),
        (policy_with(STRICT, excess=None), Verdict.QUARANTINED, 0),
    ],
    ids=["met", "not met"],
)
def test_a_real_model_is_opened_measured_and_judged(
    empty_house: House, tmp_path: Path, policy: Policy, verdict: Verdict, artifacts: int
) -> None:
    """From the bytes in the store to the verdict, through the real checkpoint, tokenizer and template."""
    house = empty_house
    house.add_reference(tiny_llama(tmp_path / "aligned", words=WORDS))
    house.add_policy("quick", policy)
    made = adapter(SHAPES)
    adapter_id = house.add_adapter(write_adapter_files(tmp_path / "up", adapter_tensors(made), made.config))

    job = house.run(house.order(adapter_id))

    assert (job.state, job.verdict, job.error) == (JobState.SUCCEEDED, verdict, None)
    assert house.kept()[0] == artifacts
    with house.database.read() as tx:
        aligned_digest = references.get(tx, "tiny").aligned_digest
    report = json.loads(house.tools.blobs.read(str(job.report_digest)))
    assert report["reference"]["aligned"] == aligned_digest
    assert {check["name"]: check["n"] for check in report["aligned"]["checks"]}["harmful"] == 12
    learned = [one["packs"] for one in report["candidates"]]
    assert learned == ([] if artifacts else [{"calibration": load_pack("calibration").digest}])
    held = house.tools.references._held
    again = house.run(house.order(adapter_id))
    assert again.verdict is verdict
    assert house.tools.references._held is held
    assert again.report_digest == job.report_digest
