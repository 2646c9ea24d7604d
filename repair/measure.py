"""What `python -m repair` measures: an adapter against a policy's bounds, and the planner on local folders.

Loads the reference into memory; `commands.py` holds what does without.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

from pages.document import REPORT_VERSION
from repair.adapter_file import copy_adapter, read_adapter
from repair.checkpoint import Checkpoint
from repair.checks.backend import Backend, Capability, Sample
from repair.checks.backends import backend_named, files_of
from repair.checks.errors import CheckError
from repair.checks.evidence import CheckOutcome
from repair.checks.judge import Judge
from repair.checks.judging import judge_of
from repair.checks.limits import limits_of, limits_of_report
from repair.checks.planner import Reference, Verdict, plan
from repair.checks.policy import Policy, load_policy
from repair.checks.report import CheckReport
from repair.checks.robustness import ask_framed
from repair.checks.robustness_settings import framings_named
from repair.checks.run import Original, run_checks
from repair.checks.usable import require_usable
from repair.checks.withstood import with_robustness
from repair.commands import (
    Answer,
    Exit,
    Place,
    admitted,
    aligned_of,
    any_basis_of,
    calibration_of,
    chat_of,
    keep_readme,
    must_be_free,
    patch_of,
    twin_of,
)
from repair.context import RepairContext
from repair.diagnostics.account import diagnose
from repair.elsewhere import Elsewhere
from repair.errors import BadParameters
from repair.lora import LoraAdapter
from repair.report import adapter_digests, digests, environment
from repair.serving import serving_report
from repair.treatment import Replacements

CODES: Final = {
    CheckOutcome.PASS: Exit.OK,
    CheckOutcome.FAIL: Exit.REFUSED_BY_POLICY,
    CheckOutcome.INCONCLUSIVE: Exit.INCONCLUSIVE,
}


def repair_by_policy(
    adapter: Path,
    policy_name: str,
    place: Place,
    out: Path,
    *,
    samples: Path | None,
    replacements: Replacements | None = None,
) -> Answer:
    """The planner on local folders: a released folder, or the evidence why there is none.

    ``replacements`` stands in the place of what the policy says about whole tensors, and the report says that it does.
    """
    must_be_free(out)
    named, uploaded = load_policy(policy_name), admitted(adapter)
    policy = named if replacements is None else named.treating(replacements)
    judge = judge_of(policy.judge)
    require_usable(policy, judge.info)  # before a model is hashed and loaded
    inputs = place.inputs(adapter)
    reference = Reference(
        aligned=Checkpoint.open(aligned_of(place)),
        base=None if place.base is None else Checkpoint.open(place.base),
        chat=chat_of(place),
        patch=patch_of(place, inputs),
        twin=twin_of(place, inputs),
        calibration=calibration_of(place, inputs),
        basis=any_basis_of(place, inputs),
        digest=inputs["aligned"]["digest"],
    )
    outputs: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="lora-repair-") as work:
        planned = plan(
            uploaded,
            reference=reference,
            policy=policy,
            work_dir=Path(work),
            samples=_samples(samples),
            device=place.device,
            judge=judge,
            progress=place.progress,
        )
        found = _diagnostics(uploaded, reference, place)
        if planned.verdict is Verdict.RELEASED_UNCHANGED:
            copy_adapter(adapter, out)
        elif planned.winner is not None and planned.winner.directory is not None:
            copy_adapter(planned.winner.directory, out)
    if planned.verdict is not Verdict.QUARANTINED:
        keep_readme(adapter, out)
        outputs["adapter"] = adapter_digests(out)
    document: dict[str, Any] = {
        "report_version": REPORT_VERSION,
        **planned.as_dict(),
        "limits": limits_of(planned),
        "inputs": inputs,
        "outputs": outputs,
        "diagnostics": found,
        "environment": environment(place.device),
    }
    if policy.replacements != named.replacements:
        document["overridden"] = {"replacements": named.replacements}
    if outputs:
        document["serving"] = serving_report(uploaded, read_adapter(out))
    return Answer(document=document, code=CODES[planned.outcome])


def _diagnostics(uploaded: LoraAdapter, reference: Reference, place: Place) -> dict[str, Any]:
    context = RepairContext(
        aligned=reference.aligned,
        base=reference.base,
        calibration=reference.calibration,
        basis=reference.basis,
        chat=reference.chat,
        device=place.device,
        progress=place.progress,
    )
    return diagnose(uploaded, context, weights=True)


def check(
    adapter: Path | None,
    suite: str,
    place: Place,
    *,
    samples: Path | None,
    there: Elsewhere | None = None,
    robustness: str | None = None,
) -> Answer:
    """Measure an adapter, or the aligned model alone, against a policy's bounds; nothing is stopped early.

    The model is loaded here, or asked ``there``. The framings of ``robustness`` are put whatever the rest says;
    without it those of the policy.
    """
    policy, known = load_policy(suite), _samples(samples)
    if robustness is not None:
        policy = policy.put_to(framings_named(robustness))
    judge = judge_of(policy.judge)
    require_usable(policy, judge.info)
    uploaded = None if adapter is None else admitted(adapter)
    inputs = {} if adapter is None else {"adapter": adapter_digests(adapter)}
    files = {} if adapter is None or uploaded is None else files_of((uploaded, adapter))
    with _backend(place, there, files) as backend:
        able = backend.capabilities()
        if uploaded is not None and not able.has(Capability.ADAPTERS):
            raise CheckError(able.missing[Capability.ADAPTERS], field="endpoint")
        report = run_checks(
            backend, None, policy, "certify", arm="aligned", judge=judge, stop_early=False, progress=place.progress
        )
        if uploaded is not None:
            report = run_checks(
                backend,
                uploaded,
                policy,
                "certify",
                aligned=report,
                judge=judge,
                original=Original.measure(backend, uploaded, known),
                stop_early=False,
                progress=place.progress,
            )
        if policy.robustness.framings:
            report = _put_otherwise(report, uploaded, backend, policy, judge=judge, place=place)
    inputs["aligned"] = digests(aligned_of(place))
    document = {
        **report.as_dict(),
        "limits": limits_of_report(report, policy),
        "inputs": inputs,
        "environment": environment(place.device),
    }
    return Answer(document=document, code=CODES[report.outcome])


def _put_otherwise(
    report: CheckReport, uploaded: LoraAdapter | None, backend: Backend, policy: Policy, *, judge: Judge, place: Place
) -> CheckReport:
    """The report with the robustness stage, whatever else it says."""
    put = partial(ask_framed, backend, policy=policy, judge=judge, progress=place.progress)
    aligned = put(None, arm="aligned")
    if uploaded is None:
        return with_robustness(report, aligned, None, policy, judge.info)
    return with_robustness(report, put(uploaded, arm="input"), aligned, policy, judge.info)


@contextmanager
def _backend(place: Place, there: Elsewhere | None, files: dict[int, Path]) -> Iterator[Backend]:
    if there is None:
        yield chat_of(place)
        return
    wish = there.served(aligned_of(place), files)
    with backend_named(there.backend)(wish) as backend:
        yield backend


def _samples(path: Path | None) -> list[Sample]:
    if path is None:
        return []
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
        return [Sample(prompt=str(row["prompt"]), answer=str(row["answer"])) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        detail = f"one JSON object with prompt and answer in each line is wanted: {error!r}"
        raise BadParameters(detail, field="samples", file=path.name) from error
