"""Rules that may stop before every prompt is asked: how often they err, and how many prompts they ask."""

from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bench.coverage.measured import Measured, generator
from repair.checks import stats
from repair.checks.stats import AnytimeTest, Sprt, Stop

Decide = Callable[[int, int], Stop]
ENDS: Final = tuple(Stop)


def table(decide: Decide, cap: int) -> NDArray[np.int8]:
    """What the rule says of so many hits (first index) in so many prompts (second)."""
    found = np.full((cap + 1, cap + 1), ENDS.index(Stop.GO_ON), dtype=np.int8)
    for seen in range(1, cap + 1):
        for hits in range(seen + 1):
            found[hits, seen] = ENDS.index(decide(hits, seen))
    return found


def walked(said: NDArray[np.int8], rate: float, runs: int, draw: np.random.Generator) -> tuple[dict[Stop, int], float]:
    """How many runs ended in which way, and the prompts asked on average; those that never end ask all."""
    cap = said.shape[0] - 1
    hits = (draw.random((runs, cap)) < rate).cumsum(axis=1)
    answers = said[hits, np.arange(1, cap + 1)[None, :]]
    ended = answers != ENDS.index(Stop.GO_ON)
    at = np.where(ended.any(axis=1), ended.argmax(axis=1), cap - 1)
    last = answers[np.arange(runs), at]
    return {end: int((last == ENDS.index(end)).sum()) for end in ENDS}, float((at + 1).mean())


def curtailed(runs: int, seed: int) -> Iterator[Measured]:
    """The exact stop of a fixed plan: it errs where the whole plan would have said something else."""
    for n, bound in ((104, 0.15), (313, 0.05)):
        allowed = stats.allowed_hits(n, bound=bound)
        said = table(lambda hits, seen: stats.curtailed(hits, seen, n, allowed=allowed), n)  # noqa: B023 - called at once
        for rate in (0.01, 0.1, 0.4, 0.7):
            ends, prompts = walked(said, rate, runs, generator(seed, "curtailed", n, rate))
            whole = (generator(seed, "curtailed", n, rate).random((runs, n)) < rate).sum(axis=1) > allowed
            yield Measured(
                rule="curtailed plan",
                setting=f"true rate {rate:.0%}, {n} prompts, {allowed} hits allowed",
                error="not what all prompts would say",
                promised=0.0,
                gates=True,
                runs=runs,
                errors=abs(int(whole.sum()) - ends[Stop.FAIL]) + ends[Stop.GO_ON],
                prompts=prompts,
            )


def ratio_test(runs: int, seed: int) -> Iterator[Measured]:
    """Wald's test between two percent and eight, with its cap."""
    rule = Sprt()
    said = table(rule.decide, rule.cap)
    for rate in (0.0, 0.01, 0.02, 0.08, 0.2, 0.4, 0.7):
        ends, prompts = walked(said, rate, runs, generator(seed, "sprt", rate))
        safe = rate <= rule.safe
        yield Measured(
            rule="sequential ratio test",
            setting=f"true rate {rate:.0%}, gives up after {rule.cap}: {ends[Stop.GIVE_UP] / runs:.1%} did",
            error="called unsafe" if safe else "called safe",
            promised=rule.alpha if safe else rule.beta,
            gates=True,
            runs=runs,
            errors=ends[Stop.FAIL if safe else Stop.PASS],
            prompts=prompts,
        )


def anytime(runs: int, seed: int) -> Iterator[Measured]:
    """The test that may be looked at after every prompt, against a bound of five percent."""
    rule, cap = AnytimeTest(), 600
    said = table(rule.decide, cap)
    for rate in (0.0, 0.01, 0.02, 0.05, 0.2, 0.4):
        ends, prompts = walked(said, rate, runs, generator(seed, "anytime", rate))
        sides = [Stop.PASS, Stop.FAIL] if rate == rule.bound else [Stop.FAIL if rate < rule.bound else Stop.PASS]
        for side in sides:
            yield Measured(
                rule="anytime test",
                setting=f"true rate {rate:.0%}, a look after each of {cap} prompts",
                error="called below the bound" if side is Stop.PASS else "called above the bound",
                promised=rule.alpha,
                gates=True,
                runs=runs,
                errors=ends[side],
                prompts=prompts,
            )
