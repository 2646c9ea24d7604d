"""Starting the command line: quick, light, and with an exit code that tells the truth."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cli.errors import Exit
from cli.remote import describe_progress, exit_code, parse_settings
from cli.settings import environment, load
from ledger.db import newest_revision

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.cli.conftest import Said

    Say = Callable[..., Said]

PROGRAM = "from cli.main import main; main()"
HEAVY = ("torch", "transformers", "celery", "sqlalchemy", "alembic", "obstore", "cryptography", "httpx2", "numpy")


def test_help_costs_less_than_a_second() -> None:
    """Of CPU time, with the interpreter's own start."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", PROGRAM, "--help"], check=False, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert "verify" in done.stdout
    assert (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime) < 1.0


def test_help_imports_nothing_heavy() -> None:
    """Whoever asks for help waits for no tensor, no database and no network."""
    code = f"import sys, atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); {PROGRAM}"
    done = subprocess.run([sys.executable, "-c", code, "--help"], check=False, capture_output=True, text=True)
    loaded = set(done.stderr.split())
    assert "cli.main" in loaded
    assert loaded.isdisjoint(HEAVY), sorted(loaded.intersection(HEAVY))


def test_verify_needs_no_database(tmp_path: Path) -> None:
    """Anyone can check an artifact, with little installed."""
    golden = Path(__file__).parents[1] / "golden" / "v0.1.0"
    code = f"import sys, atexit; atexit.register(lambda: print(*sys.modules, file=sys.stderr)); {PROGRAM}"
    words = ["verify", str(golden / "artifact"), "--public-key", str(golden / "public-key.pem")]
    done = subprocess.run([sys.executable, "-c", code, *words], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"torch", "sqlalchemy", "celery"}.isdisjoint(done.stderr.split())


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["frobnicate"], "frobnicate"),
        (["db", "upgrade", "--nope"], "--nope"),
        (["submit"], "adapter_id"),
        (["submit", "x", "y"], "(y)"),
        (["up", "--port", "many"], "--port"),
        (["db", "downgrade"], "downgrade"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_arguments_leave_with_1(say: Say, words: list[str], named: str) -> None:
    """Not with typer's 2, which means that a policy said no; one line that names the culprit."""
    said = say(*words)
    assert said.code == Exit.ERROR
    assert said.err.startswith("lora-repair: ")
    assert said.err.count("\n") == 1
    assert named in said.err


@pytest.mark.parametrize(("words", "named"), [([], "verify"), (["token"], "create")], ids=["nothing", "a group"])
def test_without_a_command_it_lists_them_and_leaves_with_1(say: Say, words: list[str], named: str) -> None:
    """A script that forgot the command must not go on."""
    said = say(*words)
    assert (said.code, said.out) == (Exit.ERROR, "")
    assert said.err.startswith("Usage: ")
    assert f"  {named} " in said.err


def test_help_is_no_error(say: Say) -> None:
    assert say("token", "--help").code == Exit.OK


def test_every_command_speaks_json(say: Say, tmp_path: Path) -> None:
    """Also those that print one word to a person."""
    there = ("--data-dir", tmp_path)
    upgraded = json.loads(say("db", "upgrade", "--json", *there).out)
    assert upgraded == {"revision": newest_revision()}
    token = json.loads(say("token", "create", "ci", "--scope", "jobs:read", "--days", "3", "--json", *there).out)
    assert set(token) == {"id", "name", "scopes", "expires_at", "secret"}
    assert (token["name"], token["scopes"]) == ("ci", ["jobs:read"])
    assert token["secret"].startswith("lrp_")
    plain = say("token", "create", "ci", "--scope", "jobs:read", *there).out
    assert plain.startswith("lrp_")
    assert plain.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["up", "--port", "99999"], "port"),
        (["up", "--device", "gpu"], "device"),
        (["db", "upgrade", "--data-dir", "/dev/null/x"], "/dev/null/x"),
        (["upload", "/no/such/folder"], "/no/such/folder does not exist"),
        (["wait", "x", "--url", "http://127.0.0.1:1", "--token", "t"], "127.0.0.1:1"),
        (["wait", "x", "--url", "nonsense", "--token", "t"], "nonsense"),
        (["wait", "x", "--url", "http://127.0.0.1:port", "--token", "t"], "127.0.0.1:port"),
        (["health", "--url", "http://127.0.0.1:1"], "127.0.0.1:1"),
        (["submit", "x", "--set", "strength"], "--set"),
        (["submit", "x", "--method", "scale", "--set", "strength"], "key=value"),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else None,
)
def test_what_is_wrong_is_one_line(say: Say, words: list[str], named: str) -> None:
    """Exit code 1, no traceback, and the line names the culprit."""
    said = say(*words)
    assert said.code == Exit.ERROR
    assert said.err.startswith("lora-repair: ")
    assert said.err.count("\n") == 1
    assert named in said.err


@pytest.mark.parametrize(
    "words", [["token", "create", "x", "--scope", "jobs:read"], ["audit", "verify"]], ids=["token", "audit"]
)
def test_a_ledger_that_was_not_made_yet_is_one_line(say: Say, tmp_path: Path, words: list[str]) -> None:
    """It says what to look for."""
    said = say(*words, "--data-dir", tmp_path / "nowhere")
    assert said.code == Exit.ERROR
    assert said.err.count("\n") == 1
    assert "migrated" in said.err


def test_without_a_token_it_says_where_it_looked(say: Say, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And how to give one."""
    monkeypatch.setenv("LORA_REPAIR_DATA_DIR", str(tmp_path))
    said = say("wait", "x")
    assert said.code == Exit.ERROR
    assert str(tmp_path / "token") in said.err
    assert "--token" in said.err


def test_settings_read_as_json_where_they_can() -> None:
    """Otherwise they are text; what follows the first `=` is the value."""
    parsed = parse_settings(["strength=0.5", "count=3", "mode=paper", "on=true", "none=null", "text=a=b", "empty="])
    assert parsed == {
        "strength": 0.5, "count": 3, "mode": "paper", "on": True, "none": None, "text": "a=b", "empty": "",
    }  # fmt: skip
    assert parse_settings(['list=[1, "a"]']) == {"list": [1, "a"]}


def test_settings_survive_the_way_into_a_child(tmp_path: Path) -> None:
    """What the parent was told is what the child reads, whatever stood in its environment before."""
    told = load(
        tmp_path / "a folder",
        database_url="postgresql://u:p@/db?host=/run/x%20y",
        port=9999,
        device="cuda:3",
        lease_seconds=4.5,
        log_level="debug",
    )
    code = "from ledger.settings import Settings; print(Settings.load().model_dump_json())"
    child = environment(told)
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=child)
    assert type(told).model_validate_json(done.stdout) == told


def test_options_stand_above_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """And what was not given does not."""
    monkeypatch.setenv("LORA_REPAIR_PORT", "1111")
    monkeypatch.setenv("LORA_REPAIR_HOST", "127.0.0.2")
    settings = load(tmp_path, port=2222, host=None)
    assert (settings.port, settings.host, settings.data_dir) == (2222, "127.0.0.2", tmp_path)


@pytest.mark.parametrize(
    ("job", "outcome", "code"),
    [
        ({"state": "succeeded", "verdict": "released_unchanged"}, "pass", Exit.OK),
        ({"state": "succeeded", "verdict": "released_repaired"}, "pass", Exit.OK),
        ({"state": "succeeded", "verdict": "quarantined"}, "fail", Exit.POLICY_SAID_NO),
        ({"state": "succeeded", "verdict": "quarantined"}, "inconclusive", Exit.INCONCLUSIVE),
        ({"state": "succeeded", "verdict": "quarantined"}, None, Exit.POLICY_SAID_NO),
        ({"state": "succeeded", "verdict": "refused"}, None, Exit.ERROR),
        ({"state": "failed", "verdict": None}, None, Exit.ERROR),
        ({"state": "cancelled"}, None, Exit.ERROR),
    ],
    ids=lambda value: str(value.get("verdict") or value["state"]) if isinstance(value, dict) else None,
)
def test_only_a_release_is_a_success(job: dict[str, object], outcome: str | None, code: Exit) -> None:
    """A script may go on after 0 and after nothing else; a report of old, which does not tell, counts as a no."""
    assert exit_code(job, {} if outcome is None else {"outcome": outcome}) is code


def test_progress_is_one_readable_line() -> None:
    """State, stage, detail, how far; parts that are not known are left out."""
    progress = {"stage": "measuring", "detail": "input", "done": 3, "total": 7}
    assert describe_progress({"state": "running", "progress": progress}) == "running · measuring · input · 3/7"
    assert describe_progress({"state": "queued", "progress": None}) == "queued"


def test_a_race_is_told_from_its_fields() -> None:
    """Not from the words, which another version may choose otherwise; what is not known is left out."""
    race = {"stage": "measuring", "detail": "words", "done": 3, "total": 7, "phase": "choosing", "alive": 4}
    told = {**race, "best": 0.853, "seconds_left": 12}
    line = "choosing, 4 in the race, best keeps 85 %, at most 12 s left"
    assert describe_progress({"state": "running", "progress": told}) == f"running · measuring · {line} · 3/7"
    assert "choosing, 4 in the race · 3/7" in describe_progress({"state": "running", "progress": race})
    building = {**told, "phase": "certifying", "alive": None}
    assert describe_progress({"state": "running", "progress": building}) == "running · measuring · words · 3/7"
