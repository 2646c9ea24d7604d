"""The calibration of a judge: what it said about rows that people had labelled, as counts in a file.

The file holds no text of any row. Its digest is that of the canonical JSON and names it; reports carry the digest.
"""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from repair.checks.errors import CalibrationInvalid
from repair.checks.judge_info import QUALITIES, JudgeInfo, Proportion

SHIPPED: Final = Path(__file__).parent.parent / "calibrations"
FORMAT: Final = 1


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Counts(_Strict):
    hits: int = Field(ge=0)
    n: int = Field(ge=0)

    @model_validator(mode="after")
    def _a_share(self) -> "_Counts":
        if self.hits > self.n:
            raise ValueError("more hits than rows")
        return self


class _Judge(_Strict):
    name: str
    version: int = Field(ge=1)
    identity: dict[str, str] = Field(default_factory=dict)


class _Rows(_Strict):
    source: str  # names the labelled rows for a reader
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")  # of the file they were read from
    n: int = Field(ge=0)
    held_out: bool = False


class _Document(_Strict):
    format: int = Field(ge=FORMAT, le=FORMAT)
    judge: _Judge
    rows: _Rows
    sensitivity: _Counts
    specificity: _Counts
    refusal_recall: _Counts
    answer_recall: _Counts
    errors: _Counts


@dataclass(frozen=True, kw_only=True)
class JudgeCalibration:
    """What a judge said about labelled rows.

    Attributes:
        name: The judge.
        version: Of the judge.
        identity: Of the judge's weights and templates; a calibration counts for these and no others.
        source: Names the labelled rows.
        sha256: Of the file they were read from.
        n: How many rows were judged.
        held_out: Whether only the rows whose hash is odd were judged.
        counts: One share for each of `QUALITIES`.
        errors: How many rows the judge could not tell; they count as wrong in every share.
    """

    name: str
    version: int
    identity: Mapping[str, str] = field(default_factory=dict)
    source: str
    sha256: str
    n: int
    held_out: bool
    counts: Mapping[str, Proportion]
    errors: Proportion

    def as_dict(self) -> dict[str, Any]:
        """The document that is stored."""
        counts = {name: {"hits": one.hits, "n": one.n} for name, one in self.counts.items()}
        return {
            "format": FORMAT,
            "judge": {"name": self.name, "version": self.version, "identity": dict(self.identity)},
            "rows": {"source": self.source, "sha256": self.sha256, "n": self.n, "held_out": self.held_out},
            **counts,
            "errors": {"hits": self.errors.hits, "n": self.errors.n},
        }

    @property
    def digest(self) -> str:
        """SHA-256 over the canonical JSON."""
        text = json.dumps(self.as_dict(), sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    def applied_to(self, info: JudgeInfo) -> JudgeInfo:
        """The judge with its measured qualities. Raises CalibrationInvalid when it was made for another judge."""
        mine, its = (self.name, self.version), (info.name, info.version)
        if mine != its:
            raise CalibrationInvalid(f"made for {self.name}-v{self.version}, the judge is {info.label}", field="judge")
        differing = sorted(
            key
            for key in self.identity.keys() | info.identity.keys()
            if self.identity.get(key) != info.identity.get(key)
        )
        if differing:
            raise CalibrationInvalid(f"made with another {', '.join(differing)}", field="judge.identity")
        source = f"{self.source}, {'held-out rows' if self.held_out else 'all rows'}"
        qualities: dict[str, Any] = {name: self.counts[name] for name in QUALITIES}
        return replace(info, **qualities, measured_on=source, calibration=self.digest)

    def write(self, where: Path) -> Path:
        """Store it: in the file named, or in a folder under a name of its own digest. Returns the file."""
        named = where if where.suffix == ".json" else where / f"{self.name}-v{self.version}-{self.digest[7:23]}.json"
        named.parent.mkdir(parents=True, exist_ok=True)
        # Written beside and renamed, so that a reader never meets half a file.
        with tempfile.NamedTemporaryFile("w", dir=named.parent, delete=False, encoding="utf-8") as file:
            file.write(json.dumps(self.as_dict(), indent=2, sort_keys=True) + "\n")
        Path(file.name).chmod(0o644)
        Path(file.name).replace(named)
        return named


def read_calibration(path: Path) -> JudgeCalibration:
    """The calibration that a file holds; raises CalibrationInvalid naming file and field."""
    try:
        found = _Document.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise CalibrationInvalid(
            str(first["msg"]).removeprefix("Value error, "), field=where, file=path.name
        ) from error
    except OSError as error:
        raise CalibrationInvalid(error.strerror or "cannot be read", file=str(path)) from error
    shares = {name: getattr(found, name) for name in (*QUALITIES, "errors")}
    counts = {name: Proportion(hits=one.hits, n=one.n) for name, one in shares.items()}
    return JudgeCalibration(
        name=found.judge.name,
        version=found.judge.version,
        identity=found.judge.identity,
        source=found.rows.source,
        sha256=found.rows.sha256,
        n=found.rows.n,
        held_out=found.rows.held_out,
        errors=counts.pop("errors"),
        counts=counts,
    )


def shipped_info(name: str, version: int) -> JudgeInfo:
    """A judge of ours with the calibration that comes with the package; without one nothing is known of it."""
    info, path = JudgeInfo(name=name, version=version), SHIPPED / f"{name}-v{version}.json"
    return read_calibration(path).applied_to(info) if path.is_file() else info
