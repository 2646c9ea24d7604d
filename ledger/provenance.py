"""What a job says about the artifact that it made: in-toto statements, from the facts in `ledger.facts`.

Pure: no clock, no key, no database; the same facts give the same bytes. `statements_for` builds,
`Signer.sign` signs, `write_attestations` puts the envelopes beside the files. Fields and parameters:
docs/buildtypes/adapter-repair-v1.md.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, final

from ledger.clock import rfc3339
from ledger.digests import bare_hex
from ledger.dsse import canonical
from ledger.durable import write_durably
from ledger.errors import SigningError
from ledger.facts import Outcome, descriptor
from ledger.oms import ATTESTATIONS_NAME, STATEMENT_TYPE, SUBJECT_NAME

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from ledger.dsse import Envelope
    from ledger.facts import CheckResult, JobFacts, Resource, Step

BUILD_TYPE = "https://lora-repair.github.io/buildtypes/adapter-repair/v1"
SLSA_PROVENANCE = "https://slsa.dev/provenance/v1"
TEST_RESULT = "https://in-toto.io/attestation/test-result/v0.1"
VERIFICATION_RESULT = "https://in-toto.io/attestation/svr/v0.2"
ADAPTER_REPAIR = "https://lora-repair.github.io/attestation/adapter-repair/v0.1"


@final
@dataclass(frozen=True, kw_only=True)
class Statement:
    """An in-toto Statement v1, not yet signed."""

    predicate_type: str
    subjects: tuple[dict[str, Any], ...]
    predicate: Mapping[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """The statement as JSON wants it."""
        return {
            "_type": STATEMENT_TYPE,
            "subject": list(self.subjects),
            "predicateType": self.predicate_type,
            "predicate": dict(self.predicate),
        }

    @property
    def payload(self) -> bytes:
        """The bytes to be signed."""
        return canonical(self.as_dict())

    @property
    def digest(self) -> str:
        """The name of this statement: the digest of its bytes."""
        return f"sha256:{hashlib.sha256(self.payload).hexdigest()}"


def statements_for(facts: JobFacts) -> tuple[Statement, ...]:
    """The statements of one artifact; the last one names all others, so that none can be taken away.

    The checks *before* speak of the input, whose digest is their subject: the upload, or what was left of it when whole
    tensors had been settled. All others speak of the artifact.
    """
    _check_times(facts)
    subjects = (
        descriptor(SUBJECT_NAME, facts.root),
        *(descriptor(n, facts.files[n]) for n in sorted(facts.files)),
    )
    adapter = tuple((facts.settled or facts.adapter).described())
    before = Statement(predicate_type=TEST_RESULT, subjects=adapter, predicate=_test_result(facts, facts.before))
    after = Statement(predicate_type=TEST_RESULT, subjects=subjects, predicate=_test_result(facts, facts.after))
    named = (
        Statement(predicate_type=SLSA_PROVENANCE, subjects=subjects, predicate=_slsa(facts)),
        before,
        after,
        Statement(predicate_type=VERIFICATION_RESULT, subjects=subjects, predicate=_verification(facts)),
    )
    repair = _adapter_repair(facts, before=before, after=after, named=named)
    return (*named, Statement(predicate_type=ADAPTER_REPAIR, subjects=subjects, predicate=repair))


def write_attestations(folder: Path, envelopes: Iterable[Envelope]) -> Path:
    """Write `attestations.jsonl`: one canonical envelope a line."""
    path = folder / ATTESTATIONS_NAME
    write_durably(path, [canonical(envelope.as_dict()) + b"\n" for envelope in envelopes])
    return path


def _check_times(facts: JobFacts) -> None:
    if facts.started_at.utcoffset() is None or facts.finished_at.utcoffset() is None:
        raise SigningError("the times of a job must say their time zone")
    if facts.finished_at - facts.started_at < timedelta(0):
        raise SigningError("a job cannot end before it began")


def _slsa(facts: JobFacts) -> dict[str, Any]:
    """SLSA provenance v1. Consumers refuse unknown external parameters, so the set is documented."""
    external: dict[str, Any] = {
        "adapter": _uri(facts.adapter),
        "alignedModel": _uri(facts.aligned),
        "policy": _uri(facts.policy),
        "checkSuite": [_uri(pack) for pack in facts.packs],
        "wish": _flat(facts.wish),
        "steps": [_step(step) for step in facts.steps],
    }
    if facts.base is not None:
        external["baseModel"] = _uri(facts.base)
    tools = {"patch": facts.patch, "calibration": facts.calibration, "basis": facts.basis, "twin": facts.twin}
    external |= {name: _uri(tool) for name, tool in tools.items() if tool is not None}
    known = [one for one in (facts.base, *tools.values()) if one is not None]
    inputs = [facts.adapter, facts.aligned, *known, facts.policy, *facts.packs, *facts.materials]
    return {
        "buildDefinition": {
            "buildType": BUILD_TYPE,
            "externalParameters": external,
            "internalParameters": _flat(facts.environment),
            "resolvedDependencies": [one for resource in inputs for one in resource.described()],
        },
        "runDetails": {
            "builder": {"id": facts.builder_id, "version": dict(facts.versions)},
            "metadata": {
                "invocationId": f"{facts.job_id}/attempts/{facts.attempt}/fences/{facts.fence}",
                "startedOn": rfc3339(facts.started_at),
                "finishedOn": rfc3339(facts.finished_at),
            },
            "byproducts": [one for resource in facts.byproducts for one in resource.described()],
        },
    }


def _uri(resource: Resource) -> str:
    """The address of an input, or its digest where it has none that others could follow."""
    return resource.uri or f"sha256:{bare_hex(resource.digest)}"


def _step(step: Step) -> dict[str, Any]:
    spelled = {"method": step.method, "version": str(step.version), "parameters": _flat(step.parameters)}
    return {**spelled, "paper": step.paper} if step.paper else spelled


def _flat(values: Mapping[str, Any]) -> dict[str, str]:
    """Strings, as SLSA advises: a string is itself, anything else its canonical JSON."""
    return {name: value if isinstance(value, str) else _json(value) for name, value in values.items()}


def _json(value: Any) -> str:
    """Canonical JSON of one value, and an integer of any size: a seed may have more than 53 bits."""
    if type(value) is int:
        return str(value)
    return canonical({"": value}).decode("utf-8").removeprefix('{"":').removesuffix("}")


def _test_result(facts: JobFacts, results: Sequence[CheckResult]) -> dict[str, Any]:
    """Test result v0.1. What was not decided is a warning; nothing measured at all is never a pass."""
    by_outcome: dict[Outcome, list[str]] = {outcome: [] for outcome in Outcome}
    for result in results:
        by_outcome[result.outcome].append(result.name)
    warned = sorted(by_outcome[Outcome.INCONCLUSIVE] + by_outcome[Outcome.SKIPPED])
    return {
        "result": _overall(failed=bool(by_outcome[Outcome.FAIL]) or not results, warned=bool(warned)),
        "configuration": [one for resource in (facts.policy, *facts.packs) for one in resource.described()],
        "passedTests": sorted(by_outcome[Outcome.PASS]),
        "warnedTests": warned,
        "failedTests": sorted(by_outcome[Outcome.FAIL]),
    }


def _overall(*, failed: bool, warned: bool) -> str:
    if failed:
        return "FAILED"
    return "WARNED" if warned else "PASSED"


def _verification(facts: JobFacts) -> dict[str, Any]:
    """Simple verification result v0.2: what a gate in front of a deployment looks for."""
    passed = sorted(result.name for result in facts.after if result.outcome is Outcome.PASS)
    return {
        "verifier": {"id": facts.builder_id, "policies": facts.policy.described()},
        "timeCreated": rfc3339(facts.finished_at),
        "properties": [
            _property("VERDICT", facts.verdict),
            *(_property("CHECK_PASSED", name) for name in passed),
        ],
    }


def _property(kind: str, value: str) -> str:
    word = "".join(letter if letter.isalnum() else "_" for letter in value).upper()
    return f"LORA_REPAIR_{kind}_{word}"


def _adapter_repair(
    facts: JobFacts, *, before: Statement, after: Statement, named: Sequence[Statement]
) -> dict[str, Any]:
    """The own predicate: what SLSA has no slot for, numbers as JSON."""
    return {
        "input": {"digest": {"sha256": bare_hex(facts.adapter.digest)}},
        **({} if facts.settled is None else {"settled": {"digest": {"sha256": bare_hex(facts.settled.digest)}}}),
        "output": {"digest": {"sha256": bare_hex(facts.root)}},
        "verdict": facts.verdict,
        "steps": [
            {**_step(step), "modulesChanged": step.modules_changed, "modulesTotal": step.modules_total}
            for step in facts.steps
        ],
        "effect": dict(facts.effect),
        "utility": dict(facts.utility),
        "choice": dict(facts.choice),
        "cost": dict(facts.cost),
        "checks": {"before": before.digest, "after": after.digest},
        "measurements": {"before": _measurements(facts.before), "after": _measurements(facts.after)},
        "statements": [statement.digest for statement in named],
    }


def _measurements(results: Sequence[CheckResult]) -> list[dict[str, Any]]:
    return [{"name": one.name, "outcome": str(one.outcome), "measured": dict(one.measured)} for one in results]
