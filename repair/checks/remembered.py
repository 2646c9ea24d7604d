"""What the aligned model answered, kept from job to job: it is the same as long as all that decides it is the same."""

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from repair.checks.backend import Backend
from repair.checks.judge_info import JudgeInfo
from repair.checks.kinds import CHECKS
from repair.checks.policy import Policy
from repair.checks.suite import Suite

_FORM: Final = "aligned/4"  # of a remembered report


@dataclass(frozen=True, kw_only=True)
class Remembered:
    """Reports of one reference under one policy.

    Attributes:
        folder: Where they are kept; None keeps them for this object's life alone.
        reference: Digest of the aligned model; without one nothing is kept in the folder.
        backend: What is asked; its fingerprint counts.
        policy: What is asked of it.
        judge: Who reads the answers.
    """

    folder: Path | None
    reference: str
    backend: Backend
    policy: Policy
    judge: JudgeInfo
    _known: dict[str, dict[str, Any]] = field(default_factory=dict)

    def tokens(self, what: str) -> int:
        """What measuring that took, whenever it was; 0 where it was not asked for."""
        return int(self._known[what]["tokens"]) if what in self._known else 0

    def get(self, what: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the aligned model did on one half, or in the robustness stage; made once."""
        if what not in self._known:
            self._known[what] = self._from_folder(what, make)
        return self._known[what]

    def _from_folder(self, what: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if self.folder is None or not self.reference:
            return make()
        path = self.folder / f"{self._key(what)}.json"
        if path.is_file():
            known: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return known
        found = make()
        _write_whole(path, json.dumps(found))
        return found

    def _key(self, what: str) -> str:
        """The hash of everything that decides what the aligned model does in ``what``."""
        decides = [
            _FORM,
            what,
            self.reference,
            self.policy.digest,
            Suite.of(self.policy, "select" if what == "select" else "certify").digests,
            self.backend.fingerprint(),
            self.judge.as_dict(self.policy.bounds.confidence),
            [[check.name, check.version] for check in CHECKS],
        ]
        return hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()


def _write_whole(path: Path, text: str) -> None:
    """Write beside and rename, so that a reader never meets half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write(text)
    Path(file.name).replace(path)
