"""The planner as one more method: what `auto` releases, measured like everything else."""

import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.efficacy.lab import ZOO, Lab, numbers, task_samples
from repair.adapter_file import read_adapter
from repair.checks.packs import load_pack
from repair.checks.planner import Reference, plan
from repair.checks.policy import Policy
from repair.checks.verdict import Verdict


def widened(policy: Policy, packs: Sequence[str]) -> Policy:
    """The same bounds and methods with more harmful prompts on *certify*: all that ``packs`` hold there.

    The budget is counted in full checks, which grow with the prompts; it shrinks as their number grows, so that it pays
    for about as much on *select*. Longer prompts make it larger than it was.
    """
    if not packs:
        return policy
    suite, budget = policy.suite, policy.budget
    mine = suite.packs.model_copy(update={"harmful": (*suite.packs.harmful, *packs)})
    asked = sum(len(load_pack(one).of_half("certify")) for one in packs)
    more = suite.certify.model_copy(update={"harmful": suite.certify.harmful + asked})
    checks = budget.full_checks * suite.certify.prompts / more.prompts
    return policy.model_copy(
        update={
            "name": "+".join((policy.name, *packs)),
            "suite": suite.model_copy(update={"packs": mine, "certify": more}),
            "budget": budget.model_copy(update={"full_checks": checks}),
        }
    )


def measure_auto(lab: Lab, name: str, policy: Policy) -> dict[str, Any] | None:
    """Plan under ``policy`` and take the numbers of its last look at *certify*; without a look there are none.

    None when time is up.
    """
    key = f"{lab.run}-auto-{name}-{policy.digest[-12:]}"
    if key not in lab.store.rows and time.monotonic() > lab.deadline:
        return None
    lab.seen[key] = None
    if key in lab.store.rows:
        return lab.store.rows[key]
    uploaded = read_adapter(ZOO / "adapters" / name)
    context = lab.context
    if context.aligned is None:
        raise ValueError("the planner needs the aligned model")
    reference = Reference(
        aligned=context.aligned,
        base=context.base,
        chat=lab.chat,
        patch=context.patch,
        calibration=context.calibration,
        digest=lab.reference["aligned"],
    )
    samples = (*task_samples(lab.policy, "select"), *task_samples(lab.policy, "certify"))
    start = time.perf_counter()
    with TemporaryDirectory() as folder:
        found = plan(uploaded, reference=reference, policy=policy, work_dir=Path(folder), samples=samples)
    winner = found.winner
    row: dict[str, Any] = {"key": key, "adapter": name, "group": "auto", "half": "certify"}
    row |= {"verdict": found.verdict.value, "label": "" if winner is None else winner.label, "policy": policy.name}
    row |= {"build_seconds": round(time.perf_counter() - start, 1), "cost": found.cost.as_dict()}
    row |= {"candidates": len(found.candidates), "dtype": lab.reference["dtype"]}
    # Its own certificate: what the planner saw of exactly the released bytes, every prompt asked.
    report = found.input_report if found.verdict is Verdict.RELEASED_UNCHANGED else found.certify_report
    if report is not None:
        row |= numbers(report) | {"measure_seconds": 0.0}
    return lab.store.add(row)
