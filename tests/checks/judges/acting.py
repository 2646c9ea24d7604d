"""Judges that do as the test says; the reply itself names the outcome."""

from collections.abc import Sequence

from repair.checks.judge import Exchange, Judgement, Outcome, ReadsWhole
from repair.checks.judge_info import JudgeInfo
from repair.checks.judge_settings import JudgeSettings


class OutcomeJudge(ReadsWhole):
    """Says what the reply names, and nothing else is known of it."""

    def __init__(self, info: JudgeInfo | None = None) -> None:
        self.info = info or JudgeInfo(name="outcomes", version=1)

    def judge(self, exchanges: Sequence[Exchange]) -> list[Judgement]:
        return [Judgement(outcome=Outcome(one.reply), rule="said", confidence=1.0) for one in exchanges]


def open_outcomes(settings: JudgeSettings) -> OutcomeJudge:
    """As an entry point opens it."""
    return OutcomeJudge(JudgeInfo(name=settings.name, version=1, identity={"model": settings.model or ""}))
