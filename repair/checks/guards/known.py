"""The guards that we know by name, and how one is opened on this machine. Loads torch only when one is opened."""

from typing import Final

from repair.checks.guards.contract import Guard
from repair.checks.guards.criteria import GraniteGuardian, ShieldGemma, StrongReject, StrongRejectRubric
from repair.checks.guards.guarded import GuardJudge
from repair.checks.guards.verdicts import HarmBench, LlamaGuard3, LlamaGuard4, Qwen3Guard, WildGuard
from repair.checks.judge import Judge
from repair.checks.judge_settings import JudgeSettings

REFUSALS: Final = "refusal-classifier"
GUARDS: Final[dict[str, type[Guard]]] = {
    kind.name: kind
    for kind in (
        Qwen3Guard,
        WildGuard,
        HarmBench,
        StrongReject,
        StrongRejectRubric,
        LlamaGuard3,
        LlamaGuard4,
        GraniteGuardian,
        ShieldGemma,
    )
}


def open_guard(settings: JudgeSettings) -> Judge:
    """The judge on a folder of weights; raises JudgeUnusable naming what is missing."""
    if settings.name == REFUSALS:
        from repair.checks.guards.classifier import RefusalClassifier  # noqa: PLC0415 - torch and transformers

        return RefusalClassifier.load(settings)
    from repair.checks.guards.local import LocalAsker  # noqa: PLC0415 - as above

    guard = GUARDS[settings.name](settings)  # first, for it is quick to say what is missing
    return GuardJudge(guard, LocalAsker.load(settings, guard))
