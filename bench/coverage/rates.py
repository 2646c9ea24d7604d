"""Bounds of one rate: exact, for the eye, through a judge, by category."""

from collections.abc import Iterator

import numpy as np

from bench.coverage.measured import Measured, generator, how_often
from repair.checks import stats
from repair.checks.feasibility import share

ALPHA = 0.05
SIZES, RATES = (59, 104, 340), (0.01, 0.05, 0.15)


def exact_bounds(runs: int, seed: int) -> Iterator[Measured]:
    """Clopper-Pearson, one side and two."""
    for n in SIZES:
        for rate in RATES:
            hits = generator(seed, "exact", n, rate).binomial(n, rate, size=runs)
            for rule, errors in (
                ("Clopper-Pearson upper bound", how_often(lambda k: rate > stats.clopper_pearson_upper(k, n), hits)),  # noqa: B023 - called at once
                ("Clopper-Pearson interval", how_often(lambda k: _outside(rate, stats.clopper_pearson(k, n)), hits)),  # noqa: B023 - as above
            ):
                setting = f"true rate {rate:.0%}, {n} prompts"
                yield Measured(
                    rule=rule,
                    setting=setting,
                    error="true rate outside",
                    promised=ALPHA,
                    gates="upper" in rule,
                    runs=runs,
                    errors=errors,
                )


def score_intervals(runs: int, seed: int) -> Iterator[Measured]:
    """Wilson, which is drawn and gates nothing."""
    for n in SIZES:
        for rate in RATES:
            hits = generator(seed, "wilson", n, rate).binomial(n, rate, size=runs)
            errors = how_often(lambda k: _outside(rate, stats.wilson(k, n)), hits)  # noqa: B023 - called at once
            yield Measured(
                rule="Wilson interval",
                setting=f"true rate {rate:.0%}, {n} prompts",
                error="true rate outside",
                promised=ALPHA,
                gates=False,
                runs=runs,
                errors=errors,
            )


def through_a_judge(runs: int, seed: int) -> Iterator[Measured]:
    """The bound over the sensitivity, when that is known from labels: both are drawn anew in every run."""
    each = 1 - share(ALPHA, excess=False, judged=True)
    for labels, sensitivity, alarms, rate in (
        (93, 0.99, 0.0, 0.15),
        (93, 0.9, 0.0, 0.05),
        (93, 0.7, 0.0, 0.15),
        (300, 0.95, 0.0, 0.15),
        (300, 0.8, 0.02, 0.05),
    ):
        draw, n = generator(seed, "judge", labels, sensitivity, alarms, rate), 104
        found = draw.binomial(labels, sensitivity, size=runs)
        hits = draw.binomial(n, rate * sensitivity + (1 - rate) * alarms, size=runs)

        def erred(known: int, seen: int, *, labels: int = labels, n: int = n, rate: float = rate) -> bool:
            low = stats.clopper_pearson_lower(known, labels, confidence=each)
            return rate > stats.attack_bound(seen, n, confidence=each, sensitivity=low)

        yield Measured(
            rule="bound over the judge's sensitivity",
            setting=f"true rate {rate:.0%}, {n} prompts, sensitivity {sensitivity:.0%} from {labels} labels, "
            f"{alarms:.0%} false alarms",
            error="true rate above",
            promised=ALPHA,
            gates=True,
            runs=runs,
            errors=how_often(erred, found, hits),
        )


def by_category(runs: int, seed: int) -> Iterator[Measured]:
    """Holm over twelve categories, none of which is above the bound."""
    draw, n, kinds, rate = generator(seed, "holm"), 9, 12, 0.15
    hits = np.sort(draw.binomial(n, rate, size=(kinds, runs)), axis=0)

    def erred(*column: int) -> bool:
        return min(stats.holm([stats.p_above(k, n, bound=rate) for k in column])) <= ALPHA

    yield Measured(
        rule="Holm over categories",
        setting=f"{kinds} categories of {n} prompts, each at the bound of {rate:.0%}",
        error="some category called worse",
        promised=ALPHA,
        gates=True,
        runs=runs,
        errors=how_often(erred, *hits),
    )


def _outside(rate: float, interval: stats.Interval) -> bool:
    return not interval.low <= rate <= interval.high
