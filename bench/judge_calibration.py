"""Measure the rule judge against human labels, read as data out of a PyRIT wheel.

    pip download --no-deps pyrit==1.1.0 && python bench/judge_calibration.py pyrit-1.1.0-py3-none-any.whl

The wheel is never imported and nothing of it is copied: its two label sets (395 "objective achieved" rows and 169
refusal rows, MIT) are read from the archive, and only counts are printed. The rules were written while looking at
the rows whose hash is even; only the odd rows, which were not looked at, count as the measurement.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

from repair.checks.judge import Exchange, Judgement, Outcome
from repair.checks.rules import RulesJudge
from repair.checks.stats import clopper_pearson_lower

OBJECTIVE = "pyrit/datasets/scorer_evals/objective/"
REFUSAL = "pyrit/datasets/scorer_evals/refusal_scorer/"


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """One human-labelled reply."""

    source: str
    prompt: str
    reply: str
    positive: bool

    @property
    def held_out(self) -> bool:
        """Whether the row was kept from the eyes that wrote the rules."""
        return hashlib.sha256((self.prompt + self.reply).encode()).digest()[0] % 2 == 1


def read_labels(wheel: Path, folder: str) -> list[Labelled]:
    """The rows of all label files in one folder of the wheel."""
    rows: list[Labelled] = []
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if not (name.startswith(folder) and name.endswith(".csv")):
                continue
            lines = archive.read(name).decode("utf-8-sig").splitlines(keepends=True)
            body = "".join(lines[next(i for i, line in enumerate(lines) if not line.startswith("#")) :])
            rows += [
                Labelled(
                    source=name.removeprefix(folder),
                    prompt=row["objective"],
                    reply=row["assistant_response"] or "",
                    positive=row["human_score"].strip() in {"1", "1.0", "True", "TRUE"},
                )
                for row in csv.DictReader(io.StringIO(body))
            ]
    return rows


def judged(rows: list[Labelled], *, harmful: bool) -> list[tuple[Labelled, Judgement]]:
    """Each row with what the rule judge says."""
    exchanges = [Exchange(prompt=row.prompt, reply=row.reply, harmful=harmful) for row in rows]
    return list(zip(rows, RulesJudge().judge(exchanges), strict=True))


def share(
    pairs: list[tuple[Labelled, Judgement]], *, positive: bool, outcome: Outcome, wanted: bool
) -> dict[str, object]:
    """Among the rows people labelled ``positive``, how many have the outcome (or have it not)."""
    chosen = [judgement for row, judgement in pairs if row.positive is positive]
    hits = sum((judgement.outcome is outcome) is wanted for judgement in chosen)
    low = clopper_pearson_lower(hits, len(chosen), confidence=0.975)
    return {"hits": hits, "n": len(chosen), "rate": round(hits / len(chosen), 4), "low": round(low, 4)}


def measure(objective: list[Labelled], refusal: list[Labelled]) -> dict[str, object]:
    """The four proportions that a judge reports."""
    achieved, refused = judged(objective, harmful=True), judged(refusal, harmful=True)
    harm = Outcome.HARMFUL_COMPLIANCE
    return {
        "sensitivity": share(achieved, positive=True, outcome=harm, wanted=True),
        "specificity": share(achieved, positive=False, outcome=harm, wanted=False),
        "refusal_recall": share(refused, positive=True, outcome=Outcome.REFUSAL, wanted=True),
        "answer_recall": share(refused, positive=False, outcome=Outcome.REFUSAL, wanted=False),
    }


def main() -> None:
    """Print the counts on the held-out rows and on all."""
    wheel = Path(sys.argv[1])
    objective, refusal = read_labels(wheel, OBJECTIVE), read_labels(wheel, REFUSAL)
    report = {
        "wheel": hashlib.sha256(wheel.read_bytes()).hexdigest(),
        "judge": f"{RulesJudge.info.name}-v{RulesJudge.info.version}",
        "held_out": measure([r for r in objective if r.held_out], [r for r in refusal if r.held_out]),
        "all": measure(objective, refusal),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
