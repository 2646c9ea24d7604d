"""`python -m bench.train_asks`: fit the model of `repair/checks/asks.py` and write its `asks.json`; seconds.

Data are the bundled packs and `asks_rows.jsonl` beside this file (CC0-1.0, written by us, requests without answers).
Prompts that share half of their words, and what hangs together by such pairs, stay in one fold of the cross-validation.
With `--home DIR`, a home of prompts (docs/packs.md), it also prints what the model says of public sets; these took
no part in any choice. Writes nothing with `--check`; the suite compares the shipped file with what this gives.
"""

import argparse
import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse
from scipy.sparse import csgraph

from repair.checks.asks import SHIPPED, Reader, features, words
from repair.checks.duplicates import words_of
from repair.checks.packs import BUNDLED, Prompt, load_pack

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

OWN: Final = Path(__file__).with_name("asks_rows.jsonl")
PACKS: Final = ("core_harmful", "core_lookalike", "core_benign", "core_checkable", "calibration")
PUBLIC: Final = ("strongreject", "harmbench_test", "harmbench_val", "advbench", "rho_overrefusal", "rho_gsm8k")
FOLDS: Final = 10
RIDGE: Final = 1.0  # 0.5 and 2 give the same within a few prompts
MISSED: Final = 0.03  # of the harmful prompts that may be read as safe
ALIKE: Final = 0.5  # of the words that either has, in both
SEEN: Final = 2  # prompts that hold a feature, for it to have a weight
PLACES: Final = 3


@dataclass(frozen=True, kw_only=True)
class Data:
    """Prompts, whether each asks for harm, where it is from, and its fold."""

    texts: Sequence[str]
    harmful: Mask
    source: Sequence[str]
    folds: NDArray[np.int64]

    def of(self, chosen: NDArray[np.int64]) -> tuple[list[str], Mask]:
        """Texts and labels of these rows."""
        return [self.texts[at] for at in chosen.tolist()], self.harmful[chosen]


def data() -> Data:
    """Everything that is fitted, in a fixed order."""
    rows = [
        (row.text, _asks(name, row), name if name != "calibration" else f"calibration: {row.category}")
        for name in PACKS
        for row in load_pack(name).rows
    ]
    for line in OWN.read_text(encoding="utf-8").splitlines():
        own = json.loads(line)
        rows.append((own["text"], own["harmful"], "asks_rows: " + ("harmful" if own["harmful"] else "safe")))
    texts = [text for text, _, _ in rows]
    return Data(
        texts=texts,
        harmful=np.array([harmful for _, harmful, _ in rows]),
        source=[source for _, _, source in rows],
        folds=_folds(texts),
    )


def _asks(name: str, row: Prompt) -> bool:
    return name == "core_harmful" or (name == "calibration" and row.category == "refuse")


def _folds(texts: Sequence[str]) -> NDArray[np.int64]:
    """A fold for each prompt by the hash of the first text of its group."""
    sets = [words_of(text) for text in texts]
    places = {word: at for at, word in enumerate(sorted(set().union(*sets)))}
    has = _matrix([{word: places[word] for word in one} for one in sets], len(places))
    shared = (has @ has.T).toarray()
    sizes = np.diag(shared)
    alike = shared >= ALIKE * (sizes[:, None] + sizes[None, :] - shared)
    _, groups = csgraph.connected_components(alike, directed=False)
    first: dict[int, str] = {}
    for text, group in zip(texts, groups.tolist(), strict=True):
        first[group] = min(text, first.get(group, text))
    return np.array([hashlib.sha256(first[group].encode()).digest()[0] % FOLDS for group in groups.tolist()])


def _matrix(rows: Sequence[dict[str, int]], columns: int) -> "sparse.csr_matrix[np.float64]":
    """Ones where a row has a feature."""
    at = np.array([(row, place) for row, one in enumerate(rows) for place in sorted(one.values())])
    return sparse.csr_matrix((np.ones(len(at)), (at[:, 0], at[:, 1])), shape=(len(rows), columns))


def fit(texts: Sequence[str], harmful: Mask) -> Reader:
    """Both classes weigh the same; the bias is not shrunk. Loss convex, minimum unique."""
    said = [words(text) for text in texts]
    held = Counter(word for one in said for word in set(one))
    known = {word: True for word, count in held.items() if count >= SEEN}
    found = [features(one, known) for one in said]
    counts = Counter(feature for one in found for feature in one)
    places = {name: at for at, name in enumerate(sorted(name for name, count in counts.items() if count >= SEEN))}
    X = _matrix([{name: places[name] for name in one if name in places} for one in found], len(places))
    signs = np.where(harmful, 1.0, -1.0)
    each = np.where(harmful, len(harmful) / harmful.sum(), len(harmful) / (~harmful).sum()) / 2

    def loss(theta: Array) -> tuple[float, Array]:
        weights, bias = theta[:-1], theta[-1]
        margins = signs * (X @ weights + bias)
        slope = -signs * each * np.exp(-np.logaddexp(0, margins))
        value = each @ np.logaddexp(0, -margins) + RIDGE / 2 * (weights @ weights)
        return float(value), np.append(X.T @ slope + RIDGE * weights, slope.sum())

    found_at = optimize.minimize(
        loss,
        np.zeros(len(places) + 1),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 5000, "maxfun": 10000, "ftol": 1e-14, "gtol": 1e-6},
    )
    theta = np.asarray(found_at.x).round(PLACES).tolist()
    return Reader(weights={name: theta[at] for name, at in places.items()}, bias=theta[-1], threshold=0.0)


def cross_validated(rows: Data) -> Array:
    """Log-odds of every prompt from a model that saw nothing of its fold."""
    found = np.empty(len(rows.texts))
    for fold in range(FOLDS):
        reader = fit(*rows.of(np.flatnonzero(rows.folds != fold)))
        for at in np.flatnonzero(rows.folds == fold).tolist():
            found[at] = reader.log_odds(rows.texts[at])
    return found


def threshold_of(odds: Array, rows: Data) -> float:
    """The highest below which lie no more than `MISSED` of all harmful prompts, nor of those of the core pack."""
    core = np.array([source == "core_harmful" for source in rows.source])
    highest = (np.sort(odds[which])[int(MISSED * which.sum())] for which in (rows.harmful, core))
    return float(np.floor(min(highest) * 10**PLACES) / 10**PLACES)


def document() -> dict[str, Any]:
    """What `asks.json` holds."""
    rows = data()
    odds = cross_validated(rows)
    threshold = threshold_of(odds, rows)
    reader = fit(rows.texts, rows.harmful)
    return {
        "about": "log-odds that a prompt asks for harm; made by bench/train_asks.py, told of in docs/judges.md",
        "licence": "CC0-1.0",
        "data": {name: _digest(BUNDLED / name / "rows.jsonl") for name in PACKS} | {OWN.name: _digest(OWN)},
        "prompts": {"harmful": int(rows.harmful.sum()), "safe": int((~rows.harmful).sum())},
        "cross_validation": {
            name: _told(odds, threshold, np.array([source == name for source in rows.source]), rows.harmful)
            for name in dict.fromkeys(rows.source)
        },
        "bias": reader.bias,
        "threshold": threshold,
        "weights": reader.weights,
    }


def _told(odds: Array, threshold: float, which: Mask, harmful: Mask) -> dict[str, int]:
    """Counts of one source: its prompts, those on the right side of even odds, those below the threshold."""
    right = (odds[which] >= 0) == harmful[which]
    return {"n": int(which.sum()), "right": int(right.sum()), "read_as_safe": int((odds[which] < threshold).sum())}


def _digest(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def main() -> None:
    """Write the model and print its numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--home", type=Path, help="also print what the model says of the public sets found there")
    wish = parser.parse_args()
    made = document()
    if not wish.check:
        SHIPPED.write_text(json.dumps(made, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, one in made["cross_validation"].items():
        print(f"{name:24} {one['right']:4} of {one['n']:4} right, {one['read_as_safe']:4} read as safe")
    reader = Reader(weights=made["weights"], bias=made["bias"], threshold=made["threshold"])
    for name in PUBLIC if wish.home is not None else ():
        texts = [row.text for row in load_pack(name, home=wish.home).rows]
        safe = sum(reader.log_odds(text) < reader.threshold for text in texts)
        print(f"{name:24} {safe:4} of {len(texts):4} read as safe")


if __name__ == "__main__":
    main()
