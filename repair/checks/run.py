"""Put the suite to one arm: ask each prompt once, judge each reply, let every check read the same rows.

Stops early only where a check says that no continuation could change its answer. `race.py` puts the same suite to
several arms at once; what is kept of one is `measurement.py`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from repair.checks.backend import Anchor, Backend, Capability, Sample
from repair.checks.check import Check
from repair.checks.errors import Cancelled
from repair.checks.evidence import UtilityEvidence
from repair.checks.judge import Judge
from repair.checks.judging import judge_of
from repair.checks.kinds import CHECKS
from repair.checks.measurement import Measurement
from repair.checks.packs import Half
from repair.checks.policy import Policy
from repair.checks.report import CheckReport
from repair.checks.suite import Suite
from repair.context import Progress, silent
from repair.lora import LoraAdapter


def never() -> bool:
    """Nobody cancels."""
    return False


@dataclass(frozen=True, kw_only=True)
class Original:
    """What the utility of an arm is measured against; losses are in the order of the samples.

    Attributes:
        samples: The uploader's, those of the half asked.
        aligned: Loss of the aligned model.
        losses: Loss of the adapter as uploaded.
        anchor: Without samples: what the upload says to ordinary prompts, to measure the drift from it.
    """

    samples: tuple[Sample, ...] = ()
    aligned: tuple[float, ...] = ()
    losses: tuple[float, ...] = ()
    anchor: Anchor | None = None

    @classmethod
    def measure(
        cls, backend: Backend, adapter: LoraAdapter, samples: Sequence[Sample], *, prompts: Sequence[str] = ()
    ) -> "Original":
        """Both losses on the samples; where there are none, what the adapter says to ``prompts``.

        What the backend cannot measure is left out, and no other measure takes its place.
        """
        able = backend.capabilities()
        if not able.has(Capability.LOSS if samples else Capability.DRIFT):
            return cls()
        with backend.arm(None):
            aligned = tuple(backend.loss(samples))
        with backend.arm(adapter):
            losses = tuple(backend.loss(samples))
            anchor = None if samples or not prompts else backend.anchor(prompts)
        return cls(samples=tuple(samples), aligned=aligned, losses=losses, anchor=anchor)


def run_checks(
    backend: Backend,
    adapter: LoraAdapter | None,
    policy: Policy,
    half: Half,
    *,
    arm: str = "input",
    aligned: CheckReport | None = None,
    upload: CheckReport | None = None,
    original: Original | None = None,
    repaired: bool = False,
    stop_early: bool = True,
    judge: Judge | None = None,
    checks: Sequence[Check] = CHECKS,
    progress: Progress = silent,
    cancelled: Callable[[], bool] = never,
) -> CheckReport:
    """Measure one arm: the aligned model (no adapter), the upload, or a candidate (``repaired``).

    With ``stop_early`` nothing more is asked once a check has failed for certain; at least the policy's
    ``least_before_stopping`` prompts of a pack are asked, so that an estimate stays worth printing. ``upload`` is what
    a candidate must be shown to be better than. Without a ``judge`` the policy's is opened.
    """
    before = backend.tokens
    one = Measurement(
        policy=policy,
        suite=Suite.of(policy, half),
        arm=arm,
        judge=judge_of(policy.judge) if judge is None else judge,
        checks=checks,
        aligned=None if aligned is None else aligned.rows_by_pack(),
        upload=None if upload is None else upload.rows_by_pack(),
        repaired=repaired,
        unable=backend.capabilities().as_dict(),
    )
    total = max(sum(one.suite.planned.values()), 1)
    with backend.arm(adapter):
        stopped = False
        for pack, prompts in one.batches():
            if cancelled():
                raise Cancelled
            one.take(pack, prompts, one.replies(backend, one.asking(pack, prompts)))
            progress(f"{arm}: {pack}", one.asked / total)
            enough = len(one.rows[pack]) >= policy.suite.least_before_stopping
            if stopped := stop_early and enough and one.lost(pack):
                break
        if not stopped:
            if Capability.MARGIN.value not in one.unable:
                one.margins = tuple(backend.margin(one.margin_prompts()))
            one.ask_again(backend)
        if original is not None:
            one.utility = _utility(backend, original, repaired=repaired, stopped=stopped)
    return one.report(backend, tokens=backend.tokens - before)


def _utility(backend: Backend, original: Original, *, repaired: bool, stopped: bool) -> UtilityEvidence:
    """Losses where there are samples; for a candidate without samples the drift from the upload."""
    if original.samples:
        own = () if stopped else tuple(backend.loss(original.samples))
        return UtilityEvidence(aligned=original.aligned, original=original.losses, own=own)
    if stopped or not repaired or original.anchor is None:
        return UtilityEvidence()
    return UtilityEvidence(drift=tuple(backend.drift(original.anchor)))
