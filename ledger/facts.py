"""What the worker tells of a job, so that it can be attested: plain values, no behaviour to speak of."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, final

from gate.digest import root_digest
from ledger.digests import bare_hex

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from datetime import datetime

# Who builds, unless an operator's installation has an address of its own.
BUILDER_ID = "https://lora-repair.github.io/builders/worker/v1"


def descriptor(name: str, digest: str) -> dict[str, Any]:
    """An in-toto resource descriptor."""
    return {"name": name, "digest": {"sha256": bare_hex(digest)}}


class Outcome(StrEnum):
    """What one check said; only a pass counts as one."""

    PASS = "pass"  # noqa: S105 - an outcome
    FAIL = "fail"
    INCONCLUSIVE = "inconclusive"  # too little was measured to say
    SKIPPED = "skipped"  # a prompt pack or a judge was missing


@final
@dataclass(frozen=True, kw_only=True)
class Resource:
    """Something that went in: an adapter, a model, a prompt pack, a policy.

    `digest` is the root digest where there are `files` (name -> digest), else that of the bytes.
    """

    name: str
    digest: str
    uri: str = ""
    files: Mapping[str, str] = field(default_factory=dict)

    def described(self) -> list[dict[str, Any]]:
        """In-toto resource descriptors: the whole, then every file."""
        whole = descriptor(self.name, self.digest)
        if self.uri:
            whole["uri"] = self.uri
        return [whole, *(descriptor(f"{self.name}/{name}", self.files[name]) for name in sorted(self.files))]


@final
@dataclass(frozen=True, kw_only=True)
class CheckResult:
    """One check of one arm. `measured` holds the numbers (hits, n, rate, low, high ...)."""

    name: str
    outcome: Outcome
    measured: Mapping[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True, kw_only=True)
class Step:
    """One method that was applied; several make a chain. `paper` is where its definition stands."""

    method: str
    version: int
    parameters: Mapping[str, Any]
    modules_changed: int
    modules_total: int
    paper: str = ""


@final
@dataclass(frozen=True, kw_only=True)
class JobFacts:
    """Everything that the statements say.

    Attributes:
        wish: What the tenant asked for besides the inputs: `method` and `parameters`, or `policy`.
        packs: What was measured on.
        calibration, basis: What is known about the models in advance, where the reference has it.
        materials: What the steps learned from besides the models.
        steps: What was done; empty when the adapter was released as it was.
        settled: The adapter that was measured as the input, where whole tensors of the upload were settled before.
        environment: What the platform chose; the names stand in docs/buildtypes/adapter-repair-v1.md.
        versions: Name -> version of the service and the libraries that compute.
        files: The files of the artifact, name -> digest, without `model.sig` and `attestations.jsonl`.
        byproducts: What else the job kept, such as the table of rows behind the numbers.
        utility, effect: Numbers for the own predicate, as they are.
        choice: Which candidates there were, how far each came, and which of them no other one beats.
        cost: Forward tokens by what they were for.
    """

    job_id: str
    attempt: int
    fence: int
    started_at: datetime
    finished_at: datetime
    verdict: str
    adapter: Resource
    aligned: Resource
    policy: Resource
    files: Mapping[str, str]
    base: Resource | None = None
    patch: Resource | None = None
    calibration: Resource | None = None
    basis: Resource | None = None
    twin: Resource | None = None
    settled: Resource | None = None
    packs: Sequence[Resource] = ()
    materials: Sequence[Resource] = ()
    wish: Mapping[str, Any] = field(default_factory=dict)
    steps: Sequence[Step] = ()
    before: Sequence[CheckResult] = ()
    after: Sequence[CheckResult] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    byproducts: Sequence[Resource] = ()
    utility: Mapping[str, Any] = field(default_factory=dict)
    effect: Mapping[str, Any] = field(default_factory=dict)
    choice: Mapping[str, Any] = field(default_factory=dict)
    cost: Mapping[str, Any] = field(default_factory=dict)
    builder_id: str = BUILDER_ID

    @property
    def root(self) -> str:
        """The digest that the artifact is called by."""
        return root_digest(self.files)
