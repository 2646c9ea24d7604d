"""The planner: measure the upload, choose among repairs on one half of the prompts, certify the best on the other half.

Reads straight down in `plan`. What may be released was written to disk, read back and measured: the verdict is about
exactly those bytes. It knows nothing of jobs, rows or signatures.
"""

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from gate.digest import sha256_file
from repair.adapter_file import read_adapter, write_adapter
from repair.basis import BasisPack
from repair.calibration import Calibration
from repair.checkpoint import Checkpoint
from repair.checks.alpha import Ledger
from repair.checks.backend import Backend, Capability, Sample
from repair.checks.bisection import Bisection
from repair.checks.broken import FAULTS, require_one_tried, told
from repair.checks.cost import Cost
from repair.checks.errors import Cancelled
from repair.checks.evidence import CheckOutcome
from repair.checks.judge import Judge
from repair.checks.judging import judge_of
from repair.checks.kinds.judge import may_rest_on
from repair.checks.measurement import Measurement
from repair.checks.packs import Half, half_of, pack_digests
from repair.checks.policy import Candidate, Family, Policy
from repair.checks.purse import Purse
from repair.checks.race import Race
from repair.checks.remembered import Remembered
from repair.checks.report import CheckReport
from repair.checks.robustness import Answers, ask_framed
from repair.checks.run import Original, never, run_checks
from repair.checks.settling import settle
from repair.checks.standing import Phase, Standing, Watch, unwatched
from repair.checks.suite import Suite
from repair.checks.usable import require_buildable, require_usable
from repair.checks.verdict import Plan, Stage, Tried, Verdict, as_it_is, compared, pareto, shown, slipped, why
from repair.checks.weights_only import weights_only
from repair.checks.withstood import gave_way, with_robustness
from repair.context import Progress, RepairContext, silent
from repair.errors import BadParameters, MissingReference, RepairError
from repair.layout import WEIGHTS
from repair.lora import LoraAdapter
from repair.method import Cost as MethodCost
from repair.methods import METHODS
from repair.replacements import with_values
from repair.run import repair_adapter

__all__ = ["Plan", "Reference", "Tried", "Verdict", "plan", "split_samples"]

_LEAST_SAMPLES_TO_SPLIT = 16
# An upload that met the bound on harmful prompts and failed elsewhere leaves a repair nothing to improve there.
_NOT_HARMLESS = frozenset({CheckOutcome.FAIL, CheckOutcome.INCONCLUSIVE, CheckOutcome.SKIPPED})


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What the adapter sits on.

    Attributes:
        aligned: Weights of the aligned model.
        base: Weights of its unaligned base, where known.
        chat: The aligned model, loaded.
        patch: A refusal LoRA made for it, where there is one.
        calibration: What it does on harmful and benign prompts, where that was measured.
        basis: What alignment changed in the pair, where that was kept; methods read it instead of both models.
        twin: A LoRA for it that obeys harmful requests, which methods can subtract.
        digest: Of the aligned checkpoint; keys what is remembered about it.
    """

    aligned: Checkpoint
    base: Checkpoint | None
    chat: Backend
    patch: LoraAdapter | None = None
    calibration: Calibration | None = None
    basis: BasisPack | None = None
    twin: LoraAdapter | None = None
    digest: str = ""


def plan(
    adapter: LoraAdapter,
    *,
    reference: Reference,
    policy: Policy,
    work_dir: Path,
    samples: Sequence[Sample] = (),
    candidates: Sequence[Candidate] | None = None,
    device: torch.device | None = None,
    aligned_cache: Path | None = None,
    judge: Judge | None = None,
    progress: Progress = silent,
    watch: Watch = unwatched,
    cancelled: Callable[[], bool] = never,
) -> Plan:
    """Release the upload as it is, release a repaired one, or quarantine it.

    ``candidates`` overrides what the policy would try, ``judge`` the one that it names; ``watch`` is told in fields
    what ``progress`` tells in words. Candidates are written under ``work_dir``; the winner's directory is what may be
    published. Raises a RepairError when the upload itself cannot be measured, PolicyInvalid when nothing could ever
    meet the policy here, BadParameters or MissingReference when what was ordered cannot be made (an order that is wrong
    says nothing about the adapter), and CandidatesBroke when a fault of this program left no candidate to measure. What
    an upload replaces as a whole is settled first, as the policy says; where that was all that had to be done, it is
    the repair.
    """
    judge = judge_of(policy.judge) if judge is None else judge
    require_usable(policy, judge.info)
    settled = settle(adapter, policy.settling, reference.aligned, work_dir / "settled")
    adapter = adapter if settled is None else settled.adapter
    for wish in candidates or ():
        require_buildable(wish, adapter)
    run = _Run(
        adapter=adapter,
        reference=reference,
        policy=policy,
        judge=judge,
        work_dir=work_dir,
        began=reference.chat.tokens,
        samples=tuple(samples),
        ordered=candidates is not None,
        device=device or torch.device("cpu"),
        progress=progress,
        watch=watch,
        cancelled=cancelled,
        remembered=Remembered(
            folder=aligned_cache, reference=reference.digest, backend=reference.chat, policy=policy, judge=judge.info
        ),
    )
    aligned = run.measure_aligned("certify")
    before = run.put_otherwise(run.measure_input(aligned), adapter, policy)
    if before.outcome is CheckOutcome.PASS:
        return Plan(
            verdict=Verdict.RELEASED_UNCHANGED if settled is None else Verdict.RELEASED_REPAIRED,
            outcome=before.outcome,
            winner=None if settled is None else as_it_is(settled),
            settled=settled,
            policy=policy,
            input_report=before,
            aligned_report=aligned,
            alpha=Ledger.of(policy, before),
            cost=run.cost(before),
        )
    families = policy.families() if candidates is None else [Family(wishes=(one,)) for one in candidates]
    # Where no reading of this judge may release anything, no repair need be made.
    race = run.start(families, aligned) if may_rest_on(before) else None
    return replace(run.certify(race, before, aligned), settled=settled)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One adapter on its way to a verdict; ``began`` is what the backend had counted before."""

    adapter: LoraAdapter
    reference: Reference
    policy: Policy
    judge: Judge
    work_dir: Path
    samples: tuple[Sample, ...]
    ordered: bool
    device: torch.device
    progress: Progress
    watch: Watch
    cancelled: Callable[[], bool]
    remembered: Remembered
    began: int
    _originals: dict[str, Original] = field(default_factory=dict)
    _heard: dict[Hashable, tuple[LoraAdapter, Calibration]] = field(default_factory=dict)
    _set_up: dict[str, int] = field(default_factory=dict)  # forward tokens of the originals

    def measure_aligned(self, half: Half) -> CheckReport:
        """The aligned model on one half, remembered by all that decides its numbers."""
        self.watch(Standing(phase=Phase.ALIGNED))
        found = self.remembered.get(half, lambda: self._check(None, half, arm="aligned", stop_early=False).as_dict())
        return CheckReport.of(found)

    def put_otherwise(self, report: CheckReport, adapter: LoraAdapter | None, policy: Policy) -> CheckReport:
        """The report with the robustness stage, where the policy asks for it and nothing else stands in the way."""
        if not policy.robustness.framings or report.outcome is not CheckOutcome.PASS:
            return report
        aligned = self.remembered.get("robustness", lambda: self._framed(None, "aligned").as_dict())
        return with_robustness(report, self._framed(adapter, report.arm), Answers.of(aligned), policy, self.judge.info)

    def _framed(self, adapter: LoraAdapter | None, arm: str) -> Answers:
        return ask_framed(
            self.reference.chat,
            adapter,
            self.policy,
            arm=arm,
            judge=self.judge,
            progress=self.progress,
            cancelled=self.cancelled,
        )

    def measure_input(self, aligned: CheckReport) -> CheckReport:
        """The upload on the certify half, until it is certain that it fails."""
        self.watch(Standing(phase=Phase.UPLOAD))
        original = self._original("certify")
        return self._check(self.adapter, "certify", arm="input", aligned=aligned, original=original, stop_early=True)

    def start(self, families: Sequence[Family], aligned: CheckReport) -> Race:
        """The race on the select half, with everything it needs; nothing is asked of a candidate yet."""
        numbers = itertools.count()
        suite = Suite.of(self.policy, "select")
        here, there = self.measure_aligned("select").rows_by_pack(), aligned.rows_by_pack()
        original = self._original("select")
        return Race(
            backend=self.reference.chat,
            policy=self.policy,
            upload=self.adapter,
            original=original,
            rows=[Bisection.of(family) for family in families],
            build=lambda wish: self._build(wish, self.work_dir / f"candidate-{next(numbers)}"),
            trains=_trains,
            measurement=lambda arm: Measurement(
                policy=self.policy,
                suite=suite,
                arm=arm,
                judge=self.judge,
                aligned=here,
                aligned_on_certify=there,
                repaired=True,
                unable=self.reference.chat.capabilities().as_dict(),
            ),
            progress=self.progress,
            watch=self.watch,
            cancelled=self.cancelled,
            purse=Purse(limit=self.policy.budget.full_checks * aligned.tokens, spent=self._set_up["select"]),
        )

    def certify(self, race: Race | None, before: CheckReport, aligned: CheckReport) -> Plan:
        """Look at the certify half with the best; what it says of one that fails decides where to look next."""
        looks: list[CheckReport] = []
        mcnemar, winner = None, None
        while race is not None and len(looks) < self.policy.budget.finalists and (best := race.finalist()) is not None:
            report = self._look(best, before, aligned)
            looks.append(report)
            mcnemar = compared(before, report, self.policy)
            if report.outcome is CheckOutcome.PASS:
                winner = best
                break
            obeys = report.check("harmful").outcome is not CheckOutcome.PASS or slipped(report) or gave_way(report)
            race.reject(best, f"not certified: {why(report)}", obeys=obeys)
        tried = [] if race is None else race.account()
        require_one_tried(tried)
        why_not = "no look at the certify half was left" if winner is None else "kept less utility"
        tried = [one if one is winner or one.lost else replace(one, lost=why_not) for one in tried]
        return Plan(
            verdict=Verdict.QUARANTINED if winner is None else Verdict.RELEASED_REPAIRED,
            outcome=shown(before, looks),
            policy=self.policy,
            winner=winner,
            input_report=before,
            aligned_report=aligned,
            alpha=Ledger.of(self.policy, before, looks),
            candidates=tuple(tried),
            certify_report=looks[-1] if looks else None,
            mcnemar=mcnemar,
            pareto=pareto(tried),
            samples_shared=0 < len(self.samples) < _LEAST_SAMPLES_TO_SPLIT,
            cost=self.cost(before, race, looks),
        )

    def cost(self, before: CheckReport, race: Race | None = None, looks: Sequence[CheckReport] = ()) -> Cost:
        """What all that took, by what it was for."""
        return Cost(
            full_check=self.remembered.tokens("certify"),
            aligned_certify=self.remembered.tokens("certify"),
            aligned_select=self.remembered.tokens("select"),
            aligned_robustness=self.remembered.tokens("robustness"),
            upload=self._set_up["certify"] + before.tokens,
            choosing=0 if race is None else race.purse.spent,
            choosing_limit=0 if race is None else round(race.purse.limit),
            building=0 if race is None else race.building,
            certifying=sum(look.tokens for look in looks),
            spent=self.reference.chat.tokens - self.began,
        )

    def _look(self, best: Tried, before: CheckReport, aligned: CheckReport) -> CheckReport:
        """The best of the race on the certify half, at its share of the doubt."""
        self.watch(Standing(phase=Phase.CERTIFYING, best=best.kept))
        policy = self.policy.sharing_doubt()
        report = self._check(
            best.adapter,
            "certify",
            arm=best.label,
            aligned=aligned,
            upload=before if before.check("harmful").outcome in _NOT_HARMLESS else None,
            original=self._original("certify"),
            repaired=True,
            policy=policy,
        )
        report = self.put_otherwise(report, best.adapter, policy)
        return replace(report, suite=self._told(report))

    def _told(self, report: CheckReport) -> dict[str, Any]:
        """The suite behind a look: the policy that was asked for, and how sure this look had to be."""
        known = {"name": self.policy.name, "version": self.policy.version, "digest": self.policy.digest}
        return {**report.suite, "policy": known, "confidence": self.policy.sharing_doubt().bounds.confidence}

    def _build(self, wish: Candidate, directory: Path) -> Tried:
        """Apply the method, write the result and read it back; a policy's candidate that cannot be built has lost."""
        kind = METHODS.get(wish.method)
        if kind is None:
            return Tried(wish=wish, stage=Stage.BUILDING, lost=f"no method is called {wish.method}")
        try:
            method = kind.parse(wish.parameters)
            repaired = repair_adapter(self.adapter, method, self._context())
            write_adapter(repaired.adapter, directory)
            adapter = with_values(read_adapter(directory), self.adapter)
        except Cancelled:
            raise
        except RepairError as error:
            if self.ordered and isinstance(error, BadParameters | MissingReference):
                raise
            return Tried(wish=wish, version=kind.version, stage=Stage.BUILDING, lost=f"cannot be built: {error}")
        except FAULTS as fault:
            return Tried(wish=wish, version=kind.version, stage=Stage.BUILDING, lost=told(fault), broke=True)
        return Tried(
            wish=wish,
            version=kind.version,
            written=method.model_dump(mode="json"),
            lost="" if repaired.changed else "changes nothing, and the upload itself did not meet the policy",
            modules=repaired.verdicts,
            notes=repaired.notes,
            packs=pack_digests(method.packs),
            weights=weights_only(adapter, self.reference.basis, self.reference.calibration),
            stage=Stage.WEIGHTS,
            directory=directory,
            adapter=adapter,
            digest=sha256_file(directory / WEIGHTS),
            unchanged=not repaired.changed,
        )

    def _check(
        self, adapter: LoraAdapter | None, half: Half, *, arm: str, policy: Policy | None = None, **more: Any
    ) -> CheckReport:
        more.setdefault("stop_early", False)
        return run_checks(
            self.reference.chat,
            adapter,
            policy or self.policy,
            half,
            arm=arm,
            judge=self.judge,
            progress=self.progress,
            cancelled=self.cancelled,
            **more,
        )

    def _context(self) -> RepairContext:
        return RepairContext(
            aligned=self.reference.aligned,
            base=self.reference.base,
            patch=self.reference.patch,
            calibration=self.reference.calibration,
            basis=self.reference.basis,
            twin=self.reference.twin,
            # Methods that train or listen need the model itself, and say so where it is not to be had.
            chat=self.reference.chat if self.reference.chat.capabilities().has(Capability.MODULES) else None,
            device=self.device,
            progress=self._tell,
            heard=self._heard,
        )

    def _tell(self, message: str, share: float) -> None:
        """Pass progress on; the only moment at which a repair that takes minutes can be stopped."""
        if self.cancelled():
            raise Cancelled
        self.progress(message, share)

    def _original(self, half: Half) -> Original:
        """What utility on one half is measured against; measured once."""
        if half not in self._originals:
            suite = Suite.of(self.policy, half)
            samples = split_samples(self.samples, half)[: suite.sizes.samples]
            prompts = [one.text for one in suite.of_kind("benign")][: suite.sizes.samples]
            before = self.reference.chat.tokens
            self._originals[half] = Original.measure(self.reference.chat, self.adapter, samples, prompts=prompts)
            self._set_up[half] = self.reference.chat.tokens - before
        return self._originals[half]


def _trains(wish: Candidate) -> bool:
    """Whether making it takes training; what is no method of ours takes nothing."""
    kind = METHODS.get(wish.method)
    try:
        return kind is not None and any(
            stage.cost is MethodCost.TRAINING for stage in kind.parse(wish.parameters).stages
        )
    except BadParameters:
        return False


def split_samples(samples: Sequence[Sample], half: Half) -> tuple[Sample, ...]:
    """The uploader's samples of one half by the hash of the prompt; all of them when they are too few to split."""
    if len(samples) < _LEAST_SAMPLES_TO_SPLIT:
        return tuple(samples)
    return tuple(sample for sample in samples if half_of(sample.prompt) == half)
