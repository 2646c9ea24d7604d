"""The containers say what the commands say: no engine is needed to see that they fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml
from typer.main import get_command

import cli.main  # noqa: F401 - hangs the commands onto the tree
from cli.tree import app
from ledger.settings import Settings

DOCKER = Path(__file__).parents[2] / "docker"
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yml").read_text())
OURS = ("migrate", "api", "control", "worker")


def test_every_service_of_ours_runs_a_command_that_exists() -> None:
    """`command:` is a `lora-repair` command; migrate, api, control and worker are the ones that the tests start."""
    known = set(get_command(app).commands)  # type: ignore[attr-defined] # a click group
    for name in OURS:
        assert COMPOSE["services"][name]["command"][0] in known


def test_every_service_that_stays_has_a_health_check() -> None:
    """Either its own, or the image's."""
    image = (DOCKER / "Dockerfile").read_text()
    assert "HEALTHCHECK" in image
    for name, service in COMPOSE["services"].items():
        if name not in {"bucket", "migrate", "api"}:
            assert "test" in service["healthcheck"], name


def test_nothing_runs_as_root_or_writes_its_image() -> None:
    """Non-root, read-only root file system, no capabilities, no new privileges."""
    assert re.search(r"^USER 10001$", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE)
    for name in OURS:
        service = COMPOSE["services"][name]
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]


def test_the_environment_names_settings_that_exist() -> None:
    """A misspelt variable would be ignored in silence."""
    fields = {f"LORA_REPAIR_{name.upper()}" for name in Settings.model_fields}
    named = set(COMPOSE["services"]["api"]["environment"])
    named |= set(re.findall(r"LORA_REPAIR_[A-Z_]+", (DOCKER / "Dockerfile").read_text()))
    assert {name for name in named if name.startswith("LORA_REPAIR_")} <= fields


def test_every_package_is_copied_into_the_image() -> None:
    """What the wheel holds, the image copies."""
    copied = set(re.findall(r"^COPY (\w+) \1$", (DOCKER / "Dockerfile").read_text(), flags=re.MULTILINE))
    assert copied == {"gate", "pages", "repair", "endpoints", "ledger", "worker", "api", "cli", "migrations"}


def test_the_bucket_is_made_before_anybody_wants_it() -> None:
    """The one that the blob URL names; whatever needs the store waits for that step, and the step for the server."""
    services = COMPOSE["services"]
    bucket = urlsplit(services["api"]["environment"]["LORA_REPAIR_BLOBS_URL"]).netloc
    assert f"s3.bucket.create -name {bucket} " in services["bucket"]["command"][0]
    assert services["bucket"]["image"] == services["s3"]["image"]
    assert services["bucket"]["depends_on"] == {"s3": {"condition": "service_healthy"}}
    for name in ("api", "control", "worker"):
        assert services[name]["depends_on"]["bucket"] == {"condition": "service_completed_successfully"}
