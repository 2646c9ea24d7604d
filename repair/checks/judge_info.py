"""Which judge read the replies, and how well it was measured to see what people see. Values only."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args


@dataclass(frozen=True, kw_only=True)
class Proportion:
    """A share measured on labelled rows; without rows nothing is known of it, and its lower bound is 0."""

    hits: int
    n: int

    @property
    def rate(self) -> float | None:
        """The point value; None where nothing was measured."""
        return self.hits / self.n if self.n else None

    def low_at(self, confidence: float) -> float:
        """What the true share is at least, with this one-sided confidence."""
        return self.bounds(confidence)[0]

    def bounds(self, confidence: float) -> tuple[float, float]:
        """Both exact one-sided bounds, each with this confidence."""
        from repair.checks.stats import clopper_pearson_lower, clopper_pearson_upper  # noqa: PLC0415 - a second of scipy

        low = clopper_pearson_lower(self.hits, self.n, confidence=confidence)
        return low, clopper_pearson_upper(self.hits, self.n, confidence=confidence)

    def as_dict(self, confidence: float) -> dict[str, float | int | None]:
        """For the report: the counts, the point value, and the one-sided lower bound."""
        return {"hits": self.hits, "n": self.n, "rate": self.rate, "low": self.low_at(confidence)}


NOT_MEASURED: Final = Proportion(hits=0, n=0)

Quality = Literal["sensitivity", "specificity", "refusal_recall", "answer_recall"]
QUALITIES: Final[tuple[Quality, ...]] = get_args(Quality)


@dataclass(frozen=True, kw_only=True)
class JudgeInfo:
    """Who judges, and every quality that was measured on labelled rows.

    Attributes:
        name: The judge.
        version: Of its rules or of the way its model is asked.
        identity: Digests of what else decides its outcomes: weights, template, address. Empty for the rule judge.
        sensitivity: P(judge says harmful compliance | people say the objective was achieved).
        specificity: P(judge says something else that is no error | people say it was not).
        refusal_recall: P(judge says refusal | people say refusal).
        answer_recall: P(judge says no refusal | people say no refusal).
        measured_on: The labelled rows.
        calibration: Digest of the calibration that holds the counts; empty where there is none.
    """

    name: str
    version: int
    identity: Mapping[str, str] = field(default_factory=dict)
    sensitivity: Proportion = NOT_MEASURED
    specificity: Proportion = NOT_MEASURED
    refusal_recall: Proportion = NOT_MEASURED
    answer_recall: Proportion = NOT_MEASURED
    measured_on: str = ""
    calibration: str = ""

    @property
    def label(self) -> str:
        """Name and version in one word."""
        return f"{self.name}-v{self.version}"

    @property
    def calibrated(self) -> bool:
        """Whether anything is known of how many harmful replies it misses."""
        return self.sensitivity.n > 0

    def as_dict(self, confidence: float) -> dict[str, Any]:
        """For the report: who judged, and every measured quality with its lower bound at this confidence."""
        return {
            "name": self.name,
            "version": self.version,
            "identity": dict(self.identity),
            "confidence": confidence,
            **{quality: getattr(self, quality).as_dict(confidence) for quality in QUALITIES},
            "measured_on": self.measured_on,
            "calibration": self.calibration,
        }
