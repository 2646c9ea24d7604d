"""Whether a policy can be used here: methods that exist, packs that hold enough, categories that are asked.

`load_policy` refuses what its numbers alone make impossible. The rest depends on what is installed and on who judges,
and is asked before the first prompt instead of being found after the last. A pack that is missing is no reason to
refuse: what needs it is skipped, and a skip releases nothing.
"""

from collections.abc import Iterator

from repair.checks.errors import PolicyInvalid
from repair.checks.feasibility import Demand, share, unreachable
from repair.checks.framings import FRAMINGS
from repair.checks.judge_info import JudgeInfo
from repair.checks.policy import KINDS, Policy
from repair.checks.robustness import framed_prompts
from repair.checks.suite import Suite
from repair.checks.trials import Candidate
from repair.errors import BadParameters
from repair.lora import LoraAdapter
from repair.methods import METHODS
from repair.tying import without_head


def require_usable(policy: Policy, judge: JudgeInfo) -> None:
    """Raise PolicyInvalid with the field and the reason for the first thing that could never work here."""
    suite = Suite.of(policy, "certify")
    asked = (_sizes(policy, suite, judge), _framings(policy, judge))
    for problems in (_trials(policy), _categories(policy, suite), *asked):
        for field, reason in problems:
            raise PolicyInvalid(reason, field=field, file=policy.name)


def require_buildable(wish: Candidate, adapter: LoraAdapter) -> None:
    """Raise BadParameters for an ordered method that does not exist, or with parameters that mean nothing here.

    Of a composition the first stage is held against the adapter; those behind it see what it leaves.
    """
    kind = METHODS.get(wish.method)
    if kind is None:
        raise BadParameters(f"there are {', '.join(sorted(METHODS))}", field=wish.method)
    kind.parse(wish.parameters).stages[0].must_mean(without_head(adapter).names)


def _trials(policy: Policy) -> Iterator[tuple[str, str]]:
    """Methods that do not exist, and parameters that they do not take."""
    for at, trial in enumerate(policy.trials):
        for wish in trial.candidates():
            if (reason := _unbuildable(wish)) is not None:
                yield f"trials.{at}", reason


def _unbuildable(wish: Candidate) -> str | None:
    kind = METHODS.get(wish.method)
    if kind is None:
        return f"no method is called {wish.method}; there are {', '.join(sorted(METHODS))}"
    try:
        kind.parse(wish.parameters)
    except BadParameters as error:
        return str(error)
    return None


def _categories(policy: Policy, suite: Suite) -> Iterator[tuple[str, str]]:
    """Categories of zero tolerance that nobody is asked about, and hazards that so few prompts leave out."""
    packs = policy.suite.packs.harmful
    if any(name in suite.missing for name in packs):
        return
    asked = {prompt.category for prompt in suite.of_kind("harmful")}
    if unasked := sorted(set(policy.bounds.zero_tolerance) - asked):
        there = ", ".join(sorted(asked))
        yield "bounds.zero_tolerance", f"no harmful prompt is of the category {unasked[0]}; there are {there}"
    if left_out := sorted(suite.harms - asked):
        few = f"{policy.suite.certify.harmful} prompts are too few for the {len(suite.harms)} categories of harm in "
        yield "suite.certify.harmful", f"{few}{', '.join(packs)}: nobody would be asked about {', '.join(left_out)}"


def _sizes(policy: Policy, suite: Suite, judge: JudgeInfo) -> Iterator[tuple[str, str]]:
    """Bounds that the prompts that are there cannot show, by this judge."""
    doubt = 1 - policy.sharing_doubt().bounds.confidence
    held: dict[str, int] = {kind: len(suite.of_kind(kind)) for kind in KINDS}
    lacking: set[str] = {kind for kind in KINDS if suite.missing.intersection(policy.suite.packs.of(kind))}
    for demand in policy.demands():
        if demand.kind in lacking or (demand.kind == "any" and lacking):
            continue
        n = held.get(demand.kind, len(suite.heard))
        there = demand.of(n)
        for field, reason in unreachable(there, doubt=doubt, sensitivity=_seen(there, doubt, judge)):
            yield field, reason if n == demand.n else f"the packs hold {n} of the {demand.n} prompts asked: {reason}"


def _framings(policy: Policy, judge: JudgeInfo) -> Iterator[tuple[str, str]]:
    """Framings that too few prompts fit to show what they are to show, where the robustness stage decides."""
    if not policy.robustness.gate:
        return
    prompts, doubt = [prompt for _, prompt in framed_prompts(policy)], policy.robust_doubt()
    for name in policy.robustness.framings:
        demand = policy.robustness.demand(sum(FRAMINGS[name].rewrite(one.text) is not None for one in prompts))
        for field, reason in unreachable(demand, doubt=doubt, sensitivity=_seen(demand, doubt, judge)):
            yield field, f"{name}: {reason}"


def _seen(demand: Demand, doubt: float, judge: JudgeInfo) -> float:
    if not demand.judged or not judge.calibrated:  # on a judge of whom nothing is known nothing is released anyway
        return 1.0
    return judge.sensitivity.low_at(1 - share(doubt, excess=demand.excess is not None, judged=True))
