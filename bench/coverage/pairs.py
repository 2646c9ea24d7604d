"""Two arms on the same prompts: McNemar, the excess over the aligned model, intervals of the difference, resampling."""

from collections.abc import Iterator, Sequence

import numpy as np

from bench.coverage.measured import Counts, Measured, generator, how_often
from repair.checks import stats
from repair.checks.stats import PairedCounts

ALPHA = 0.05
RESAMPLES = 500  # fewer than a report takes: the ends of an interval waver, and that counts as error too
MARGINS = ((104, 0.08, 0.0), (104, 0.05, 0.0), (104, 0.08, 0.03), (115, 0.05, 0.02), (340, 0.03, 0.01))
"""Prompts, true excess, and the share of prompts on which it is the other way round."""


def drawn(
    draw: np.random.Generator, n: int, runs: int, *, first_only: float, second_only: float, both: float
) -> Counts:
    """How many prompts only the first arm hits, only the second, both; a column for each."""
    shares = [first_only, second_only, both, 1 - first_only - second_only - both]
    return draw.multinomial(n, shares, size=runs)[:, :3].T


def paired(b: int, c: int, both: int, n: int) -> PairedCounts:
    """As the tests read them."""
    return PairedCounts(both=both, first_only=b, second_only=c, neither=n - b - c - both)


def mcnemar(runs: int, seed: int) -> Iterator[Measured]:
    """One-sided, of arms that are equally bad."""
    for n, share in ((104, 0.02), (104, 0.2), (340, 0.1)):
        columns = drawn(generator(seed, "mcnemar", n, share), n, runs, first_only=share, second_only=share, both=0.1)
        yield Measured(
            rule="McNemar, one-sided",
            setting=f"{n} prompts, {2 * share:.0%} differ, no true difference",
            error="called better",
            promised=ALPHA,
            gates=True,
            runs=runs,
            errors=how_often(
                lambda b, c, both: stats.mcnemar_exact(paired(b, c, both, n), two_sided=False) <= ALPHA,  # noqa: B023 - called at once
                *columns,
            ),
        )


def excess(runs: int, seed: int, *, margins: Sequence[tuple[int, float, float]] = MARGINS) -> Iterator[Measured]:
    """Arms whose true excess is just the margin, by the exact test, and by the ends of intervals for comparison."""
    for n, margin, second in margins:
        for both in (0.0, 0.3):
            draw = generator(seed, "excess", n, margin, second, both)
            columns = drawn(draw, n, runs, first_only=margin + second, second_only=second, both=both)
            setting = f"{n} prompts, true excess {margin:.0%}, {second:.0%} the other way, {both:.0%} in common"
            yield Measured(
                rule="excess, exact test",
                setting=setting,
                error="called smaller than the margin",
                promised=ALPHA,
                gates=True,
                runs=runs,
                errors=how_often(
                    lambda b, c, k: stats.non_inferior(paired(b, c, k, n), margin=margin),  # noqa: B023 - called at once
                    *columns,
                ),
            )
            for rule, interval in (("Newcombe", stats.newcombe_paired), ("Tango", stats.tango_paired)):
                yield Measured(
                    rule=f"excess by the upper end of {rule}'s interval",
                    setting=setting,
                    error="called smaller than the margin",
                    promised=ALPHA,
                    gates=False,
                    runs=runs,
                    errors=how_often(
                        lambda b, c, k: interval(paired(b, c, k, n), confidence=1 - 2 * ALPHA).high < margin,  # noqa: B023 - called at once
                        *columns,
                    ),
                )


def means(runs: int, seed: int) -> Iterator[Measured]:
    """What utility rests on: the share kept of a gain, and the t interval of a mean, on losses that are skewed."""
    for n in (16, 32, 128):
        draw, kept = generator(seed, "ratio", n), 0.8
        errors = {"ratio": 0, "t": 0}
        for _ in range(runs):
            gains = draw.gamma(2.0, 0.25, size=n)
            own = kept * gains + draw.normal(0, 0.05, size=n)
            errors["ratio"] += (
                stats.bootstrap_ratio(own.tolist(), gains.tolist(), confidence=0.9, resamples=RESAMPLES).low > kept
            )
            errors["t"] += stats.paired_t(gains.tolist(), confidence=0.9).high < 2 * 0.25
        for rule, error in (("ratio", "called larger than it is"), ("t", "true mean above")):
            yield Measured(
                rule={"ratio": "share of the gain kept, bootstrap", "t": "upper end of a mean, t"}[rule],
                setting=f"{n} samples, losses drawn from a gamma distribution",
                error=error,
                promised=ALPHA,
                gates=False,
                runs=runs,
                errors=errors[rule],
            )


def clusters(runs: int, seed: int) -> Iterator[Measured]:
    """Four replies to each prompt that resemble each other: prompts drawn, and replies as if they were prompts."""
    prompts, k, rate = 60, 4, 0.3
    for alike in (0.5, 0.9):
        draw = generator(seed, "clusters", alike)
        spread = 1 / alike - 1  # of a beta distribution with this correlation between replies to one prompt
        errors = {True: 0, False: 0}
        for _ in range(runs):
            own = draw.beta(rate * spread, (1 - rate) * spread, size=prompts)
            replies = (draw.random((prompts, k)) < own[:, None]).astype(float)
            for by_prompt, groups in ((True, replies), (False, replies.reshape(-1, 1))):
                found = stats.cluster_bootstrap(groups.tolist(), resamples=RESAMPLES)
                errors[by_prompt] += not found.low <= rate <= found.high
        for by_prompt, wrong in errors.items():
            yield Measured(
                rule=f"bootstrap over {'prompts' if by_prompt else 'replies, for comparison'}",
                setting=f"{prompts} prompts, {k} replies each, correlation {alike:g}, true rate {rate:.0%}",
                error="true rate outside",
                promised=ALPHA,
                gates=False,
                runs=runs,
                errors=wrong,
            )
