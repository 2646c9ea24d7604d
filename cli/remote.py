"""Commands that talk to a service over HTTP, and those that write tokens and references into the ledger at hand."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cli.errors import Exit, Refusal
from cli.tree import (
    DEFAULT_URL,
    DatabaseUrl,
    DataDir,
    Json,
    Token,
    Url,
    app,
    audit_app,
    reference_app,
    show,
    token_app,
)

if TYPE_CHECKING:
    from cli.client import Client
    from ledger.audit_chain import Head
    from ledger.settings import Settings

SUMMARY = ("id", "state", "verdict", "adapter_id", "reference", "artifact_digest", "report_digest", "error")


def connect(url: str, token: str | None) -> Client:
    """A client with the given token, or with the one that `lora-repair up` left in the data folder."""
    from cli.client import Client

    if token is None:
        from cli.settings import load

        path = load().data_dir / "token"
        if not path.is_file():
            raise Refusal(f"no token: give --token, set LORA_REPAIR_TOKEN, or run `lora-repair up` (looked in {path})")
        token = path.read_text().strip()
    return Client(url, token)


@app.command()
def upload(
    path: Path,
    reference: Annotated[str | None, typer.Option(help="Reference whose shapes the adapter must fit.")] = None,
    name: Annotated[str | None, typer.Option(help="A name for people.")] = None,
    samples: Annotated[Path | None, typer.Option(help='JSON lines {"prompt", "answer"} to measure utility.')] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Upload an adapter folder or an archive of one."""
    if not path.exists():
        raise Refusal(f"{path} does not exist")
    with connect(url, token) as client:
        show(client.upload(path, reference=reference, name=name, samples=samples), as_json=as_json)


@app.command()
def submit(
    adapter_id: str,
    reference: Annotated[str | None, typer.Option(help="Reference to measure against; default the adapter's.")] = None,
    policy: Annotated[str, typer.Option(help="Policy that a release must meet.")] = "standard",
    method: Annotated[str | None, typer.Option(help="Try this method only.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value for the method.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Order a job for an uploaded adapter."""
    wish: dict[str, Any] = {"adapter_id": adapter_id, "policy": policy}
    if reference:
        wish["reference"] = reference
    if settings and not method:
        raise Refusal("--set needs --method: a policy brings its own parameters")
    if method:
        wish |= {"method": method, "parameters": parse_settings(settings or [])}
    with connect(url, token) as client:
        show(client.submit(wish), as_json=as_json)


@app.command()
def wait(
    job_id: str,
    timeout: Annotated[float | None, typer.Option(help="Seconds before giving up.")] = None,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Wait for a job. Exit code 0 released, 2 quarantined, 3 quarantined but nothing shown for certain, 1 otherwise."""
    last = ""
    job: dict[str, Any] = {}
    report: dict[str, Any] = {}
    with connect(url, token) as client:
        for job in client.watch(job_id, timeout_s=timeout):
            line = describe_progress(job)
            if line != last and not as_json:
                print(f"{time.strftime('%H:%M:%S')} {line}")
                last = line
        if job.get("verdict") == "quarantined" and job.get("report_digest"):
            report = client.get(f"/v1/jobs/{job_id}/report")
    show(
        job if as_json else {key: job.get(key) for key in SUMMARY if job.get(key) is not None},
        as_json=as_json,
    )
    raise SystemExit(int(exit_code(job, report)))


@app.command()
def requeue(job_id: str, url: Url = DEFAULT_URL, token: Token = None, as_json: Json = False) -> None:
    """Give a job that failed or died a new set of attempts."""
    with connect(url, token) as client:
        job = client.requeue(job_id)
    show(job if as_json else {key: job[key] for key in SUMMARY if job.get(key) is not None}, as_json=as_json)


@app.command()
def download(
    digest: str,
    into: Annotated[Path, typer.Option("--out", help="Folder to write to.")],
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Download a released artifact; every file is checked against its digest."""
    with connect(url, token) as client:
        paths = [str(path) for path in client.download(digest, into)]
    if as_json:
        show({"digest": digest, "files": paths}, as_json=True)
    else:
        print("\n".join(paths))


@audit_app.command("list")
def audit_list(
    actor: str | None = None,
    action: str | None = None,
    subject: str | None = None,
    since: Annotated[str | None, typer.Option(help="RFC 3339 time.")] = None,
    until: Annotated[str | None, typer.Option(help="RFC 3339 time.")] = None,
    limit: int = 50,
    url: Url = DEFAULT_URL,
    token: Token = None,
    as_json: Json = False,
) -> None:
    """Read the audit log over HTTP."""
    with connect(url, token) as client:
        page = client.get(
            "/v1/audit", actor=actor, action=action, subject=subject, since=since, until=until, limit=limit
        )
    if as_json:
        show(page, as_json=True)
        return
    for event in page["items"]:
        subject_text = f"{event.get('subject_type', '')}:{event.get('subject_id', '')}"
        print(f"{event['seq']:>6}  {event['at']}  {event['action']:<24} {event['actor']:<28} {subject_text}")


@audit_app.command("verify")
def audit_verify(
    head: Annotated[
        str | None, typer.Option(help="SEQ:HASH that was noted earlier: what lies before it must be unchanged.")
    ] = None,
    file: Annotated[Path | None, typer.Option(help="Walk this export instead of the ledger at hand.")] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: Json = False,
) -> None:
    """Walk the chain of the ledger at hand and name the first broken row; print the head, to be noted elsewhere."""
    from cli.settings import load
    from ledger import audit
    from ledger.audit_chain import verify_export
    from ledger.db import Database

    noted = noted_head(head)
    if file is not None:
        try:
            with file.open(encoding="utf-8") as lines:
                report = verify_export(lines, noted=noted)
        except (ValueError, LookupError, TypeError) as error:
            raise Refusal(f"{file} is no export of an audit log: {type(error).__name__}") from error
    else:
        with Database(load(data_dir, database_url=database_url).database) as database, database.read() as tx:
            report = audit.verify(tx, noted=noted)
    show(asdict(report) | {"ok": report.ok, "head": str(report.last)}, as_json=as_json)
    raise SystemExit(0 if report.ok else int(Exit.ERROR))


@audit_app.command("export")
def audit_export(
    out: Annotated[Path, typer.Option(help="File to write: one event a line, with its hash.")],
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: Json = False,
) -> None:
    """Write the log of the ledger at hand to a file that `audit verify --file` can walk; the log remembers it."""
    from cli.settings import load
    from ledger import audit
    from ledger.db import Database
    from ledger.durable import write_durably

    if out.exists():
        raise Refusal(f"{out} is there already; nothing is written over")
    with Database(load(data_dir, database_url=database_url).database) as database:
        with database.begin() as tx:
            noted = audit.note_export(tx, actor="system:cli")
        with database.read() as tx:
            write_durably(out, (f"{line}\n".encode() for line in audit.export(tx)))
    show({"file": str(out), "head": str(noted)}, as_json=as_json)


def noted_head(text: str | None) -> Head | None:
    """A head as somebody noted it. Raises Refusal."""
    from ledger.audit_chain import Head

    if text is None:
        return None
    try:
        return Head.parse(text)
    except ValueError as error:
        raise Refusal(str(error)) from error


@token_app.command("create")
def token_create(
    name: str,
    scope: Annotated[list[str], typer.Option(help="For example adapters:write; repeatable.")],
    days: Annotated[int | None, typer.Option(help="Lifetime in days; default for ever.")] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: Json = False,
) -> None:
    """Make a token in the ledger at hand; it is shown once."""
    from cli.settings import load
    from ledger import tokens
    from ledger.clock import utc_now
    from ledger.db import Database

    with Database(load(data_dir, database_url=database_url).database) as database, database.begin() as tx:
        expires = utc_now() + timedelta(days=days) if days is not None else None
        minted = tokens.mint(tx, name=name, scopes=scope, expires_at=expires)
        told = {key: getattr(minted.token, key) for key in ("id", "name", "scopes", "expires_at")}
    if as_json:
        show({**told, "secret": minted.secret}, as_json=True)
    else:
        print(minted.secret)


@reference_app.command("add")
def reference_add(
    name: str,
    aligned: Annotated[Path, typer.Option(help="Folder of the aligned chat model.")],
    base: Annotated[Path | None, typer.Option(help="Folder of its unaligned base.")] = None,
    patch: Annotated[Path | None, typer.Option(help="Folder of a refusal LoRA trained for the aligned model.")] = None,
    twin: Annotated[
        Path | None, typer.Option(help="Folder of a LoRA for the aligned model that obeys harmful requests.")
    ] = None,
    data_dir: DataDir = None,
    database_url: DatabaseUrl = None,
    as_json: Json = False,
) -> None:
    """Register a pair of models under a name, or give it a patch or a twin later; the files are hashed once."""
    from cli.settings import load

    settings = load(data_dir, database_url=database_url)
    show(add_reference(settings, name, aligned=aligned, base=base, patch=patch, twin=twin), as_json=as_json)


def add_reference(
    settings: Settings,
    name: str,
    *,
    aligned: Path,
    base: Path | None,
    patch: Path | None = None,
    twin: Path | None = None,
) -> dict[str, Any]:
    """Write the reference into the ledger at hand."""
    from ledger import references
    from ledger.db import Database

    new = references.describe(name, aligned=aligned, base=base, patch=patch, twin=twin)
    with Database(settings.database) as database, database.begin() as tx:
        row = references.add(tx, new, actor="system:cli")
        parts = ("aligned", "base", "patch", "twin")
        return {"name": row.name, **{part: getattr(row, f"{part}_digest") for part in parts}}


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """``key=value`` pairs; a value that reads as JSON is JSON, otherwise text."""
    parsed: dict[str, Any] = {}
    for pair in pairs:
        key, separator, value = pair.partition("=")
        if not separator or not key:
            raise Refusal(f"--set wants key=value, not {pair!r}")
        try:
            parsed[key] = json.loads(value)
        except json.JSONDecodeError:
            parsed[key] = value
    return parsed


def describe_progress(job: dict[str, Any]) -> str:
    """One line for a person: state, stage, how far; the planner's fields where the service tells them."""
    progress = job.get("progress") or {}
    race = describe_race(progress)
    told = [progress.get("stage"), race or progress.get("detail")]
    parts = [str(job["state"]), *(str(part) for part in told if part)]
    if progress.get("total"):
        parts.append(f"{progress.get('done', 0)}/{progress['total']}")
    return " · ".join(parts)


def describe_race(progress: dict[str, Any]) -> str:
    """Candidates alive, the best so far and the time left, from their fields; empty where no race is on."""
    if progress.get("phase") != "choosing" or not isinstance(progress.get("alive"), int):
        return ""
    parts = ["choosing", f"{progress['alive']} in the race"]
    if isinstance(progress.get("best"), int | float):
        parts.append(f"best keeps {100 * progress['best']:.0f} %")
    if isinstance(progress.get("seconds_left"), int | float):
        parts.append(f"at most {progress['seconds_left']:.0f} s left")
    return ", ".join(parts)


def exit_code(job: dict[str, Any], report: dict[str, Any]) -> Exit:
    """What a shell script should make of a finished job; only its report knows whether a no is for certain."""
    if str(job.get("verdict", "")).startswith("released"):
        return Exit.OK
    if job.get("verdict") != "quarantined":
        return Exit.ERROR
    return Exit.INCONCLUSIVE if report.get("outcome") == "inconclusive" else Exit.POLICY_SAID_NO
