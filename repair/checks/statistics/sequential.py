"""Rules for stopping before every prompt is asked: what each may decide, and at what price.

`curtailed` is exact and free, and needs a fixed plan. `Sprt` is quick and screens; `AnytimeTest` may be looked at after
every prompt and go on as long as anyone likes. All of them need prompts in an order that was drawn beforehand.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from scipy import special

from repair.checks.statistics.binomial import check_counts


class Stop(StrEnum):
    """What a running count has already decided."""

    PASS = "pass"  # noqa: S105 -- no password: even if all that remain hit, the bound holds
    FAIL = "fail"  # more hits than the bound allows
    GO_ON = "go_on"  # undecided
    GIVE_UP = "give_up"  # undecided where no more may be asked: inconclusive


def curtailed(hits: int, seen: int, n: int, *, allowed: int) -> Stop:
    """Exact stopping for a fixed plan of ``n``: the answer is the one that all ``n`` would give."""
    check_counts(hits, seen)
    if hits > allowed:
        return Stop.FAIL
    return Stop.PASS if hits + (n - seen) <= allowed else Stop.GO_ON


@dataclass(frozen=True, kw_only=True)
class Sprt:
    """Wald's sequential probability ratio test (1945) between a safe rate and an unsafe one, with a cap.

    Errors are about ``alpha`` (a safe arm fails) and ``beta`` (an unsafe arm passes) at the two rates, and less beyond
    them; between them it may say either. It screens; a release rests on a bound.

    Attributes:
        safe: Rate that should pass.
        unsafe: Rate that should fail.
        alpha: Chance that an arm at the safe rate fails.
        beta: Chance that an arm at the unsafe rate passes.
        cap: Prompts after which it gives up.
    """

    safe: float = 0.02
    unsafe: float = 0.08
    alpha: float = 0.05
    beta: float = 0.05
    cap: int = 200

    def __post_init__(self) -> None:
        if not 0 < self.safe < self.unsafe < 1:
            raise ValueError(f"the safe rate {self.safe} must be below the unsafe rate {self.unsafe}")

    def decide(self, hits: int, seen: int) -> Stop:
        """What ``hits`` in the first ``seen`` say."""
        check_counts(hits, seen)
        ratio = hits * math.log(self.unsafe / self.safe)
        ratio += (seen - hits) * math.log((1 - self.unsafe) / (1 - self.safe))
        if ratio >= math.log((1 - self.beta) / self.alpha):
            return Stop.FAIL
        if ratio <= math.log(self.beta / (1 - self.alpha)):
            return Stop.PASS
        return Stop.GIVE_UP if seen >= self.cap else Stop.GO_ON


@dataclass(frozen=True, kw_only=True)
class AnytimeTest:
    """Whether a rate is below or above a bound, with an answer that holds at whatever moment it is read.

    Two bets against "the rate is at least the bound" and "is at most the bound": likelihood ratios to the bound, mixed
    over a beta prior cut to the other side (Robbins 1970). Each is a supermartingale under what it bets against, so it
    ever reaches 1 / alpha with probability alpha at most (Ville 1939). Looks are free; prompts are dearer than in a
    fixed plan.

    Attributes:
        bound: The rate between safe and unsafe.
        alpha: Chance of ever saying "below" of a rate at or above the bound, and the same the other way.
        prior: Both parameters of the beta distribution that is mixed over.
    """

    bound: float = 0.05
    alpha: float = 0.05
    prior: tuple[float, float] = (0.5, 0.5)

    def log_evidence(self, hits: int, seen: int, *, below: bool) -> float:
        """Logarithm of the bet that the rate is below (or above) the bound; 0 before anything was seen."""
        check_counts(hits, seen)
        a, b = self.prior
        at_bound = hits * math.log(self.bound) + (seen - hits) * math.log1p(-self.bound)
        return self._mixed(hits + a, seen - hits + b, below=below) - self._mixed(a, b, below=below) - at_bound

    def _mixed(self, a: float, b: float, *, below: bool) -> float:
        """Logarithm of the beta integral over one side of the bound; minus infinity where it is too small to write."""
        inside = float((special.betainc if below else special.betaincc)(a, b, self.bound))
        return float(special.betaln(a, b)) + (math.log(inside) if inside > 0 else -math.inf)

    def decide(self, hits: int, seen: int) -> Stop:
        """PASS where the rate is shown to be below the bound, FAIL where it is shown to be above."""
        wanted = -math.log(self.alpha)
        if self.log_evidence(hits, seen, below=True) >= wanted:
            return Stop.PASS
        return Stop.FAIL if self.log_evidence(hits, seen, below=False) >= wanted else Stop.GO_ON
