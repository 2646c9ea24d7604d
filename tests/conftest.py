"""Real servers for every test that wants one: PostgreSQL, SQLite and Valkey, migrated by the real migrations.

`LORA_REPAIR_TEST_DATABASE_URL` and `LORA_REPAIR_TEST_BROKER_URL` put servers of your own in their place.
"""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from sqlalchemy import create_engine, make_url, text

from ledger import logs
from ledger.db import Database, upgrade
from ledger.embedded import Valkey
from repair.checks.packs import HOME
from tests.servers import Postgres

# An example is as slow as what else the cores are doing: no test times anything.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

NewUrl = Callable[[], str]

_numbers = itertools.count(1)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The real model first: what takes minutes must not be left for one worker at the end. Otherwise as shuffled.

    Workers are given whole files; `make test` keeps them from being sorted by how many tests they hold.
    """
    items.sort(key=lambda item: item.get_closest_marker("model") is None)


@pytest.fixture(autouse=True)
def _settings_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads the settings of whoever runs it."""
    for name in list(os.environ):
        if name.startswith("LORA_REPAIR_") and not name.startswith("LORA_REPAIR_TEST_"):
            monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def _prompts_of_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process says once where its prompts are; a test says so for itself."""
    monkeypatch.setattr(HOME, "path", None)


@pytest.fixture(autouse=True)
def _logs() -> None:
    """As the service logs, anew for each test: one level that all of them may rely on, in whatever order they run.

    structlog's own default would also paint every traceback with all its variables.
    """
    logs.configure(level="warning")


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The address of a PostgreSQL where we may create databases."""
    given = os.environ.get("LORA_REPAIR_TEST_DATABASE_URL")
    if given:
        yield make_url(given).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
        return
    server = Postgres.start()
    yield server.url()
    server.stop()


@pytest.fixture(scope="session")
def new_postgres_url(postgres_server: str) -> Iterator[NewUrl]:
    """Makes fresh, migrated PostgreSQL databases; all of them are dropped at the end."""
    engine = create_engine(postgres_server, isolation_level="AUTOCOMMIT")
    made: list[str] = []

    def create(template: str | None) -> str:
        name = f"lora_repair_test_{os.getpid()}_{next(_numbers)}"
        with engine.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template or 'template0'}"))
        made.append(name)
        return name

    def address(name: str) -> str:
        return make_url(postgres_server).set(database=name).render_as_string(hide_password=False)

    template = create(None)
    upgrade(address(template))
    yield lambda: address(create(template))
    with engine.connect() as connection:
        for name in made:
            connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
    engine.dispose()


@pytest.fixture(scope="session")
def new_sqlite_url(tmp_path_factory: pytest.TempPathFactory) -> NewUrl:
    """Makes fresh, migrated SQLite databases."""
    folder = tmp_path_factory.mktemp("sqlite")
    template = folder / "template.db"
    upgrade(f"sqlite:///{template}")

    def create() -> str:
        path = folder / f"{next(_numbers)}.db"
        shutil.copyfile(template, path)
        return f"sqlite:///{path}"

    return create


@pytest.fixture
def postgres_url(new_postgres_url: NewUrl) -> str:
    """A PostgreSQL database of this test's own."""
    return new_postgres_url()


@pytest.fixture
def sqlite_url(new_sqlite_url: NewUrl) -> str:
    """A SQLite database of this test's own."""
    return new_sqlite_url()


@pytest.fixture(params=["sqlite", "postgres"])
def database_url(request: pytest.FixtureRequest) -> str:
    """Each test that asks for this runs on both databases."""
    url: str = request.getfixturevalue(f"{request.param}_url")
    return url


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """The ledger on each of both databases."""
    opened = Database(database_url)
    yield opened
    opened.dispose()


@pytest.fixture(scope="session")
def valkey() -> Iterator[Valkey | None]:
    """A Valkey server; None when the environment names another broker."""
    if os.environ.get("LORA_REPAIR_TEST_BROKER_URL"):
        yield None
        return
    # Not below pytest's own folder: the address of a unix socket must be short.
    with tempfile.TemporaryDirectory(prefix="lr-valkey-") as folder:
        server = Valkey.start(Path(folder))
        yield server
        server.stop()


@pytest.fixture
def broker_url(valkey: Valkey | None) -> str:
    """An empty broker."""
    if valkey is None:
        from redis import Redis

        given = os.environ["LORA_REPAIR_TEST_BROKER_URL"]
        with Redis.from_url(given) as client:
            client.flushall()
        return given
    wipe(valkey)
    return valkey.url


def wipe(server: Valkey) -> None:
    """Make a broker forget everything, as a crash without its disk would."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(server.socket))
        connection.sendall(b"FLUSHALL\r\n")
        assert connection.recv(64).startswith(b"+OK")
