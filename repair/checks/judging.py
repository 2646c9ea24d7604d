"""Judges by name: ours, those behind a server, and those of other packages; each with its calibration.

A package adds a judge as an entry point of the group `lora_repair.judges`: a function that takes `JudgeSettings` and
returns a `Judge`. HTTP lives in such a function too (`endpoints`), so that nothing here opens a connection.
"""

from collections.abc import Callable, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Final, final

from repair.checks.errors import JudgeUnusable
from repair.checks.guards.known import GUARDS, REFUSALS, open_guard
from repair.checks.judge import Exchange, Judge, Judgement
from repair.checks.judge_calibration import read_calibration
from repair.checks.judge_info import JudgeInfo
from repair.checks.judge_settings import RULES, JudgeSettings
from repair.checks.rules import RulesJudge
from repair.checks.second_judge import SecondOpinion

GROUP: Final = "lora_repair.judges"
OVER_HTTP: Final = "openai"  # the entry point that opens every judge behind a URL

OpenJudge = Callable[[JudgeSettings], Judge]


@final
class Calibrated:
    """A judge with the qualities of a calibration made for it; raises CalibrationInvalid when made for another."""

    def __init__(self, judge: Judge, calibration: Path) -> None:
        self._judge = judge
        self._info = read_calibration(calibration).applied_to(judge.info)

    @property
    def info(self) -> JudgeInfo:
        """Identity and measured quality."""
        return self._info

    def judge(self, exchanges: Sequence[Exchange]) -> list[Judgement]:
        """One judgement for each exchange, in the same order."""
        return self._judge.judge(exchanges)

    def settled(self, exchanges: Sequence[Exchange]) -> list[bool]:
        """As the judge itself."""
        return self._judge.settled(exchanges)


def judge_of(settings: JudgeSettings) -> Judge:
    """The judge that is asked for; raises JudgeUnusable when there is none, CalibrationInvalid when it is another's."""
    judge = _opener(settings)(settings)
    if settings.second is not None and settings.second_may_clear:
        judge = SecondOpinion(judge, judge_of(settings.second), may_clear=True)
    elif settings.second is not None:
        calibrated = judge if settings.calibration is None else Calibrated(judge, Path(settings.calibration))
        return SecondOpinion(calibrated, judge_of(settings.second), may_clear=False)
    return judge if settings.calibration is None else Calibrated(judge, Path(settings.calibration))


def judge_names() -> list[str]:
    """Every name that can be asked for here."""
    return sorted({RULES, REFUSALS, *GUARDS, *_installed()})


def _opener(settings: JudgeSettings) -> OpenJudge:
    if settings.name == RULES:
        return lambda _settings: RulesJudge()
    installed, ours = _installed(), {REFUSALS, *GUARDS}
    if settings.name in ours and settings.url is None:
        return open_guard
    if settings.name in GUARDS and OVER_HTTP in installed:
        return _loaded(installed[OVER_HTTP])
    if settings.name in ours:
        raise JudgeUnusable("it cannot be asked over HTTP here", field=settings.name)
    if settings.name not in installed:
        raise JudgeUnusable(f"no such judge; there are {', '.join(judge_names())}", field=settings.name)
    return _loaded(installed[settings.name])


def _installed() -> dict[str, EntryPoint]:
    return {point.name: point for point in entry_points(group=GROUP)}


def _loaded(point: EntryPoint) -> OpenJudge:
    try:
        found: OpenJudge = point.load()
    except (ImportError, AttributeError) as error:
        raise JudgeUnusable(f"{point.value} cannot be loaded: {error}", field=point.name) from error
    return found
