"""What several tests of the engine share."""

from collections.abc import Callable, Iterator

import pytest
import torch

from tests.repair.living_families import World


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], World]:
    """The world of a family; each is made once for a file of tests."""
    known: dict[str, World] = {}

    def world(family: str) -> World:
        if family not in known:
            known[family] = World(family=family, folder=tmp_path_factory.mktemp(family))
        return known[family]

    return world


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    """One, for all tests of a file: models this small spend most of their time on handing work to a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
