"""The arguments of `check --endpoint`: a served model that is measured instead of one loaded here.

Plain values; starts without transformers. Who speaks to the server is found by name in `checks/backends.py`.
"""

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from repair.errors import BadParameters

if TYPE_CHECKING:
    from repair.checks.backends import Served


@dataclass(frozen=True, kw_only=True)
class Elsewhere:
    """A server.

    Attributes:
        url: Its address.
        model: The aligned model's name there.
        key_variable: Environment variable that holds the bearer key; empty for none.
        adapters: Folder that the server sees as well; None for a temporary one of this machine.
        requests: How many may be under way at once.
        backend: Entry point of the group `lora_repair.backends`.
    """

    url: str
    model: str
    key_variable: str = ""
    adapters: Path | None = None
    requests: int = 4
    backend: str = "openai"

    @classmethod
    def of(cls, wish: argparse.Namespace) -> "Elsewhere | None":
        """What was asked for, where it was."""
        if wish.endpoint is None:
            return None
        chosen = {"backend": wish.backend, "requests": wish.requests, "key_variable": wish.endpoint_key_env}
        given = {name: value for name, value in chosen.items() if value is not None}
        return cls(url=wish.endpoint, model=wish.served_model, adapters=wish.adapters_dir, **given)

    def served(self, reference: Path, files: dict[int, Path]) -> "Served":
        """What a backend is opened with; raises BadParameters for a variable that is not set."""
        from repair.checks.backends import Served  # noqa: PLC0415 - transformers takes seconds to import

        if self.requests < 1:
            raise BadParameters("at least 1", field="requests")
        key = os.environ.get(self.key_variable, "") if self.key_variable else ""
        if self.key_variable and not key:
            raise BadParameters("the variable is not set, or empty", field=self.key_variable)
        return Served(
            reference=reference,
            url=self.url,
            model=self.model,
            key=key,
            adapters=self.adapters,
            requests=self.requests,
            files=files,
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of `check`; `--aligned` still names the model's folder, for tokenizer and template."""
    group = parser.add_argument_group("a served model", "asked instead of loading one here; see docs/backends.md")
    group.add_argument("--endpoint", metavar="URL", help="OpenAI-compatible server, with /v1")
    group.add_argument("--served-model", metavar="NAME", help="what the aligned model is called there")
    group.add_argument("--endpoint-key-env", metavar="VAR", help="environment variable that holds the bearer key")
    group.add_argument(
        "--adapters-dir",
        type=Path,
        metavar="DIR",
        help="folder that the server sees under the same path; default: a temporary one",
    )
    group.add_argument("--requests", type=int, metavar="N", help="how many may be under way at once; default 4")
    group.add_argument("--backend", metavar="NAME", help="which installed backend speaks to it; default openai")


def void(wish: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Flags that only a served model gives a meaning, or that it takes away, each with the reason."""
    served = {"--served-model": wish.served_model, "--endpoint-key-env": wish.endpoint_key_env}
    served |= {"--adapters-dir": wish.adapters_dir, "--requests": wish.requests, "--backend": wish.backend}
    if wish.endpoint is None:
        yield from ((flag, "no --endpoint") for flag, value in served.items() if value is not None)
        return
    if wish.served_model is None:
        yield "--endpoint", "no --served-model: the server must be told which model is the aligned one"
    if wish.device != "auto":
        yield "--device", "--endpoint: the server has a device of its own"
    if wish.adapter is None and wish.adapters_dir is not None:
        yield "--adapters-dir", "no adapter to put there"
