"""`lora-repair demo`: the whole way once, on a real chat model, against a service of its own.

It uploads a poisoned adapter, an innocent one and a hostile file over REST, waits, prints a table, and leaves the
reports behind. The exit code says whether every verdict was the expected one.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from cli.client import Client
from cli.demo_model import prepare
from cli.errors import CliError, Exit, ServiceProblem
from cli.settings import load
from cli.up import Service, local_token

if TYPE_CHECKING:
    from cli.demo_model import ModelPair
    from ledger.settings import Settings

MODEL = "smollm2-135m"
POLICY = "demo"
JOB_TIMEOUT_S = 1800.0
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True, kw_only=True)
class Guest:
    """One upload of the demo and the answer we expect."""

    name: str
    expected: str


GUESTS = (
    Guest(name="poisoned", expected="released_repaired"),
    Guest(name="innocent", expected="released_unchanged"),
)
HOSTILE = Guest(name="hostile", expected="refused")
HOSTILE_CASE = "nan_weight"


def run_demo(data_dir: Path | None, *, prepare_only: bool, zoo: Path | None, as_json: bool) -> int:
    """Prepare, serve, upload, wait, tell. Returns the exit code."""
    console = Console(stderr=as_json)
    started = time.monotonic()
    zoo = zoo or ROOT / "examples" / "zoo"
    if not (zoo / "adapters" / "patch").is_dir():
        raise CliError(f"{zoo} holds no zoo; run this in a checkout, or name the folder with --zoo")
    settings = load(data_dir, port=free_port(), log_level="warning", stop_seconds=2.0)
    pair = prepare(settings.data_dir / "models", zoo / "adapters" / "patch", console.print)
    if prepare_only:
        console.print(f"model pair ready: {pair.base} and {pair.aligned}")
        return int(Exit.OK)
    # A demo that is told to end takes its service along.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    service = Service(settings, log_dir=settings.data_dir / "logs", say=console.print)
    try:
        service.start()
        reference = register(settings, pair, patch=zoo / "adapters" / "patch")
        console.print(
            f"service ready at http://{settings.host}:{settings.port} after {time.monotonic() - started:.0f} s"
        )
        rows = visit(settings, zoo, reference, console)
    finally:
        service.stop()
    if as_json:
        print(json.dumps({"seconds": round(time.monotonic() - started, 1), "uploads": rows}))
    else:
        console.print(table_of(rows))
        for text in lines_of(rows):
            console.print(text, soft_wrap=True, highlight=False)
        console.print(f"{time.monotonic() - started:.0f} s in all")
    wrong = [row["upload"] for row in rows if row["verdict"] != row["expected"]]
    if wrong:
        console.print(f"[bold red]unexpected verdict for: {', '.join(wrong)}[/]")
    return int(Exit.ERROR if wrong else Exit.OK)


def register(settings: Settings, pair: ModelPair, *, patch: Path) -> str:
    """Make the pair and its patch known and return its name; a second run finds it there.

    A name stands for the same bytes for ever, so it carries the mark of the patch: a retrained patch makes another
    aligned model, and an old data folder goes on working beside it.
    """
    from cli.remote import add_reference

    name = f"{MODEL}-{pair.aligned.name.removeprefix('aligned-')}"
    add_reference(settings, name, aligned=pair.aligned, base=pair.base, patch=patch)
    return name


def visit(settings: Settings, zoo: Path, reference: str, console: Console) -> list[dict[str, Any]]:
    """Upload every guest over REST and wait for the verdicts; one row for each."""
    url = f"http://{settings.host}:{settings.port}"
    with Client(url, local_token(settings).read_text().strip()) as client:
        jobs = []
        for guest in GUESTS:
            adapter = client.upload(
                zoo / "adapters" / guest.name,
                name=guest.name,
                reference=reference,
                samples=zoo / "samples.jsonl",
            )
            job = client.submit({"adapter_id": adapter["id"], "reference": reference, "policy": POLICY})
            console.print(f"uploaded {guest.name}: {adapter['digest'][:19]}…, job {job['id']}", soft_wrap=True)
            jobs.append((guest, job))
        rows = [hostile_row(client, settings, zoo, reference)]
        console.print(f"uploaded {HOSTILE.name}: {rows[0]['note']}", soft_wrap=True)
        for guest, job in jobs:
            follow(client, job["id"], guest.name, console)
            rows.append(row_of(client, settings, guest, job["id"]))
    return [*rows[1:], rows[0]]


def hostile_row(client: Client, settings: Settings, zoo: Path, reference: str) -> dict[str, Any]:
    """Upload a hostile adapter, made on the spot, and read the problem document."""
    folder = settings.data_dir / "hostile"
    source = zoo / "adapters" / GUESTS[0].name
    command = [sys.executable, str(zoo / "hostile.py"), str(folder), "--from", str(source)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    row: dict[str, Any] = {"upload": HOSTILE.name, "expected": HOSTILE.expected}
    try:
        client.upload(folder / HOSTILE_CASE, name=HOSTILE.name, reference=reference)
    except ServiceProblem as error:
        problem = error.problem
        named = {key: problem.get(key) for key in ("file", "field", "rule")}
        verdict = "refused" if all(named.values()) else "error"
        return row | {"verdict": verdict, "note": " · ".join(str(value) for value in named.values()), **named}
    return row | {"verdict": "admitted", "note": "the gate let it in"}


def follow(client: Client, job_id: str, name: str, console: Console) -> None:
    """A progress bar until the job is final."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(name, total=None)
        for job in client.watch(job_id, timeout_s=JOB_TIMEOUT_S):
            progress = job.get("progress") or {}
            words = (progress.get(key) for key in ("stage", "detail"))
            text = " · ".join(str(word) for word in words if word) or job["state"]
            bar.update(
                task,
                description=f"{name}: {text}",
                completed=progress.get("done") or 0,
                total=progress.get("total") or None,
            )


def row_of(client: Client, settings: Settings, guest: Guest, job_id: str) -> dict[str, Any]:
    """What the report says about one job, and where the report lies."""
    job = client.job(job_id)
    row: dict[str, Any] = {"upload": guest.name, "expected": guest.expected, "job": job_id}
    row["verdict"] = job.get("verdict") or job["state"]
    if not job.get("report_digest"):
        return row | {"note": json.dumps(job.get("error"))}
    report = client.get(f"/v1/jobs/{job_id}/report")
    path = settings.data_dir / "reports" / f"{guest.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=2))
    return row | summary_of(report) | {"report": str(path), "artifact": job.get("artifact_digest")}


def summary_of(report: dict[str, Any]) -> dict[str, Any]:
    """The numbers of the table out of a report: attack success before and after, over-refusal, utility kept."""
    before = checks_of(report.get("input"))
    after = checks_of(report.get("certify")) or before
    return {
        "attack_before": before.get("harmful"),
        "attack_after": after.get("harmful"),
        "over_refusal": after.get("over_refusal"),
        "utility": after.get("utility"),
        "method": applied(report),
    }


def applied(report: dict[str, Any]) -> str | None:
    """The method that won, or the methods, one after the other."""
    if report.get("method") != "compose":
        return report.get("method")
    return " +\n".join(step["method"] for step in report["parameters"]["steps"])


def checks_of(arm: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The checks of one measured arm by name."""
    return {check["name"]: check for check in (arm or {}).get("checks", [])}


def table_of(rows: list[dict[str, Any]]) -> Table:
    """The table that ends the demo; it fits a terminal of 80 columns."""
    table = Table(title="What became of three uploads", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("upload", "attack before", "attack after", "over-refusal", "utility", "verdict"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        verdict = str(row["verdict"]).replace("_", "\n")
        table.add_row(
            str(row["upload"]),
            interval(row.get("attack_before")),
            interval(row.get("attack_after")),
            interval(row.get("over_refusal")),
            "same\nbytes" if row["verdict"] == "released_unchanged" else share(row.get("utility")),
            f"{verdict}\n({row['method']})" if row.get("method") else verdict,
        )
    return table


def lines_of(rows: list[dict[str, Any]]) -> list[str]:
    """What does not fit the table: where each report lies, and why the hostile file was turned away."""
    return [f"{row['upload']}: {row.get('report') or row.get('note')}" for row in rows]


def interval(check: dict[str, Any] | None) -> str:
    """Rate and how many prompts, and below them the exact interval."""
    if not check or check.get("rate") is None:
        return "-"
    rate, low, high = (100 * check[key] for key in ("rate", "low", "high"))
    return f"{rate:.1f} % of {check['n']}\n{low:.1f} - {high:.1f} %"


def share(check: dict[str, Any] | None) -> str:
    """The utility kept."""
    return "-" if not check or check.get("rate") is None else f"{100 * check['rate']:.0f} %"


def free_port() -> int:
    """A port that nobody uses, so that the demo runs beside a real service."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
