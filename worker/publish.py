"""From a plan to what is kept: the artifact folder, the report, the signed statements, the blobs.

The report holds no time, no job id and no fact of the machine, so equal inputs give an equal artifact; who made it,
when and on what is in the statements beside it. Nothing here is visible until the closing transaction names it.
"""

from __future__ import annotations

import platform
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import rfc8785
import torch

from gate.digest import sha256_file
from gate.names import WEIGHTS_FILE
from ledger import facts as attested
from ledger import provenance
from ledger.facts import JobFacts, Outcome, Resource, Step
from ledger.oms import sign_directory
from ledger.results import NewArtifact, NewStatement, Result
from ledger.tables import Verdict
from pages.document import REPORT_VERSION
from pages.render import render
from repair.adapter_file import read_adapter
from repair.checks.limits import limits_of
from repair.checks.planner import Plan, Tried
from repair.checks.planner import Verdict as PlanVerdict
from repair.checks.settling import SETTLING, VERSION, Settled
from repair.method import Decision
from repair.methods import METHODS
from repair.serving import serving_report
from worker.choice import choice_of
from worker.plain import plain

if TYPE_CHECKING:
    from collections.abc import Mapping
    from datetime import datetime
    from pathlib import Path

    from gate.admission import Admission
    from gate.errors import Refused
    from ledger.blobs import BlobStore
    from ledger.leases import Claim
    from ledger.signing import Signer
    from ledger.tables import Adapter, Reference
    from repair.checks.report import CheckReport
    from repair.errors import RepairError

REPORT = "report.json"
PAGE = "report.html"
LIBRARIES = ("lora-repair", "torch", "transformers", "safetensors", "numpy")


@dataclass(frozen=True, kw_only=True)
class Account:
    """Everything that is known when a job's work is done."""

    claim: Claim
    adapter: Adapter
    reference: Reference
    admission: Admission
    plan: Plan
    diagnostics: Mapping[str, Any]
    device: str
    started_at: datetime
    finished_at: datetime

    @property
    def verdict(self) -> Verdict:
        """The ledger's word for the plan's."""
        return Verdict(self.plan.verdict.value)


def refused(blobs: BlobStore, adapter: Adapter, refusal: Refused | RepairError) -> Result:
    """The bytes do not fit the reference that the job names, or cannot be measured on it; the report says where."""
    report: dict[str, Any] = {
        "report_version": REPORT_VERSION,
        "verdict": Verdict.REFUSED.value,
        "adapter": {"digest": adapter.digest, "files": adapter.files},
        # What the loaded model tells, it tells of a module; modules lie in the weights.
        "refusal": {**refusal.as_dict(), "file": refusal.file or WEIGHTS_FILE},
    }
    return Result(verdict=Verdict.REFUSED, report_digest=blobs.put_bytes(rfc8785.dumps(report)))


def publish(account: Account, blobs: BlobStore, signer: Signer, *, source: Path, folder: Path) -> Result:
    """Write, sign and store what the verdict calls for: for a release an artifact, otherwise the report alone."""
    report = rfc8785.dumps(report_of(account, source))
    if account.verdict is Verdict.QUARANTINED:
        return Result(verdict=account.verdict, report_digest=blobs.put_bytes(report))
    assemble(account, report, source=source, folder=folder)
    files = {path.name: sha256_file(path) for path in sorted(folder.iterdir())}
    statements = provenance.statements_for(facts_of(account, files))
    envelopes = [signer.sign(statement) for statement in statements]
    provenance.write_attestations(folder, envelopes)
    digest = sign_directory(folder, files, signer)
    stored: list[dict[str, Any]] = [dict(file) for file in blobs.put_directory(folder)]
    return Result(
        verdict=account.verdict,
        report_digest=files[REPORT],
        artifact=NewArtifact(digest=digest, files=stored),
        statements=tuple(
            NewStatement(predicate_type=statement.predicate_type, digest=statement.digest, envelope=envelope.as_dict())
            for statement, envelope in zip(statements, envelopes, strict=True)
        ),
    )


def assemble(account: Account, report: bytes, *, source: Path, folder: Path) -> None:
    """The files of the artifact: the upload's own bytes, or the winner's as they were measured."""
    winner = account.plan.winner
    if account.plan.verdict is PlanVerdict.RELEASED_REPAIRED and (winner is None or winner.directory is None):
        raise RuntimeError("a repaired release without the files that were measured")
    shutil.copytree(source if winner is None or winner.directory is None else winner.directory, folder)
    readme = source / "README.md"
    if readme.is_file() and not (folder / "README.md").exists():
        shutil.copyfile(readme, folder / "README.md")
    (folder / REPORT).write_bytes(report)
    (folder / PAGE).write_text(render(report), encoding="utf-8")


def report_of(account: Account, source: Path) -> dict[str, Any]:
    """The report as JSON: inputs with digests, every measurement, every module, who will serve it, the limits."""
    reference = account.reference
    uploaded, winner = read_adapter(source), account.plan.winner
    released = uploaded if winner is None or winner.adapter is None else winner.adapter
    document: dict[str, Any] = {
        "report_version": REPORT_VERSION,
        "adapter": {"digest": account.adapter.digest, "files": account.adapter.files},
        "inspection": account.admission.as_dict(),
        "reference": {
            "name": reference.name,
            "aligned": reference.aligned_digest,
            "base": reference.base_digest,
            "patch": reference.patch_digest,
            "calibration": reference.calibration_digest,
            "basis": reference.basis_digest,
            **({} if reference.twin_digest is None else {"twin": reference.twin_digest}),
        },
        "environment": conditions(account),
        "limits": limits_of(account.plan),
        **account.plan.as_dict(),
        "diagnostics": dict(account.diagnostics),
        "serving": serving_report(uploaded, released),
    }
    # Canonical JSON knows neither NaN nor numpy; what is not finite was not measured.
    cleaned: dict[str, Any] = plain(document)
    return cleaned


def conditions(account: Account) -> dict[str, Any]:
    """What besides the inputs is asked of the computation, and is the same on every machine with such a device."""
    suite = account.plan.input_report.suite
    return {
        "device_kind": account.device.partition(":")[0],
        "dtype": suite["backend"].get("dtype", "none"),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "seed": suite["seed"],
    }


def environment(account: Account) -> dict[str, Any]:
    """The conditions and the machine at hand, for the statements; docs/buildtypes/adapter-repair-v1.md names each."""
    return {
        **conditions(account),
        "device": torch.cuda.get_device_name() if account.device.startswith("cuda") else platform.machine(),
        "threads": torch.get_num_threads(),
    }


def versions() -> dict[str, str]:
    """Of the service and the libraries that compute."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed as a distribution"
    return found


def facts_of(account: Account, files: Mapping[str, str]) -> JobFacts:
    """What the statements say."""
    plan, reference = account.plan, account.reference
    after = plan.certify_report or plan.input_report
    return JobFacts(
        job_id=account.claim.job_id,
        attempt=account.claim.attempt,
        fence=account.claim.fence,
        started_at=account.started_at,
        finished_at=account.finished_at,
        verdict=account.verdict.value,
        adapter=Resource(
            name="adapter",
            digest=account.adapter.digest,
            files={file["name"]: file["sha256"] for file in account.adapter.files},
        ),
        aligned=Resource(name="aligned", digest=reference.aligned_digest, files=reference.files["aligned"]),
        base=part_of(reference, "base", reference.base_digest),
        patch=part_of(reference, "patch", reference.patch_digest),
        twin=part_of(reference, "twin", reference.twin_digest),
        calibration=pack_of("calibration", reference.calibration_digest),
        basis=pack_of("basis", reference.basis_digest),
        policy=Resource(name=f"policy/{plan.policy.name}", digest=plan.policy.digest),
        packs=packs_of(plan.input_report.suite.get("packs", {})),
        materials=packs_of(plan.winner.packs if plan.winner is not None else {}),
        files=files,
        wish=account.claim.spec,
        settled=settled_of(plan),
        steps=steps_of(plan),
        before=checks_of(plan.input_report),
        after=checks_of(after),
        environment=environment(account),
        versions=versions(),
        utility=next((one for one in measured(after) if one.get("name") == "utility"), {}),
        effect=effect_of(plan.winner),
        choice=choice_of(plan),
        cost={**plan.cost.as_dict(), "spent": plan.cost.spent},
    )


def part_of(reference: Reference, part: str, digest: str | None) -> Resource | None:
    """The base, the patch or the twin of a reference, where it has one."""
    return Resource(name=part, digest=digest, files=reference.files[part]) if digest else None


def pack_of(kind: str, digest: str | None) -> Resource | None:
    """A pack of the reference, where it has one; its digest is that of the header, which pins every other file."""
    return Resource(name=kind, digest=digest) if digest else None


def packs_of(packs: Mapping[str, str]) -> list[Resource]:
    """Prompt packs with their digests."""
    return [Resource(name=f"pack/{name}", digest=digest) for name, digest in sorted(packs.items())]


def settled_of(plan: Plan) -> Resource | None:
    """The adapter that was measured as the input, where whole tensors of the upload were settled before."""
    found = plan.settled
    return None if found is None else Resource(name="settled", digest=found.digest, files=found.files)


def steps_of(plan: Plan) -> tuple[Step, ...]:
    """What was applied, in order: what became of whole tensors first, then the winner's method."""
    settled, winner = plan.settled, plan.winner
    if winner is None:
        return ()
    first = () if settled is None else (settling_step(settled),)
    return first if winner.method == SETTLING else (*first, step_of(winner))


def settling_step(settled: Settled) -> Step:
    """What became of whole tensors; no module of a LoRA is changed by it."""
    return Step(
        method=SETTLING,
        version=VERSION,
        parameters={"how": str(settled.how)},
        modules_changed=0,
        modules_total=len(settled.adapter.layers),
    )


def step_of(winner: Tried) -> Step:
    """The method that was applied, with every parameter."""
    untouched = {Decision.KEPT, Decision.UNJUDGED}
    return Step(
        method=winner.method,
        version=winner.version,
        parameters=winner.parameters,
        modules_changed=sum(verdict.decision not in untouched for verdict in winner.modules),
        modules_total=len(winner.modules),
        paper=METHODS[winner.method].paper,
    )


def effect_of(winner: Tried | None) -> dict[str, Any]:
    """Norm of the whole update before and after."""
    if winner is None or not winner.modules:
        return {}
    return {
        "deltaNormBefore": sum(verdict.energy_before for verdict in winner.modules) ** 0.5,
        "deltaNormAfter": sum(verdict.energy_after for verdict in winner.modules) ** 0.5,
    }


def checks_of(report: CheckReport | None) -> list[attested.CheckResult]:
    """The checks that decide, in the words of the statement; informative ones have no outcome to attest."""
    known = {outcome.value for outcome in Outcome}
    return [
        attested.CheckResult(name=one["name"], outcome=Outcome(one["outcome"]), measured=one)
        for one in measured(report)
        if one["outcome"] in known
    ]


def measured(report: CheckReport | None) -> list[dict[str, Any]]:
    """Every check as plain JSON."""
    return [] if report is None else [plain(result.as_dict()) for result in report.checks]
