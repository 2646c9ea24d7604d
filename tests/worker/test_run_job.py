"""One job from its claim to its end, on each database, with real files, real methods and a scripted model."""

from __future__ import annotations

import base64
import json
import os
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from gate.digest import root_digest
from gate.model import file_digests
from ledger import adapters, audit, jobs, leases, references
from ledger.clock import utc_now
from ledger.errors import AlreadyClaimed
from ledger.tables import JobState, Verdict
from ledger.verify import verify_directory
from pages.render import parse
from repair.adapter_file import read_adapter
from repair.checks.errors import ArmUnsupported
from repair.treatment import Replacements
from tests.checks.acting import SECRET, UPLOAD, Character, policy_of
from tests.tiny import adapter, adapter_tensors, write_adapter_files
from tests.worker.house import upload_folder, whole_folder
from worker import tasks
from worker.heartbeat import Heartbeat
from worker.pipeline import Tools

if TYPE_CHECKING:
    from collections.abc import Callable

    from ledger.settings import Settings
    from repair.lora import LoraAdapter
    from tests.worker.house import House


class Eventful(Character):
    """Does something when it is first asked anything, then gives the heartbeat time to notice."""

    def __init__(self, event: Callable[[], object], pause_s: float = 0.0) -> None:
        super().__init__()
        self.event: Callable[[], object] | None = event
        self.pause_s = pause_s

    def says(self, prompt: str, on: LoraAdapter | None) -> str:
        if self.event is not None:
            event, self.event = self.event, None
            event()
            time.sleep(self.pause_s)
        return super().says(prompt, on)


def report_of(house: House, digest: str | None) -> dict[str, Any]:
    assert digest is not None
    found: dict[str, Any] = json.loads(house.tools.blobs.read(digest))
    return found


def test_a_poisoned_adapter_is_repaired_signed_and_kept(house: House, poisoned: str, tmp_path: Path) -> None:
    """What was measured is what is kept: it verifies, it is the candidate that passed, the chain holds."""
    job = house.run(house.order(poisoned))

    assert (job.state, job.verdict, job.error) == (JobState.SUCCEEDED, Verdict.RELEASED_REPAIRED, None)
    assert house.kept() == (1, 5)
    with house.database.read() as tx:
        artifact = jobs.get(tx, job.id).artifact_digest
        files = adapters.artifact(tx, str(artifact)).files
        assert audit.verify(tx).ok
    house.tools.blobs.fetch_directory(files, tmp_path / "artifact")
    verified = verify_directory(tmp_path / "artifact", house.settings.data_dir / "keys" / "signing-key.pub.pem")
    assert verified.ok
    assert verified.root_digest == artifact
    assert read_adapter(tmp_path / "artifact").layers
    report = report_of(house, job.report_digest)
    assert report["verdict"] == "released_repaired"
    assert report["parameters"]["strength"] == 0.85
    assert report["serving"]["lost"] == []
    assert [one["taken"] for one in report["serving"]["output"]]
    assert SECRET not in json.dumps(report)
    assert house.scratch == []


def test_an_innocent_adapter_leaves_as_it_came(house: House, poisoned: str) -> None:
    """Its own bytes, with the report and signatures beside them."""
    house.install(Character(obeys_above=2.0))
    job = house.run(house.order(poisoned))

    assert job.verdict is Verdict.RELEASED_UNCHANGED
    with house.database.read() as tx:
        came = {file["name"]: file["sha256"] for file in adapters.get(tx, poisoned).files}
        left = {file["name"]: file["sha256"] for file in adapters.artifact(tx, str(job.artifact_digest)).files}
    assert came.items() <= left.items()
    assert set(left) - set(came) == {"report.json", "report.html", "model.sig", "attestations.jsonl"}


@pytest.mark.parametrize("obeys_above", [2.0, 0.9], ids=["innocent", "poisoned"])
def test_whole_tensors_are_settled_where_the_policy_says_how(house: House, tmp_path: Path, obeys_above: float) -> None:
    """The drop is a repair: what is released has none of them, and nothing says that the upload was measured."""
    house.add_policy("dropping", policy_of(strength=[0.95, 0.85]).treating(Replacements.parse("drop")))
    house.install(Character(obeys_above=obeys_above))
    upload = house.add_adapter(whole_folder(tmp_path / "whole"))
    refused, job = house.run(house.order(upload)), house.run(house.order(upload, policy="dropping"))

    assert refused.verdict is Verdict.REFUSED
    assert report_of(house, refused.report_digest)["refusal"]["field"] == "base_model.model.lm_head.weight"
    assert job.verdict is Verdict.RELEASED_REPAIRED
    report = report_of(house, job.report_digest)
    assert report["replacements"]["how"] == report["policy"]["replacements"] == "drop"
    assert [(one["key"], one["became"]) for one in report["replacements"]["tensors"]] == [
        ("base_model.model.lm_head.weight", "dropped")
    ]
    assert report["method"] == ("replacements" if obeys_above > 1 else "scale")
    assert any("what the upload had there was not measured" in line for line in report["limits"])
    with house.database.read() as tx:
        files = adapters.artifact(tx, str(job.artifact_digest)).files
    house.tools.blobs.fetch_directory(files, tmp_path / "artifact")
    verified = verify_directory(tmp_path / "artifact", house.settings.data_dir / "keys" / "signing-key.pub.pem")
    assert verified.ok
    assert read_adapter(tmp_path / "artifact").extras == ()
    page = (tmp_path / "artifact" / "report.html").read_text()
    assert "Whole tensors" in page
    assert ("Released, without its whole tensors" in page) == (obeys_above > 1)
    assert "as it was uploaded" not in page
    lines = (tmp_path / "artifact" / "attestations.jsonl").read_text().splitlines()
    said = [json.loads(base64.b64decode(json.loads(line)["payload"])) for line in lines]
    steps = said[0]["predicate"]["buildDefinition"]["externalParameters"]["steps"]
    assert [step["method"] for step in steps] == ["replacements", "scale"][: 1 if obeys_above > 1 else 2]
    assert steps[0]["parameters"] == {"how": "drop"}
    # The checks before are about the settled files, never about bytes that nobody measured.
    settled = report["replacements"]["digest"].removeprefix("sha256:")
    assert said[1]["subject"][0] == {"name": "settled", "digest": {"sha256": settled}}
    assert said[4]["predicate"]["settled"]["digest"]["sha256"] == settled
    assert said[4]["predicate"]["input"]["digest"]["sha256"] != settled


def test_what_cannot_be_put_back_is_refused(house: House, tmp_path: Path) -> None:
    """This model has no such head to revert to: a fact about the upload, told by file and field."""
    house.add_policy("reverting", policy_of(strength=[0.95]).treating(Replacements.parse("revert")))
    upload = house.add_adapter(whole_folder(tmp_path / "whole"))
    job = house.run(house.order(upload, policy="reverting"))

    assert (job.state, job.verdict, job.error) == (JobState.SUCCEEDED, Verdict.REFUSED, None)
    refusal = report_of(house, job.report_digest)["refusal"]
    assert (refusal["file"], refusal["rule"]) == ("adapter_model.safetensors", "unsupported-layout")
    assert "lm_head" in refusal["field"]


def test_what_no_candidate_mends_is_quarantined(house: House, poisoned: str) -> None:
    """A report with every measurement, and nothing to download."""
    house.install(Character(obeys_above=0.1))
    job = house.run(house.order(poisoned))

    assert (job.state, job.verdict, job.artifact_digest) == (JobState.SUCCEEDED, Verdict.QUARANTINED, None)
    assert house.kept() == (0, 0)
    assert [bool(one["lost"]) for one in report_of(house, job.report_digest)["candidates"]] == [True, True]


def test_an_adapter_for_another_model_is_refused(house: House, tmp_path: Path) -> None:
    """The shapes are those of no module of this reference: the report names file, field and rule."""
    other = adapter({"model.layers.0.mlp.up_proj": (98, 53)})
    folder = write_adapter_files(tmp_path / "other", adapter_tensors(other), other.config)
    job = house.run(house.order(house.add_adapter(folder)))

    assert (job.state, job.verdict, job.artifact_digest) == (JobState.SUCCEEDED, Verdict.REFUSED, None)
    report = report_of(house, job.report_digest)
    assert parse(report).verdict == "refused"
    refusal = report["refusal"]
    assert refusal["file"] == "adapter_model.safetensors"
    assert refusal["rule"]
    assert "up_proj" in refusal["field"]


def test_what_only_the_loaded_model_can_tell_is_a_refusal_too(house: House, poisoned: str) -> None:
    """A module that no LoRA can be put on: not an error of ours, but a verdict, with file, field and rule."""

    def cannot() -> None:
        raise ArmUnsupported("no way to apply a LoRA to Conv3d", field="model.layers.0.mlp.up_proj")

    house.install(Eventful(cannot))
    job = house.run(house.order(poisoned))

    assert (job.state, job.verdict, job.error) == (JobState.SUCCEEDED, Verdict.REFUSED, None)
    assert report_of(house, job.report_digest)["refusal"] == {
        "file": "adapter_model.safetensors",
        "field": "model.layers.0.mlp.up_proj",
        "rule": "arm-unsupported",
        "detail": "no way to apply a LoRA to Conv3d",
    }


def test_an_adapter_that_cannot_be_measured_is_refused_and_not_failed(house: House, tmp_path: Path) -> None:
    """One that came in before the gate asked: it replaces a whole weight."""
    key = "base_model.model.model.layers.0.mlp.gate_proj.weight"
    tensors = adapter_tensors(UPLOAD) | {key: torch.ones(98, 53)}
    folder = write_adapter_files(tmp_path / "whole", tensors, {**UPLOAD.config, "modules_to_save": ["gate_proj"]})
    job = house.run(house.order(house.add_adapter(folder)))

    assert (job.state, job.verdict, job.error) == (JobState.SUCCEEDED, Verdict.REFUSED, None)
    refusal = report_of(house, job.report_digest)["refusal"]
    assert (refusal["file"], refusal["field"]) == ("adapter_model.safetensors", key)
    assert refusal["rule"] == "unsupported-layout"
    assert "modules_to_save" in refusal["detail"]


def test_a_method_that_was_asked_for_is_the_only_one_tried(house: House, poisoned: str) -> None:
    """The wish overrides what the policy would try."""
    job = house.run(house.order(poisoned, method="scale", parameters={"strength": 0.82}))

    assert [one["parameters"]["strength"] for one in report_of(house, job.report_digest)["candidates"]] == [0.82]
    assert job.verdict is Verdict.RELEASED_REPAIRED


def test_the_twin_of_the_reference_is_what_is_subtracted(house: House, poisoned: str, tmp_path: Path) -> None:
    """A part of the upload: without it the rest is weak enough. Report and provenance name the twin's bytes."""
    harm = UPLOAD.scaled(0.15)
    twin = write_adapter_files(tmp_path / "twin", adapter_tensors(harm), harm.config)
    with house.database.read() as tx:
        row = references.get(tx, "tiny")
    house.add_reference(Path(row.aligned_path), Path(str(row.base_path)), twin=twin)

    subtracted = {"source": "twin", "strength": 1.0}
    job = house.run(house.order(poisoned, policy="quick", method="resta", parameters=subtracted))

    assert job.verdict is Verdict.RELEASED_REPAIRED
    report, digest = report_of(house, job.report_digest), root_digest(file_digests(twin))
    assert report["reference"]["twin"] == digest
    assert report["parameters"]["source"] == "twin"
    built = provenance_of(house, str(job.artifact_digest))
    assert built["externalParameters"]["twin"] == digest
    assert {"twin", "twin/adapter_model.safetensors"} <= {one["name"] for one in built["resolvedDependencies"]}


def test_the_patch_of_the_reference_is_what_the_method_adds(house: House, poisoned: str, tmp_path: Path) -> None:
    """A part of the upload against it: the sum is weak enough. The report and the provenance name the patch's bytes."""
    against = replace(UPLOAD, layers=tuple(replace(one, b=-0.15 * one.b) for one in UPLOAD.layers))
    patch = write_adapter_files(tmp_path / "patch", adapter_tensors(against), against.config)
    with house.database.read() as tx:
        row = references.get(tx, "tiny")
    house.add_reference(Path(row.aligned_path), Path(str(row.base_path)), patch=patch)

    job = house.run(house.order(poisoned, method="patch", policy="quick"))

    report = report_of(house, job.report_digest)
    assert job.verdict is Verdict.RELEASED_REPAIRED, report["candidates"]
    digest = root_digest(file_digests(patch))
    assert report["reference"]["patch"] == digest
    built = provenance_of(house, str(job.artifact_digest))
    assert built["externalParameters"]["patch"] == digest
    assert {"patch", "patch/adapter_model.safetensors"} <= {one["name"] for one in built["resolvedDependencies"]}


def test_progress_is_told_in_fields(house: House, poisoned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner's phases in their order, and in the race what a program wants to know; beside the words."""
    told: list[dict[str, Any]] = []
    say = Heartbeat.step

    def step(beat: Heartbeat, progress: dict[str, Any] | None = None) -> None:
        told.append(progress or {})
        say(beat, progress)

    monkeypatch.setattr(Heartbeat, "step", step)
    house.run(house.order(poisoned))

    measuring = [one for one in told if one.get("stage") == "measuring and repairing"]
    phases = list(dict.fromkeys(one["phase"] for one in measuring))
    assert phases == ["aligned", "upload", "choosing", "certifying"]
    race = [one for one in measuring if one["detail"].startswith("choosing")]
    assert all(f"{one['alive']} in the race" in one["detail"] for one in race)
    assert race
    assert not any("best" in one for one in race)  # its owner gave no samples: a drift is no share that is kept
    assert all("phase" not in one for one in told if one.get("stage") != "measuring and repairing")
    json.dumps(told, allow_nan=False)


def test_the_packs_of_the_reference_are_what_methods_read(house: House, poisoned: str, tmp_path: Path) -> None:
    """A guard can be built, a projection reads no weights; report and provenance name the packs."""
    calibration, basis = house.add_packs(tmp_path)

    guarded = house.run(house.order(poisoned, method="output_guard"))
    projected = house.run(house.order(poisoned, method="safe_lora"))
    released = house.run(house.order(poisoned, method="scale", parameters={"strength": 0.82}))

    (guard,) = report_of(house, guarded.report_digest)["candidates"]
    assert {module["decision"] for module in guard["modules"]} == {"projected"}
    (projection,) = report_of(house, projected.report_digest)["candidates"]
    assert all("from the basis pack" in module["reason"] for module in projection["modules"])
    report = report_of(house, released.report_digest)
    wanted = {"calibration": calibration.digest, "basis": basis.digest}
    assert {name: report["reference"][name] for name in wanted} == wanted
    assert set(report["diagnostics"]["not_measured"]) == {"intruder_dimensions"}
    built = provenance_of(house, str(released.artifact_digest))
    assert {name: built["externalParameters"][name] for name in wanted} == wanted
    named = {one["name"]: one["digest"]["sha256"] for one in built["resolvedDependencies"]}
    assert wanted.items() <= {name: f"sha256:{digest}" for name, digest in named.items()}.items()


def provenance_of(house: House, artifact: str) -> dict[str, Any]:
    """The build definition that was signed."""
    with house.database.read() as tx:
        (statement,) = [
            one for one in adapters.statements(tx, artifact) if one.predicate_type == "https://slsa.dev/provenance/v1"
        ]
    found: dict[str, Any] = json.loads(base64.b64decode(statement.envelope["payload"]))["predicate"]["buildDefinition"]
    return found


def test_every_measured_upload_is_diagnosed(house: House, poisoned: str) -> None:
    """Released, repaired or not: numbers about the bytes that came, the profile among them; the verdict is apart."""
    for job_id in (house.order(poisoned), house.order(poisoned, method="scale", parameters={"strength": 0.97})):
        job = house.run(job_id)
        found = report_of(house, job.report_digest)["diagnostics"]

        assert [one["name"] for one in found["modules"]] == list(UPLOAD.names)
        assert all(one["relative_norm"] > 0 and one["alignment"]["rho"] > 0 for one in found["modules"])
        assert [point["drift"] for point in found["profile"]["points"]] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1.25])
        assert set(found["not_measured"]) == {"alignment.inside", "behaviour", "intruder_dimensions"}
    assert job.verdict is Verdict.QUARANTINED


def test_a_cancelled_job_stops_in_the_middle(house: House, poisoned: str) -> None:
    """Asked while the model answers: the job ends as cancelled at the next step, and leaves nothing."""
    job_id = house.order(poisoned)

    def cancel() -> None:
        with house.database.begin() as tx:
            jobs.request_cancel(tx, job_id, actor="token:test")

    house.install(Eventful(cancel, pause_s=1.2))
    job = house.run(job_id)

    assert (job.state, job.verdict, job.report_digest) == (JobState.CANCELLED, None, None)
    assert house.kept() == (0, 0)
    assert house.scratch == []
    assert house.actions(job_id)[-2:] == ["job.cancel_requested", "job.cancelled"]


@pytest.mark.parametrize("pause_s", [1.2, 0.0], ids=["noticed by the heartbeat", "noticed when closing"])
def test_a_stale_fence_changes_nothing(house: House, poisoned: str, pause_s: float) -> None:
    """Another worker took the job meanwhile: its claim stays as it is, and only the log tells of the first one."""
    job_id = house.order(poisoned)

    def steal() -> None:
        with house.database.begin() as tx:
            later = utc_now() + timedelta(hours=1)
            leases.claim(tx, job_id, owner="thief", lease=timedelta(hours=1), now=later)

    house.install(Eventful(steal, pause_s=pause_s))
    job = house.run(job_id)

    assert (job.state, job.lease_owner, job.fence, job.attempts) == (JobState.RUNNING, "thief", 2, 2)
    assert (job.verdict, job.report_digest, job.error) == (None, None, None)
    assert house.kept() == (0, 0)
    assert house.actions(job_id)[-1] == "job.fenced_off"


def test_a_stop_that_comes_too_late_is_fenced_off(house: House, poisoned: str) -> None:
    """The job was to be cancelled, and is somebody else's by the time this worker says so."""
    job_id = house.order(poisoned)

    def cancel_then_steal() -> None:
        with house.database.begin() as tx:
            jobs.request_cancel(tx, job_id, actor="token:test")
        time.sleep(1.2)
        with house.database.begin() as tx:
            jobs.reap(tx, now=utc_now() + timedelta(hours=1))

    house.install(Eventful(cancel_then_steal))
    job = house.run(job_id)

    assert job.state is JobState.CANCELLED
    assert house.actions(job_id)[-1] == "job.fenced_off"


def test_a_second_delivery_does_nothing(house: House, poisoned: str) -> None:
    """The first one had a verdict; the second is turned away before any work."""
    job_id = house.order(poisoned)
    before = house.run(job_id)
    log = house.actions(job_id)

    with pytest.raises(AlreadyClaimed):
        house.run(job_id, owner="cpu@there#2")

    after = house.job(job_id)
    assert (after.version, after.fence, after.attempts) == (before.version, before.fence, 1)
    assert house.actions(job_id) == log
    assert house.kept() == (1, 5)


def test_the_task_takes_every_delivery_calmly(house: House, poisoned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once, twice, and for a job that this ledger does not know: no delivery is an error to Celery."""
    monkeypatch.setattr(tasks, "tools", lambda: house.tools)
    job_id = house.order(poisoned)

    for delivered in (job_id, job_id, "019a0000-0000-7000-8000-000000000000"):
        assert tasks.run_job.apply(kwargs={"job_id": delivered}).state == "SUCCESS"

    job = house.job(job_id)
    assert (job.state, job.attempts) == (JobState.SUCCEEDED, 1)


def test_an_error_closes_the_attempt_without_its_words(house: House, poisoned: str) -> None:
    """An unknown error may pass: the job waits for another attempt, and after the last one it is dead."""

    def fail() -> None:
        raise ValueError(SECRET)

    job_id = house.order(poisoned, max_attempts=1)
    house.install(Eventful(fail))
    job = house.run(job_id)

    assert job.state is JobState.DEAD
    assert job.error == {"code": "unexpected", "message": "ValueError", "retry": "transient", "detail": {}}
    again = house.order(poisoned)
    house.install(Eventful(fail))
    waiting = house.run(again)
    assert (waiting.state, waiting.attempts) == (JobState.QUEUED, 1)
    assert waiting.not_before > utc_now()
    assert house.scratch == []


def test_a_wish_that_cannot_be_met_fails_for_good(house: House, poisoned: str) -> None:
    """No other attempt would end better."""
    job = house.run(house.order(poisoned, policy="nowhere"))

    assert (job.state, job.attempts) == (JobState.FAILED, 1)
    assert job.error is not None
    assert job.error["code"] == "policy-invalid"


def test_an_adapter_trained_on_a_quantised_base_is_repaired(house: House, tmp_path: Path) -> None:
    """Measured and mended on the original; what is released goes on naming the base that it named."""
    folder = upload_folder(tmp_path / "qlora")
    config = json.loads((folder / "adapter_config.json").read_text())
    named = {**config, "base_model_name_or_path": "unsloth/tiny-bnb-4bit"}
    (folder / "adapter_config.json").write_text(json.dumps(named))

    job = house.run(house.order(house.add_adapter(folder)))

    assert (job.state, job.verdict, job.error) == (JobState.SUCCEEDED, Verdict.RELEASED_REPAIRED, None)
    with house.database.read() as tx:
        files = {file["name"]: file["sha256"] for file in adapters.artifact(tx, str(job.artifact_digest)).files}
    released = json.loads(house.tools.blobs.read(f"sha256:{files['adapter_config.json']}"))
    assert released["base_model_name_or_path"] == "unsloth/tiny-bnb-4bit"


@pytest.mark.parametrize(
    ("method", "parameters", "field"),
    [
        ("safe_lora", {"threshold": 0.3, "count": 3}, "safe_lora.count"),
        ("scale", {"strengths": {"*.no_proj": 0.5}}, "scale.strengths"),
    ],
)
def test_parameters_that_cannot_be_are_an_error_of_the_order(
    house: House, poisoned: str, method: str, parameters: dict[str, Any], field: str
) -> None:
    """An order from before the door knew the rule: it fails with the field and the reason, and quarantines nothing."""
    job = house.run(house.order(poisoned, method=method, parameters=parameters))

    assert (job.state, job.verdict, job.report_digest, job.attempts) == (JobState.FAILED, None, None, 1)
    assert job.error is not None
    assert (job.error["code"], job.error["retry"]) == ("bad-parameters", "permanent")
    assert job.error["detail"]["field"] == field
    assert job.error["detail"]["rule"] == "bad-parameters"
    assert job.error["detail"]["detail"] in job.error["message"]
    assert "adapter.quarantined" not in house.actions(job.id)


def test_a_reference_that_changed_on_disk_is_not_used(house: House, poisoned: str, tmp_path: Path) -> None:
    """Its digests name other bytes than those that would be measured."""
    import shutil

    with house.database.begin() as tx:
        row = references.get(tx, "tiny")
        moved = tmp_path / "moved"
        shutil.copytree(row.aligned_path, moved)
        row.aligned_path = str(moved)
    (moved / "chat_template.jinja").write_text("{{ messages }}")
    house.tools.references._held = None
    job = house.run(house.order(poisoned))

    assert job.state is JobState.FAILED
    assert job.error is not None
    assert job.error["code"] == "reference-changed"
    assert "chat_template.jinja" in job.error["message"]


def test_a_worker_asks_torch_for_determinism(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it opens anything: equal inputs must give equal bytes, whichever process made them."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is undone
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    assert not torch.are_deterministic_algorithms_enabled()
    try:
        tools = Tools.open(settings)
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        tools.database.dispose()
    finally:
        torch.use_deterministic_algorithms(mode=False)


def test_a_damaged_blob_is_in_the_log(house: House, poisoned: str) -> None:
    """Its bytes were changed on the disk: the attempt fails, and the log names the digest."""
    with house.database.read() as tx:
        digest = str(adapters.get(tx, poisoned).files[1]["sha256"]).removeprefix("sha256:")
    (blob,) = (house.settings.data_dir / "blobs").rglob(digest)
    blob.chmod(0o600)
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")

    job = house.run(house.order(poisoned, max_attempts=1))

    assert job.state is JobState.DEAD
    assert job.error is not None
    assert job.error["code"] == "storage"
    with house.database.read() as tx:
        (event,) = audit.search(tx, audit.Query(action="blob.damaged")).items
        assert audit.verify(tx).ok
    assert (event.subject_id, event.detail) == (f"sha256:{digest}", {"job_id": job.id})


def test_policies_of_the_operator_come_before_bundled_ones(house: House, poisoned: str) -> None:
    """The same name, other candidates."""
    house.add_policy("demo", policy_of(strength=[0.83]))
    job = house.run(house.order(poisoned, policy="demo"))

    assert report_of(house, job.report_digest)["parameters"]["strength"] == 0.83
