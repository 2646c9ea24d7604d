"""A ledger, blobs, a signing key and a reference whose model is scripted: everything a job needs, without a queue."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sqlalchemy import func, select

from gate.digest import root_digest
from ledger import adapters, audit, jobs, packs, references
from ledger.adapters import NewAdapter
from ledger.audit import Query
from ledger.jobs import NewJob
from ledger.tables import Artifact, Job, Statement
from repair.basis import BasisIdentity, BasisSettings
from repair.basis_writer import write_basis
from repair.checkpoint import Checkpoint
from repair.checks.toy import ToyChat
from repair.context import RepairContext
from repair.measure_basis import measured_linears
from tests.checks.acting import UPLOAD, Character, chat_of
from tests.tiny import adapter_tensors, calibration, write_adapter_files
from worker.pipeline import Tools, run_job
from worker.references import OpenReference

if TYPE_CHECKING:
    from ledger.db import Database
    from ledger.settings import Settings
    from repair.checks.policy import Policy

REFERENCE = "tiny"
OWNER = "cpu@here#1"


class Chat(ToyChat):
    """The scripted model with the one attribute more that a worker asks for."""

    device = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class House:
    """What the worker's tests ask for."""

    tools: Tools

    @property
    def database(self) -> Database:
        return self.tools.database

    @property
    def settings(self) -> Settings:
        return self.tools.settings

    def add_reference(
        self, aligned: Path, base: Path | None = None, *, name: str = REFERENCE, **tools: Path | None
    ) -> None:
        """Register a pair of folders, with a patch or a twin where one is given."""
        new = references.describe(name, aligned=aligned, base=base, **tools)
        with self.database.begin() as tx:
            references.add(tx, new, actor="system:test")

    def add_packs(self, folder: Path) -> tuple[packs.Pack, packs.Pack]:
        """Measure the reference's models, as `reference prepare` does, and register what was found."""
        with self.database.read() as tx:
            row = references.get(tx, REFERENCE)
        calibration(folder / "calibration", aligned=row.aligned_digest)
        aligned, base = (Checkpoint.open(Path(str(path))) for path in (row.aligned_path, row.base_path))
        context, settings = RepairContext(aligned=aligned, base=base), BasisSettings()
        identity = BasisIdentity(aligned=row.aligned_digest, base=str(row.base_digest), settings=settings)
        write_basis(identity, measured_linears(context, settings), folder / "basis", left_out={}, about={})
        made = packs.describe("calibration", folder / "calibration"), packs.describe("basis", folder / "basis")
        with self.database.begin() as tx:
            packs.attach(tx, REFERENCE, *made, aligned_digest=row.aligned_digest, actor="system:test")
        return made

    def install(self, character: Character) -> None:
        """Have the reference open already, with a scripted model in the place of weights that run."""
        with self.database.read() as tx:
            row = references.get(tx, REFERENCE)
        chat = chat_of(character)
        self.tools.references._held = OpenReference(
            name=REFERENCE,
            aligned=Checkpoint.open(Path(row.aligned_path)),
            base=Checkpoint.open(Path(row.base_path)) if row.base_path else None,
            chat=Chat(script=chat.script, losses=chat.losses, drifts=chat.drifts),  # type: ignore[arg-type] # scripted
            aligned_digest=row.aligned_digest,
            base_digest=row.base_digest,
        )

    def add_policy(self, name: str, policy: Policy) -> None:
        """Lay a policy where the operator's lie."""
        self.settings.policies_dir.mkdir(parents=True, exist_ok=True)
        (self.settings.policies_dir / f"{name}.toml").write_text(as_toml(policy))

    def add_adapter(self, folder: Path) -> str:
        """Store an adapter as the API does. Returns its id."""
        files: list[dict[str, Any]] = [dict(file) for file in self.tools.blobs.put_directory(folder)]
        new = NewAdapter(
            name=folder.name,
            digest=root_digest({file["name"]: file["sha256"] for file in files}),
            size=sum(file["size"] for file in files),
            files=files,
            inspection={},
            reference=REFERENCE,
        )
        with self.database.begin() as tx:
            return adapters.create(tx, new, uploaded_by="token:test").id

    def order(self, adapter_id: str, *, policy: str = "quick", max_attempts: int = 3, **spec: Any) -> str:
        """A queued job. Returns its id."""
        wish = NewJob(
            adapter_id=adapter_id,
            reference=REFERENCE,
            spec={"policy": policy, **spec},
            max_attempts=max_attempts,
        )
        with self.database.begin() as tx:
            return jobs.create(tx, wish, opened_by="token:test").id

    def run(self, job_id: str, *, owner: str = OWNER) -> Job:
        """Carry the job to its end. Returns its row."""
        run_job(job_id, self.tools, owner=owner)
        return self.job(job_id)

    def job(self, job_id: str) -> Job:
        with self.database.read() as tx:
            return jobs.get(tx, job_id)

    def actions(self, job_id: str) -> list[str]:
        """What the audit log says about a job, oldest first."""
        with self.database.read() as tx:
            wanted = Query(subject_type="job", subject_id=job_id)
            return [event.action for event in audit.search(tx, wanted, limit=200, newest_first=False).items]

    def kept(self) -> tuple[int, int]:
        """How many artifacts and how many statements there are."""
        with self.database.read() as tx:
            counts = [tx.scalar(select(func.count()).select_from(table)) or 0 for table in (Artifact, Statement)]
        return counts[0], counts[1]

    @property
    def scratch(self) -> list[Path]:
        """What attempts have left behind."""
        return list((self.settings.data_dir / "scratch").glob("*"))


def upload_folder(folder: Path, *, readme: str | None = None) -> Path:
    """The adapter that the scripted model knows, on disk."""
    write_adapter_files(folder, adapter_tensors(UPLOAD), UPLOAD.config)
    if readme is not None:
        (folder / "README.md").write_text(readme)
    return folder


def whole_folder(folder: Path) -> Path:
    """The same adapter with a head of its own, which takes the place of the model's."""
    tensors = adapter_tensors(UPLOAD) | {"base_model.model.lm_head.weight": torch.ones(7, 53)}
    return write_adapter_files(folder, tensors, {**UPLOAD.config, "modules_to_save": ["lm_head"]})


def as_toml(policy: Policy) -> str:
    """A policy as its file would be written; inline tables are TOML's own JSON."""
    document = policy.model_dump(mode="json", exclude_none=True)
    return "".join(f"{key} = {_value(value)}\n" for key, value in document.items())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_value, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)
