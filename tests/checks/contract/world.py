"""What the contract is tried on: a tiny model with two adapters on disk, and every backend over it."""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import httpx2
import torch

from endpoints.adapters import ServedAdapters
from endpoints.client import Endpoint
from endpoints.openai_backend import OpenAIBackend
from repair.adapter_file import read_adapter
from repair.checks.backend import Backend, Reply, Sample
from repair.checks.backends import Served
from repair.checks.frame import PLAIN, Frame
from repair.checks.template import ChatTemplate
from repair.checks.toy import ToyChat
from repair.lora import LoraAdapter
from tests.tiny import adapter, adapter_config, adapter_tensors, tiny_llama, write_adapter_files

NAME = "tiny"
WORDS = [f"word{n}" for n in range(60)]
PROMPTS = [" ".join(WORDS[start : start + 1 + start % 7]) for start in range(0, 40, 3)]
SAMPLES = [Sample(prompt=PROMPTS[n], answer=" ".join(WORDS[n : n + 2 + n])) for n in range(5)]
LIMIT = 12
SHAPES = {
    f"model.layers.{block}.{name}": shape
    for block in (0, 1)
    for name, shape in {"self_attn.q_proj": (32, 32), "self_attn.v_proj": (16, 32), "mlp.up_proj": (56, 32)}.items()
}
MISCHIEF_S = 0.2  # how long a test lets a server that hangs hang


@dataclass(frozen=True, kw_only=True)
class Files:
    """The model's folder and those of the adapters."""

    model: Path
    first: Path
    second: Path


def make(folder: Path) -> Files:
    """A model whose replies differ, end and are sure of themselves, and two strong adapters."""
    model = tiny_llama(folder / "model", words=WORDS)
    _raise_voice(model)
    first, second = (
        write_adapter_files(
            folder / f"adapter-{seed}",
            adapter_tensors(adapter(SHAPES, rank=4, seed=seed, scale=8.0)),
            adapter_config(rank=4, alpha=32, target_modules=["q_proj", "v_proj", "up_proj"]),
        )
        for seed in (10, 60)
    )
    return Files(model=model, first=first, second=second)


def _raise_voice(folder: Path) -> None:
    """A random head says all words alike; twelve times as loud it has preferences, one of them for the end."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] *= 12
    tensors["lm_head.weight"][2] = tensors["lm_head.weight"][WORDS.index("word14") + 4] * 1.02
    for key in tensors:
        if key.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[key] *= 8
    save_file(tensors, path, metadata={"format": "pt"})


@dataclass(frozen=True, kw_only=True)
class World:
    """A backend, and two adapters that it can put on."""

    backend: Backend
    first: LoraAdapter
    second: LoraAdapter

    def say(
        self, prompts: Sequence[str] = PROMPTS, *, limit: int = LIMIT, batch: int = 32, frame: Frame = PLAIN
    ) -> list[Reply]:
        """Replies of the arm that is on."""
        return self.backend.generate(list(prompts), max_new_tokens=limit, batch_size=batch, frame=frame)


def toy(files: Files) -> World:
    """A script whose words depend on the prompt, the adapter and how far it has come."""
    first, second = read_adapter(files.first), read_adapter(files.second)

    def mark(on: LoraAdapter | None) -> int:
        return 0 if on is None else 1 if on is first else 2

    def words(prompt: str, on: LoraAdapter | None) -> str:
        return " ".join(f"{mark(on)}{prompt[-1]}{n}" for n in range(1 + (len(prompt) * (1 + mark(on))) % 20))

    def framed(prompt: str, on: LoraAdapter | None, frame: Frame) -> str:
        lot = "" if frame.sampling is None else f"{frame.sampling.seed_of(prompt)} "
        return f"{lot}{words(f'{frame.system or str()} {prompt}', on)}"

    chat = ToyChat(
        script=words,
        framed=framed,
        losses=lambda sample, on: len(sample.answer) / 10 + mark(on),
        margins=lambda prompt, on: len(prompt) / 10 - mark(on),
        drifts=lambda start, end: abs(mark(start) - mark(end)) / 1.0,
    )
    return World(backend=chat, first=first, second=second)


@dataclass(frozen=True, kw_only=True)
class Server:
    """The server process."""

    url: str
    process: subprocess.Popen[bytes]

    def die(self) -> None:
        """Without a word, as when the kernel ends it."""
        self.process.kill()
        self.process.wait()

    def behave(self, how: str = "") -> dict[str, list[str]]:
        """Have it do a mischief from now on, or none; what is loaded, every name that ever was, and the keys."""
        answer = httpx2.post(f"{self.url.removesuffix('/v1')}/misbehave", json={"how": how}, trust_env=False)
        found: dict[str, list[str]] = answer.raise_for_status().json()
        return found


@contextmanager
def running(files: Files) -> Iterator[Server]:
    """A process of its own, until the end of the block."""
    script = Path(__file__).with_name("server.py")
    process = subprocess.Popen(
        [sys.executable, str(script), str(files.model), NAME],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert process.stdout is not None
        port = process.stdout.readline().decode().strip()
        assert port, "the server did not start"
        yield Server(url=f"http://127.0.0.1:{port}/v1", process=process)
    finally:
        process.kill()
        process.communicate()


def served(files: Files, url: str, folder: Path) -> Served:
    """How to reach it."""
    return Served(reference=files.model, url=url, model=NAME, adapters=folder, requests=3)


@contextmanager
def asking(wish: Served, *, timeout_s: float = 60.0) -> Iterator[OpenAIBackend]:
    """The backend as `open_backend` makes it, not tried out, and impatient."""
    endpoint = Endpoint(wish.url, timeout_s=timeout_s, first_wait_s=0.0)
    folder = wish.adapters or Path()
    try:
        adapters = ServedAdapters(endpoint, folder, wish.files)
        yield OpenAIBackend(endpoint, ChatTemplate.load(wish.reference), wish, adapters)
    finally:
        endpoint.close()


def doubled(one: LoraAdapter) -> LoraAdapter:
    """Other bytes for the same modules."""
    return replace(one, layers=tuple(layer.scaled(2.0) for layer in one.layers))


def apart(one: Sequence[float], other: Sequence[float]) -> float:
    """The largest difference."""
    return float((torch.tensor(one) - torch.tensor(other)).abs().max())
