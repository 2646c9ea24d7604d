"""What an operator may set, read once and frozen; nothing else in the service touches the environment.

Every field is read from ``LORA_REPAIR_<NAME>``; `docs/settings.md` is written from these fields. Empty URLs mean this
machine: SQLite, a Valkey server of our own on a unix socket, and blobs in a folder, all below `data_dir`.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

# The address of a unix socket has room for 104 bytes on macOS and 108 on Linux.
LONGEST_SOCKET_PATH = 100


class Settings(BaseSettings):
    """The settings of one installation."""

    model_config = SettingsConfigDict(env_prefix="LORA_REPAIR_", frozen=True, extra="forbid")

    data_dir: Path = Field(
        default=Path(".lora-repair"), description="Folder in which this machine keeps what it must remember"
    )
    database_url: str = Field(
        default="", description="`postgresql://...` or `sqlite:///...`; empty: `ledger.db` in the data folder"
    )
    broker_url: str = Field(
        default="",
        description="`redis://...`, `redis+socket://...` or `sentinel://...`; empty: a Valkey server of our own",
    )
    blobs_url: str = Field(
        default="", description="`s3://bucket/prefix` or `file:///...`; empty: `blobs` in the data folder"
    )
    device: str = Field(
        default="auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="What workers compute on: `auto`, `cpu`, `cuda:N`",
    )
    batch_tokens: int = Field(
        default=16384,
        ge=256,
        description="Positions of a batch while replies are generated: bounds the memory that a measurement takes",
    )
    max_upload_bytes: int = Field(default=2 << 30, gt=0, description="Size of the largest upload that is let in")
    lease_seconds: float = Field(
        default=30.0, gt=0, description="A worker that says nothing for so long has lost its job"
    )
    heartbeat_seconds: float = Field(default=5.0, gt=0, description="Pause between two signs of life of a worker")
    dispatch_seconds: float = Field(
        default=60.0, gt=0, description="A message that no worker took for so long is sent again"
    )
    max_attempts: int = Field(default=3, gt=0, description="Attempts at a job before it is given up as dead")
    job_seconds: float = Field(
        default=6 * 3600.0,
        gt=0,
        description="A job that takes so long fails; nothing about it would be quicker another time",
    )
    job_kill_seconds: float = Field(
        default=300.0,
        gt=0,
        description="A job that does not even stop when it is told to is killed so long after that: its model hangs",
    )
    stop_seconds: float = Field(
        default=60.0,
        ge=0,
        description="How long a worker that must stop lets its job run on before the job is given back",
    )
    worker_max_memory_bytes: int | None = Field(
        default=None,
        gt=0,
        description="A worker's child that holds more after a job is replaced; not set: no limit",
    )
    network: Literal["off", "mirror", "hub"] = Field(
        default="off",
        description="What `packs add` may fetch from: nothing (`off`), pip's index (`mirror`), the hub as well (`hub`)",
    )
    host: str = Field(default="127.0.0.1", description="Address that the API listens on")
    port: int = Field(default=8321, ge=0, le=65535, description="Port that the API listens on")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="The least that is logged: `debug`, `info`, `warning` or `error`"
    )

    @field_validator("data_dir")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        """Every process of one installation must mean the same folder, wherever it was started."""
        return value.expanduser().absolute()

    @classmethod
    def load(cls) -> Self:
        """The settings of this process's environment."""
        return cls()

    @property
    def database(self) -> str:
        """The database that is really used."""
        return self.database_url or f"sqlite:///{self.data_dir / 'ledger.db'}"

    @property
    def broker(self) -> str:
        """The broker that is really used."""
        return self.broker_url or f"redis+socket://{self.broker_socket}?virtual_host=0"

    @property
    def blobs(self) -> str:
        """The blob store that is really used."""
        return self.blobs_url or (self.data_dir / "blobs").as_uri()

    @property
    def policies_dir(self) -> Path:
        """Where the operator's own policies lie, `NAME.toml` each; API and workers must see the same files."""
        return self.data_dir / "policies"

    @property
    def packs_dir(self) -> Path:
        """Where `reference prepare` keeps what it measured; every worker must see the same files."""
        return self.data_dir / "packs"

    @property
    def prompts_dir(self) -> Path:
        """Where `packs add` keeps prompts that are not bundled; every worker must see the same files."""
        return self.data_dir / "prompts"

    @property
    def broker_socket(self) -> Path:
        """Where our own Valkey listens: in the data directory, or elsewhere if that path is too long."""
        near = self.data_dir / "valkey" / "valkey.sock"
        if len(os.fsencode(near)) <= LONGEST_SOCKET_PATH:
            return near
        mark = hashlib.sha256(os.fsencode(self.data_dir)).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"lora-repair-{os.getuid()}-{mark}" / "valkey.sock"
