"""`lora-repair`: every command, thin. Heavy imports wait inside the commands, so that `--help` stays instant.

Tensor work (`inspect`, `check`, `repair`, `calibrate`, `basis`, `score`) goes to `python -m repair` as it is: no torch
is imported here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cli import packs, remote  # noqa: F401 - their commands hang themselves onto `app`
from cli.errors import CliError, Exit, Refusal
from cli.tree import DEFAULT_URL, DatabaseUrl, DataDir, Json, Url, app, db_app, show

PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def main() -> None:
    """Run a command; a known error becomes one line and an exit code.

    Wrong arguments are an error like any other: typer would leave with 2, which means that a policy said no.
    """
    from gate.errors import Refused
    from ledger.errors import LedgerError

    try:
        code = app(standalone_mode=False)
    except typer.TyperException as error:
        wrong = error.format_message().strip()
        # A group without a command says, in many lines, which commands there are.
        print(wrong if "\n" in wrong else f"lora-repair: {wrong} (--help tells more)", file=sys.stderr)
        raise SystemExit(int(Exit.ERROR)) from error
    except CliError as error:
        fail(str(error), error.code)
    except Refused as error:
        fail(json.dumps(error.as_dict()))
    except (LedgerError, OSError) as error:
        fail(str(error))
    except Exception as error:
        # SQLAlchemy costs a second to import: where its errors arise, it is there already.
        database = sys.modules.get("sqlalchemy.exc")
        if database is None or not isinstance(error, database.SQLAlchemyError):
            raise
        fail(f"the database does not do as asked (is it there? is it migrated?): {first_line(error)}")
    else:
        raise SystemExit(code)


def first_line(error: Exception) -> str:
    """An error's own words without the statement that SQLAlchemy adds."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def fail(message: str, code: Exit = Exit.ERROR) -> None:
    """One line on standard error, then leave."""
    print(f"lora-repair: {message}", file=sys.stderr)
    raise SystemExit(int(code))


def run_module(module: str, *arguments: str) -> None:
    """Become ``python -m module arguments``: signals and the exit code are then its own."""
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])  # noqa: S606 - our own module, no shell


@app.command(context_settings=PASS_ON, add_help_option=False)
def inspect(context: typer.Context) -> None:
    """Show what is inside an adapter folder: modules, ranks, scales, what is unusual."""
    run_module("repair", "inspect", *context.args)


@app.command(context_settings=PASS_ON, add_help_option=False)
def check(context: typer.Context) -> None:
    """Measure an adapter folder against a reference, without any service."""
    run_module("repair", "check", *context.args)


@app.command(context_settings=PASS_ON, add_help_option=False)
def repair(context: typer.Context) -> None:
    """Repair an adapter folder, by one method or by a policy, without any service."""
    run_module("repair", "repair", *context.args)


@app.command(context_settings=PASS_ON, add_help_option=False)
def calibrate(context: typer.Context) -> None:
    """Measure an aligned model on harmful and benign prompts, once, for the methods that need it."""
    run_module("repair", "calibrate", *context.args)


@app.command(context_settings=PASS_ON, add_help_option=False)
def basis(context: typer.Context) -> None:
    """Keep what alignment changed in a model pair, once, so that repairs need not read both models."""
    run_module("repair", "basis", *context.args)


@app.command(context_settings=PASS_ON, add_help_option=False)
def score(context: typer.Context) -> None:
    """Score many adapters of one model pair, which is read once for all of them."""
    run_module("repair", "score", *context.args)


@app.command(context_settings=PASS_ON, add_help_option=False)
def judge(context: typer.Context) -> None:
    """Judge replies with any judge (run), or measure a judge on replies that people have labelled (calibrate)."""
    run_module("repair", "judge", *context.args)


@app.command("packs", context_settings=PASS_ON, add_help_option=False)
def prompt_packs(context: typer.Context) -> None:
    """The prompt packs: list them, add more (list | add | verify), see that they are whole."""
    from cli.settings import load

    settings = load()
    # Where and what from is the installation's to say; the words of this command come after and could not say less.
    home = ("--home", str(settings.prompts_dir), "--network", settings.network) if context.args else ()
    run_module("repair", "packs", *context.args, *home)


@app.command()
def up(
    data_dir: DataDir = None,
    database: Annotated[str | None, typer.Option(help="SQLAlchemy URL; default SQLite under the data folder.")] = None,
    broker: Annotated[str | None, typer.Option(help="Redis or Valkey URL; default an embedded Valkey.")] = None,
    blobs: Annotated[str | None, typer.Option(help="file:// or s3:// URL; default the data folder.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda:N.")] = None,
) -> None:
    """Run the whole service on this machine: API, control and worker. Ctrl-C stops all."""
    from cli.settings import load
    from cli.up import supervise

    settings = load(
        data_dir,
        database_url=database,
        broker_url=broker,
        blobs_url=blobs,
        host=host,
        port=port,
        device=device,
    )
    raise SystemExit(supervise(settings))


@app.command()
def api(data_dir: DataDir = None) -> None:
    """Run the REST API alone."""
    from cli.settings import export

    export(data_dir)
    run_module("api")


@app.command()
def control(data_dir: DataDir = None) -> None:
    """Run the relay and the reaper alone."""
    from cli.settings import export

    export(data_dir)
    run_module("worker", "control")


@app.command(context_settings=PASS_ON, add_help_option=False)
def worker(context: typer.Context) -> None:
    """Run the worker alone: one process for each device."""
    run_module("worker", "run", *context.args)


@app.command()
def health(
    program: Annotated[str, typer.Argument(help="api, control or worker.")] = "api", url: Url = DEFAULT_URL
) -> None:
    """Ask whether a program of this machine is well; for container health checks."""
    import httpx2

    from ledger import alive

    if program in {"control", "worker"}:
        well = alive.is_alive(program)
        print(f"{program} is {'well' if well else 'silent'}")
        raise SystemExit(0 if well else 1)
    if program != "api":
        raise Refusal(f"there is no program {program!r}: api, control or worker")

    try:
        answer = httpx2.get(f"{url}/readyz", timeout=5)
    except httpx2.TransportError as error:
        raise Refusal(f"{url}: {error}") from error
    print(answer.text)
    raise SystemExit(0 if answer.is_success else 1)


@app.command()
def demo(
    data_dir: DataDir = None,
    prepare: Annotated[bool, typer.Option("--prepare", help="Only fetch and convert the model.")] = False,
    zoo: Annotated[Path | None, typer.Option(help="Folder of the zoo adapters.")] = None,
    as_json: Json = False,
) -> None:
    """Upload a poisoned, an innocent and a hostile adapter to a service of its own; print what became of them."""
    from cli.demo import run_demo

    raise SystemExit(run_demo(data_dir, prepare_only=prepare, zoo=zoo, as_json=as_json))


@app.command()
def report(
    path: Annotated[
        Path, typer.Argument(metavar="REPORT.json", help="A report, as a job or `repair --json` wrote it.")
    ],
    html: Annotated[Path, typer.Option("--html", help="File to write the page to.")],
) -> None:
    """Write a report as one self-contained page for people."""
    from pages.errors import NotAReport
    from pages.render import render

    try:
        html.write_text(render(path.read_bytes()), encoding="utf-8")
    except NotAReport as error:
        raise Refusal(f"{path}: {error}") from error
    print(f"wrote {html}")


@app.command()
def verify(
    artifact: Path,
    public_key: Annotated[Path, typer.Option(help="PEM file of the service's public key.")],
    as_json: Json = False,
) -> None:
    """Say for every file of a downloaded artifact whether it is what was signed."""
    from ledger.verify import verify_directory

    report = verify_directory(artifact, public_key)
    show(report.as_dict(), as_json=as_json)
    raise SystemExit(0 if report.ok else 1)


@db_app.command("upgrade")
def db_upgrade(data_dir: DataDir = None, database_url: DatabaseUrl = None, as_json: Json = False) -> None:
    """Bring the database to the newest schema."""
    from cli.settings import load
    from ledger.db import newest_revision, upgrade

    settings = load(data_dir, database_url=database_url)
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    upgrade(settings.database)
    if as_json:
        show({"revision": newest_revision()}, as_json=True)
    else:
        print("database is at the newest schema")
