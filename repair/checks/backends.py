"""Backends of other packages by name: entry points of the group `lora_repair.backends`.

`endpoints` brings one for OpenAI-compatible servers; a package of the operator's brings its own in the same way. An
entry point is a callable that takes a `Served` and gives a context manager around a backend.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

from repair.checks.backend import Backend
from repair.errors import BadParameters
from repair.lora import LoraAdapter

GROUP: Final = "lora_repair.backends"


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model that somebody else serves.

    Attributes:
        reference: The folder of the same model here: its tokenizer, template and config; no weight is read.
        url: Where it is served.
        model: What it is called there, without any adapter.
        key: Bearer token; empty for none.
        adapters: Folder that the server sees under the same path: what is to be loaded is written there. None for a
            temporary one of this machine.
        requests: How many may be under way at once.
        files: Folders that adapters were read from, by the identity of the adapter: these bytes are sent as they are.
    """

    reference: Path
    url: str
    model: str
    key: str = field(default="", repr=False)
    adapters: Path | None = None
    requests: int = 4
    files: Mapping[int, Path] = field(default_factory=dict)


Open = Callable[[Served], AbstractContextManager[Backend]]


def backend_named(name: str) -> Open:
    """The entry point of that name; raises BadParameters with those that are installed."""
    found = entry_points(group=GROUP)
    if name not in found.names:
        there = ", ".join(sorted(found.names)) or "none"
        raise BadParameters(f"no backend is called {name}; installed: {there}", field="backend")
    opened: Open = found[name].load()
    return opened


def files_of(*known: tuple[LoraAdapter, Path]) -> dict[int, Path]:
    """Where adapters were read from, as `Served` has it; they must be kept alive as long as it is used."""
    return {id(adapter): folder for adapter, folder in known}
