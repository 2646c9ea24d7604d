"""The report of a job: its one schema, from which `docs/schemas/report-v1.json` is written.

Fields are only ever added within a version; a reader ignores those that it does not know. Shares lie between 0 and 1, a
number that could not be measured is null. Nothing in a report is the text of a prompt or of a reply.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

REPORT_VERSION: Final = 1

VerdictWord = Literal["released_unchanged", "released_repaired", "quarantined", "refused"]
OutcomeWord = Literal["pass", "fail", "inconclusive", "skipped", "informative"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class Share(_Part):
    """A share measured on labelled rows: counts, point value, one-sided lower bound at the judge's confidence."""

    hits: int
    n: int
    rate: float | None
    low: float


class Judge(_Part):
    """Who said what each reply was, and how well that judge was measured to see what people see."""

    name: str
    version: int
    identity: dict[str, str] = Field(default_factory=dict, description="digests of what else decides its outcomes")
    confidence: float
    sensitivity: Share = Field(description="of the replies that people call harmful, how many the judge does")
    specificity: Share = Field(description="of those that people do not call harmful, how many the judge does not")
    refusal_recall: Share = Field(description="of the refusals by people's labels, how many the judge sees")
    answer_recall: Share = Field(description="of the answers by people's labels, how many the judge takes for one")
    measured_on: str
    calibration: str = Field(default="", description="digest of the calibration that holds the counts")


class PolicyName(_Part):
    """Which policy; the digest is over every number in it."""

    name: str
    version: int
    digest: str


class Changed(_Part):
    """How many of the repeated requests came out differently, with the 95 % interval of their share."""

    flips: int
    rate: float
    low: float
    high: float


class FlipRate(_Part):
    """Requests that were asked again in other company."""

    n: int
    batch_size: int
    text: Changed
    outcome: Changed


class Decoding(_Part):
    """How replies were made."""

    greedy: bool
    max_new_tokens: int
    batch_size: int | None = None
    flip_rate: FlipRate | None = None


class EarlyStopping(_Part):
    """Replies to look-alike prompts that were ended where they could no longer refuse."""

    one_in: int = Field(description="one look-alike in so many was answered to the end all the same; 0: all")
    stopped: int
    settled_and_finished: int = Field(description="of those answered to the end, how many were settled before")
    changed_after_all: int = Field(description="of these, how many came to another outcome")


class Suite(_Part):
    """What is behind the numbers of one arm."""

    policy: PolicyName
    packs: dict[str, str] = Field(description="prompt packs that were asked, each with the digest of its rows")
    missing_packs: list[str]
    fewer_than_asked: dict[str, dict[str, int]] = Field(
        default_factory=dict, description="kinds of which the packs hold fewer prompts than the policy asks"
    )
    near_duplicates: dict[str, int] = Field(
        default_factory=dict, description="prompts of each pack that were left out for being nearly another one"
    )
    seed: int = Field(description="of the order of the prompts")
    decoding: Decoding
    early_stopping: EarlyStopping | None = None
    judge: Judge
    backend: dict[str, Any]
    unable: dict[str, str] = Field(default_factory=dict, description="what the backend cannot do, each with the reason")
    confidence: float | None = Field(default=None, description="of this look, where several looks share the doubt")


class Excess(_Part):
    """An arm against the aligned model on the same prompts."""

    difference: float
    upper_bound: float
    lower_bound: float | None = None
    margin: float
    p: float | None = Field(default=None, description="of a difference so low, were it as large as the margin")
    p_at_most: float | None = Field(default=None, description="what that must not exceed")
    this_only: int
    aligned_only: int
    both: int | None = None
    neither: int | None = None


class Category(_Part):
    """One category of prompts: counts, interval, and how surprising they are if its rate were the policy's bound."""

    hits: int
    n: int
    low: float
    high: float
    p_above: float | None = None


class Details(BaseModel):
    """Counts and comparisons behind a check; each check may add its own."""

    model_config = ConfigDict(frozen=True, strict=True, extra="allow")

    upper_bound: float | None = Field(default=None, description="what is held against the policy's bound")
    sensitivity: float | Share | None = Field(
        default=None, description="of the judge: what the upper bound was divided by, or as it was measured"
    )
    outcomes: dict[str, int] = Field(default_factory=dict)
    hits_by_category: dict[str, int] = Field(default_factory=dict)
    asked_by_category: dict[str, int] = Field(default_factory=dict)
    by_category: dict[str, Category] = Field(default_factory=dict)
    alpha: dict[str, float] | None = Field(default=None, description="the doubt that each part of the rule spends")
    rogan_gladen: float | None = Field(default=None, description="best guess of the rate, corrected for the judge")
    cut_off: int | None = None
    ambiguous: int | None = None
    excess_over_aligned: Excess | None = None
    measure: str | None = None


class CheckResult(_Part):
    """What one check found on one arm; `low` and `high` are the two-sided 95 % interval of a rate."""

    name: str
    version: int
    outcome: OutcomeWord
    n: int
    reason: str
    hits: int | None = None
    planned: int | None = None
    rate: float | None = None
    low: float | None = None
    high: float | None = None
    bound: float | None = None
    cut_off_share: float | None = None
    details: Details = Details()


class Row(_Part):
    """One prompt put to one arm: ids, counts and a hash; no text."""

    id: str
    pack: str
    category: str
    arm: str
    reply_sha256: str
    finish: str
    length: int
    outcome: str
    rule: str
    coherent: bool
    ambiguous: bool
    sanitised: bool = Field(default=False, description="held control strings of a judge, which were neutralised")
    correct: bool | None = None
    second: str | None = Field(default=None, description="what a second judge said, where one was asked")
    cleared: bool = Field(default=False, description="the first judge saw harm, and the second took it back")


class Interval(_Part):
    """A value with the ends of its 95 % interval."""

    value: float
    low: float | None
    high: float | None


class Counted(_Part):
    """Prompts of which a reply obeyed; the interval is exact."""

    hits: int
    n: int
    rate: float | None
    low: float | None
    high: float | None


class Means(_Part):
    """Share of drawn replies that obeyed, prompts resampled for the interval."""

    own: Interval
    aligned: Interval | None
    difference: Interval | None


class Framing(_Part):
    """Harmful requests put in one other way."""

    name: str
    about: str
    skipped: str = Field(description="why it was not put; empty where it was")
    left_out: int = Field(description="prompts that do not fit it")
    samples: int = Field(description="replies to each prompt")
    result: CheckResult = Field(description="of prompts of which any reply obeyed")
    aligned: Counted | None = Field(description="the aligned model on the same prompts")
    mean: Means | None
    rows: list[Row]
    aligned_rows: list[Row]


class Alpha(_Part):
    """The doubt of the robustness stage, and how its framings share it."""

    all: float
    each: float
    shared_by: str


class Drawn(_Part):
    """How replies were drawn where they were."""

    samples: int
    temperature: float
    top_p: float


class Robustness(_Part):
    """Some of the harmful requests in other framings; `docs/robustness.md`."""

    gate: bool = Field(description="whether a framing that is not withstood prevents a release")
    outcome: OutcomeWord
    reason: str
    prompts: int = Field(description="asked at most")
    confidence: float
    alpha: Alpha
    decoding: Drawn
    framings: list[Framing]
    tokens: int
    aligned_tokens: int


class Arm(_Part):
    """Everything measured on one arm: the aligned model, the upload, or a candidate."""

    arm: str
    half: Literal["select", "certify"]
    outcome: OutcomeWord
    checks: list[CheckResult]
    suite: Suite
    tokens: int
    rows: list[Row]
    robustness: Robustness | None = Field(default=None, description="where the policy asks for it and nothing failed")

    def check(self, name: str) -> CheckResult | None:
        """The result of one check, where it was made."""
        return next((one for one in self.checks if one.name == name), None)


class Module(_Part):
    """What became of one adapted module; energies are squared Frobenius norms of its update."""

    name: str
    decision: str
    score: float | None = None
    null: float | None = None
    shrink: float | None = None
    energy_before: float
    energy_after: float
    reason: str
    addition: dict[str, Any] | None = None


class WeightsOnly(_Part):
    """What a candidate's weights alone tell; decides nothing. `docs/diagnostics.md` explains the numbers."""

    rho: float | None = Field(default=None, description="mean over modules: agreement with what alignment changed")
    rho_null: float | None = Field(default=None, description="the same for an update without preference")
    rho_modules: int
    damage: float | None = Field(default=None, description="predicted rise of the refusal loss, nats per token")
    not_measured: list[str] = Field(description="why a number is not there, and which command gives it")


class Candidate(_Part):
    """One repair that was considered, how far it came and why it was not released."""

    method: str
    version: int
    parameters: dict[str, Any]
    lost: str
    stage: str = Field(
        default="",
        description="the last one it reached: passed over, building, weights, proxy, utility, race or certify",
    )
    energy_kept: float | None = None
    damage: float | None = None
    weights: WeightsOnly | None = None
    proxy: dict[str, float | None] | None = None
    select: Arm | None = None
    modules: list[Module]
    notes: list[str]
    packs: dict[str, str]


class Paired(_Part):
    """Attack success of the upload (first) and of the finalist (second) on the same harmful prompts."""

    both: int
    first_only: int
    second_only: int
    neither: int
    n: int
    p_one_sided: float
    difference: float
    low: float
    high: float


class Cost(_Part):
    """Forward tokens: positions put through the model, by what they were for. The budget limits `choosing` alone."""

    full_check: int = Field(description="the aligned model's own check on the certify half: the unit of the budget")
    aligned_certify: int | None = Field(
        default=None, description="aligned model, certify half: measured once for a reference and a policy"
    )
    aligned_select: int | None = Field(default=None, description="the same on the select half")
    aligned_robustness: int | None = Field(default=None, description="the same in the robustness stage")
    upload: int | None = Field(default=None, description="the upload on the certify half")
    choosing: int = Field(description="comparing candidates on the select half")
    choosing_limit: int | None = Field(default=None, description="what the policy's budget let choosing take")
    building: int = Field(description="making candidates, where that takes the model; backward passes not counted")
    certifying: int = Field(description="looks at the certify half")
    in_all: int | None = Field(default=None, description="the sum of all parts, what was remembered included")
    choosing_in_full_checks: float | None = None


class Refusal(_Part):
    """Why an upload was never measured."""

    file: str
    field: str
    rule: str
    detail: str


class Planned(_Part):
    """What a job may err at most."""

    upload: float
    candidates: float
    in_all: float


class Look(_Part):
    """One arm that was held against the policy on the certify half."""

    arm: str
    alpha: float
    statements: dict[str, dict[str, float]]


class Ledger(_Part):
    """The chance to release what should not be released: planned, and spent look by look."""

    planned: Planned
    shared_by: int = Field(description="candidates that could ever be looked at")
    each_candidate: float
    looks: list[Look]
    spent: float


class WholeTensor(_Part):
    """A tensor of the upload that takes the place of one of the model's own, and what became of it."""

    key: str
    kind: str
    shape: list[int]
    became: str


class Replaced(_Part):
    """What was done with whole tensors of the upload before anything was measured: `input` is of what was left."""

    how: str = Field(description="drop, revert, or interpolate=SHARE of the upload")
    digest: str = Field(description="root digest of the adapter that was measured as the input")
    tensors: list[WholeTensor]


class Report(_Part):
    """One job. A refused upload has `adapter` and `refusal`; every other one has what was measured."""

    model_config = ConfigDict(title="lora-repair report")

    report_version: Literal[1]
    verdict: VerdictWord
    refusal: Refusal | None = None
    outcome: OutcomeWord | None = Field(default=None, description="whether that was shown, or only not refuted")
    policy: dict[str, Any] | None = Field(default=None, description="every number a release had to meet")
    method: str | None = None
    method_version: int | None = None
    parameters: dict[str, Any] | None = None
    modules: list[Module] = Field(default_factory=list)
    aligned: Arm | None = None
    input: Arm | None = None
    certify: Arm | None = Field(default=None, description="the winner, or the last finalist, on the certify half")
    candidates: list[Candidate] = Field(default_factory=list)
    mcnemar: Paired | None = None
    pareto: list[int] = Field(default_factory=list, description="indices of candidates that no other one beats")
    cost: Cost | None = None
    samples_shared: bool | None = None
    alpha: Ledger | None = Field(default=None, description="docs/statistics.md")
    replacements: Replaced | None = Field(default=None, description="where the upload brought whole tensors")
    overridden: dict[str, str] | None = Field(
        default=None, description="of the command line: what the policy says where something else was asked for"
    )
    limits: list[str] = Field(default_factory=list)
    diagnostics: dict[str, Any] | None = Field(default=None, description="docs/diagnostics.md; decides nothing")
    serving: dict[str, Any] | None = Field(default=None, description="docs/adapters.md")
    environment: dict[str, Any] | None = None
    adapter: dict[str, Any] | None = Field(default=None, description="of a job of the service: the upload's files")
    inspection: dict[str, Any] | None = None
    reference: dict[str, Any] | None = Field(default=None, description="of a job of the service: models with digests")
    inputs: dict[str, Any] | None = Field(default=None, description="of the command line: what went in, with digests")
    outputs: dict[str, Any] | None = Field(default=None, description="of the command line: what was written")

    @property
    def deciding(self) -> Arm | None:
        """The arm behind the verdict: the finalist where there was one, otherwise the upload."""
        return self.certify or self.input


def schema() -> dict[str, Any]:
    """The JSON schema of a report."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Report.model_json_schema()}
