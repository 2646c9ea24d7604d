"""One model, one server process and every backend, made once for all laws."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from endpoints.openai_backend import OpenAIBackend, open_backend
from repair.adapter_file import read_adapter
from repair.checks.chat import ChatModel
from tests.checks.contract.world import Files, Server, World, make, running, served, toy


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """The model and its adapters on disk."""
    return make(tmp_path_factory.mktemp("contract"))


@pytest.fixture(scope="session")
def process(files: Files) -> Iterator[Server]:
    """The server."""
    with running(files) as server:
        yield server


@pytest.fixture
def server(process: Server) -> Iterator[Server]:
    """The server, which behaves again after each test."""
    yield process
    process.behave()


@pytest.fixture(scope="session")
def chat(files: Files) -> ChatModel:
    """The local model."""
    return ChatModel.load(files.model, "cpu")


@pytest.fixture(scope="session")
def openai(files: Files, process: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAIBackend]:
    """The served model, tried out as anyone would."""
    with open_backend(served(files, process.url, tmp_path_factory.mktemp("seen"))) as backend:
        yield backend


@pytest.fixture(params=["toy", "transformers", "openai"])
def world(request: pytest.FixtureRequest, files: Files) -> World:
    """Each law holds in each of them."""
    if request.param == "toy":
        return toy(files)
    name = {"transformers": "chat", "openai": "openai"}[request.param]
    backend = request.getfixturevalue(name)
    return World(backend=backend, first=read_adapter(files.first), second=read_adapter(files.second))


@pytest.fixture
def seen(tmp_path: Path) -> Path:
    """A folder that the server sees."""
    return tmp_path / "seen"
