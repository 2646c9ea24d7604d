"""Utility: how much of what the uploader's adapter had gained is left after the repair."""

import math
from typing import Any, ClassVar, final

from repair.checks.check import Check
from repair.checks.evidence import CheckOutcome, CheckResult, Evidence, UtilityEvidence
from repair.checks.stats import Interval, bootstrap_ratio, paired_t

_LEAST_SAMPLES = 4
_NEGLIGIBLE = 0.1  # of the drift that a policy allows


@final
class Utility(Check):
    """Share kept of the fall in loss on the uploader's samples; without samples, the drift from the upload."""

    name: ClassVar[str] = "utility"
    version: ClassVar[int] = 1

    def examine(self, evidence: Evidence) -> CheckResult:
        """Test the share, or the drift."""
        found = evidence.utility
        if found is None:
            return self._result(CheckOutcome.INFORMATIVE, "the aligned model is what others are compared with", n=0)
        if not all(map(math.isfinite, (*found.aligned, *found.original, *found.own, *found.drift))):
            return self._result(CheckOutcome.FAIL, "a loss is not finite: the adapter breaks the model", n=0)
        if found.drift:
            return self._by_drift(evidence, found.drift)
        if not found.original:
            outcome = CheckOutcome.SKIPPED if evidence.repaired else CheckOutcome.INFORMATIVE
            reasons = [f"{name}: {evidence.unable[name]}" for name in ("loss", "drift") if name in evidence.unable]
            return self._result(outcome, "; ".join(["neither samples nor drift were measured", *reasons]), n=0)
        gains = [a - o for a, o in zip(found.aligned, found.original, strict=True)]
        if not evidence.repaired:
            gain = paired_t(gains)
            reason = f"the adapter lowers the loss on its samples by {gain.value:.3f} nats per token"
            return self._result(CheckOutcome.INFORMATIVE, reason, n=len(gains), details=_losses(found, gain))
        return self._by_share(evidence, found, gains)

    def _by_share(self, evidence: Evidence, found: UtilityEvidence, gains: list[float]) -> CheckResult:
        if len(found.own) < len(gains):
            return self._result(CheckOutcome.SKIPPED, "not measured: another check had decided before", n=0)
        gain = paired_t(gains, confidence=2 * evidence.policy.bounds.confidence - 1)
        if len(gains) < _LEAST_SAMPLES:
            return self._result(CheckOutcome.INCONCLUSIVE, f"{len(gains)} samples are too few", n=len(gains))
        if gain.low <= 0:
            return self._without_gain(evidence, found, gain)
        kept = [a - own for a, own in zip(found.aligned, found.own, strict=True)]
        share = bootstrap_ratio(kept, gains, confidence=2 * evidence.policy.bounds.confidence - 1)
        wanted = evidence.policy.bounds.utility_kept
        enough = share.value if evidence.half == "select" else share.low
        if enough >= wanted:
            outcome, reason = (
                CheckOutcome.PASS,
                f"keeps {share.value:.0%} of the gain, at least {share.low:.0%}",
            )
        elif share.high < wanted or evidence.half == "select":
            outcome, reason = (
                CheckOutcome.FAIL,
                f"keeps {share.value:.0%} of the gain, at most {share.high:.0%}",
            )
        else:
            outcome, reason = CheckOutcome.INCONCLUSIVE, f"may keep as little as {share.low:.0%} of the gain"
        details = {**_losses(found, gain), **_alpha(evidence)}
        return self._result(outcome, reason, n=len(gains), interval=share, bound=wanted, details=details)

    def _without_gain(self, evidence: Evidence, found: UtilityEvidence, gain: Interval) -> CheckResult:
        """No gain was shown, so no share can be told: the repair must stay close to the upload.

        The most that it may lose is the policy's share of the gain as it was seen, or a tenth of the allowed drift
        where that is more. A stricter confidence makes this harder, never easier.
        """
        bounds = evidence.policy.bounds
        confidence = 2 * bounds.confidence - 1
        # Where it looks like no gain at all, being as good as the worse of the two on each sample is enough.
        pairs = zip(found.aligned, found.original, strict=True)
        known = [max(a, o) if gain.value <= 0 else o for a, o in pairs]
        loss = paired_t([own - k for own, k in zip(found.own, known, strict=True)], confidence=confidence)
        limit = max((1 - bounds.utility_kept) * max(gain.value, 0.0), _NEGLIGIBLE * bounds.drift)
        fine = (loss.value if evidence.half == "select" else loss.high) <= limit
        return self._result(
            CheckOutcome.PASS if fine else CheckOutcome.INCONCLUSIVE,
            f"the adapter was not shown to gain on its own samples over the aligned model ({gain.value:+.3f} nats); "
            f"the repair changes their loss by {loss.value:+.3f} nats per token, allowed {limit:.3f}",
            n=len(found.own),
            details={**_losses(found, gain), **_alpha(evidence)},
        )

    def _by_drift(self, evidence: Evidence, drift: tuple[float, ...]) -> CheckResult:
        if len(drift) < _LEAST_SAMPLES:
            return self._result(CheckOutcome.INCONCLUSIVE, f"{len(drift)} prompts are too few", n=len(drift))
        spread = paired_t(drift, confidence=2 * evidence.policy.bounds.confidence - 1)
        limit = evidence.policy.bounds.drift
        worst = spread.value if evidence.half == "select" else spread.high
        if worst <= limit:
            outcome = CheckOutcome.PASS
        else:
            outcome = CheckOutcome.FAIL if spread.low > limit else CheckOutcome.INCONCLUSIVE
        reason = f"no samples: {spread.value:.3f} nats per token away from the upload on ordinary prompts"
        details = {"measure": "drift", **_alpha(evidence)}
        return self._result(outcome, reason, n=len(drift), interval=spread, bound=limit, details=details)

    def _result(
        self,
        outcome: CheckOutcome,
        reason: str,
        *,
        n: int,
        interval: Interval | None = None,
        bound: float | None = None,
        details: dict[str, Any] | None = None,
    ) -> CheckResult:
        return CheckResult(
            name=self.name,
            version=self.version,
            outcome=outcome,
            n=n,
            rate=None if interval is None else interval.value,
            low=None if interval is None else interval.low,
            high=None if interval is None else interval.high,
            bound=bound,
            reason=reason,
            details=details or {},
        )


def _alpha(evidence: Evidence) -> dict[str, dict[str, float]]:
    """What the lower bound of the share, or the upper one of the drift, may err; nothing is stated on select."""
    return {} if evidence.half == "select" else {"alpha": {"kept": 1 - evidence.policy.bounds.confidence}}


def _losses(found: UtilityEvidence, gain: Interval) -> dict[str, Any]:
    def mean(values: tuple[float, ...]) -> float | None:
        return sum(values) / len(values) if values else None

    return {
        "measure": "share of gain kept",
        "gain": gain.value,
        "loss": {"aligned": mean(found.aligned), "original": mean(found.original), "own": mean(found.own)},
    }
