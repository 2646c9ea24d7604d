"""Adapters on a server that loads them by path: written where it sees them, named by their content, taken off again.

A name is the SHA-256 over weights and config, with a mark of this session. Servers keep keys and values of prompts
under the name of the adapter that made them (vLLM issues 30931, 42125), so no name ever stands for other bytes; and a
session never takes away what another one is using.
"""

import secrets
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, final

from endpoints.client import Endpoint
from endpoints.errors import EndpointError
from repair.adapter_file import copy_adapter, read_adapter, write_adapter
from repair.checks.errors import ArmUnsupported
from repair.lora import LoraAdapter
from repair.report import adapter_digests
from repair.serving import serving
from repair.serving_facts import Taken

HOW_TO: Final = "start vLLM with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"

_LOAD: Final = "load_lora_adapter"
_UNLOAD: Final = "unload_lora_adapter"
_NO_ROUTE: Final = frozenset({404, 501})
_NOT_ABOUT_THE_ADAPTER: Final = frozenset({None, 401, 403, 408, 425, 429, 502, 503, 504})
_NOT_FOUND: Final = 404


@final
class ServedAdapters:
    """The adapters of this session on one server."""

    def __init__(self, endpoint: Endpoint, folder: Path, files: Mapping[int, Path]) -> None:
        """``folder`` is seen by the server under the same path; ``files``: see `repair.checks.backends.Served`."""
        self._endpoint = endpoint
        self._folder = folder.absolute()
        self._files = files
        self._session = secrets.token_hex(4)
        self._loaded: Counter[str] = Counter()

    def refusal(self) -> str | None:
        """Why the server loads no adapters at all; None where it has the route. Changes nothing there."""
        try:
            self._endpoint.get(_LOAD)
        except EndpointError as error:
            if error.status in _NO_ROUTE:
                return f"the server does not load adapters while it runs: {HOW_TO}"
            if error.status is None:
                raise
        return None

    @contextmanager
    def loaded(self, adapter: LoraAdapter, *, under: str = "") -> Iterator[str]:
        """The adapter's name on the server, inside the block; ``under`` gives the same bytes one more name.

        Raises ArmUnsupported naming it when it is refused, EndpointError when the server cannot be used.
        """
        folder = self._placed(adapter, under)
        name = folder.name
        if not self._loaded[name]:
            self._load(name, folder)
        self._loaded[name] += 1
        try:
            yield name
        except BaseException:
            with suppress(EndpointError):  # what went wrong first is what is told
                self._release(name, folder)
            raise
        self._release(name, folder)

    def _release(self, name: str, folder: Path) -> None:
        self._loaded[name] -= 1
        if self._loaded[name]:
            return
        try:
            self._endpoint.post(_UNLOAD, {"lora_name": name}, tries=1)
        except EndpointError as error:
            if error.status != _NOT_FOUND:  # it was to be gone, and is
                raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _load(self, name: str, folder: Path) -> None:
        try:
            self._endpoint.post(_LOAD, {"lora_name": name, "lora_path": str(folder)}, tries=1)
        except EndpointError as error:
            shutil.rmtree(folder, ignore_errors=True)
            if error.status in _NOT_ABOUT_THE_ADAPTER:
                raise
            why = f"the server refuses it with status {error.status}, and its log says why"
            if error.status == _NOT_FOUND:
                why = f"the server does not find {folder}: it must see the folder of adapters under the same path"
            raise ArmUnsupported(why, field=name) from error

    def _placed(self, adapter: LoraAdapter, under: str) -> Path:
        """A folder of this session, named by what is in it."""
        self._folder.mkdir(parents=True, exist_ok=True)
        source = self._files.get(id(adapter))
        with tempfile.TemporaryDirectory(prefix=".adapter-", dir=self._folder) as work:
            made = Path(work) / "adapter"
            if source is None:
                write_adapter(adapter, made)
            else:
                copy_adapter(source, made)
            digest = adapter_digests(made)["digest"].removeprefix("sha256:")
            folder = self._folder / "-".join(part for part in (digest, self._session, under) if part)
            _must_be_servable(made, folder.name)
            if not folder.exists():
                made.rename(folder)
        return folder


def _must_be_servable(directory: Path, name: str) -> None:
    """What vLLM is known to refuse, or to serve as something else, is not sent: some engines die of it."""
    found = next(one for one in serving(read_adapter(directory)) if one.engine == "vllm")
    if found.taken in {Taken.NO, Taken.ALTERED}:
        raise ArmUnsupported(f"vLLM would not serve it as it is: {'; '.join(found.reasons)}", field=name)
