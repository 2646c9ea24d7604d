"""Build a candidate and measure it, once: everything found is kept in an append-only file and looked up there first.

A row holds settings, counts and numbers; no prompt and no reply.
"""

import hashlib
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.efficacy.menu import Recipe
from repair.adapter_file import read_adapter, write_adapter
from repair.checks.backend import Sample
from repair.checks.chat import ChatModel
from repair.checks.packs import Half
from repair.checks.planner import split_samples
from repair.checks.policy import Policy
from repair.checks.report import CheckReport
from repair.checks.run import Original, run_checks
from repair.context import RepairContext
from repair.errors import RepairError
from repair.lora import LoraAdapter
from repair.methods import METHODS
from repair.report import adapter_digests
from repair.run import repair_adapter

ZOO: Final = Path(__file__).parents[2] / "examples" / "zoo"
CHECKS: Final = ("harmful", "over_refusal", "benign", "coherence", "utility")


@dataclass
class Store:
    """The rows found so far, by key; one line of JSON each.

    Attributes:
        folder: Holds ``rows.jsonl`` and the candidates that were built.
    """

    folder: Path
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Read what an earlier run has left; a line that was cut off is measured again."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.path = self.folder / "rows.jsonl"
        for line in self.path.read_text().splitlines() if self.path.is_file() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            self.rows[row["key"]] = row

    def add(self, row: dict[str, Any]) -> dict[str, Any]:
        """Keep a row."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self.rows[row["key"]] = row
        return row


@dataclass
class Lab:
    """One reference, one policy, one adapter of the zoo after the other.

    Attributes:
        chat: The aligned model, loaded.
        context: What methods may look at.
        policy: Sizes of both halves, and the screen on *select*.
        reference: Digests of the model and the calibration, and what the model computes in.
        store: What is known already.
        deadline: On the monotonic clock; nothing new is begun after it, what is known is still told.
        uploads: As they were read, so that candidates for one adapter share what was heard of it.
        seen: Keys of the rows that this run told: those of an older menu are not among them.
    """

    chat: ChatModel
    context: RepairContext
    policy: Policy
    reference: Mapping[str, str]
    store: Store
    deadline: float = math.inf
    aligned: CheckReport | None = None
    seen: dict[str, None] = field(default_factory=dict)
    uploads: dict[str, LoraAdapter] = field(default_factory=dict)
    originals: dict[tuple[str, Half], Original] = field(default_factory=dict)

    def measure_aligned(self) -> dict[str, Any]:
        """The model without any adapter, on both halves; every other arm is compared with it."""
        key = self._key("", None, "certify")
        self.seen[key] = None
        path = self.store.folder / f"aligned-{key}.json"
        if path.is_file():
            self.aligned = CheckReport.of(json.loads(path.read_text()))
        else:
            self.aligned = run_checks(self.chat, None, self.policy, "certify", arm="aligned", stop_early=False)
            path.write_text(json.dumps(self.aligned.as_dict()))
        return self.store.rows.get(key) or self.store.add(
            {"key": key, "adapter": "", "group": "(aligned model)", "half": "certify", **numbers(self.aligned)}
        )

    def measure(
        self, name: str, group: str, recipe: Recipe | None, half: Half, *, early: bool = False
    ) -> dict[str, Any] | None:
        """One row: the adapter under ``recipe``, or as uploaded; looked up where it is known. None when time is up."""
        key = self._key(name, recipe, half)
        if key not in self.store.rows and time.monotonic() > self.deadline:
            return None
        self.seen[key] = None
        if key in self.store.rows:
            return self.store.rows[key]
        row: dict[str, Any] = {"key": key, "adapter": name, "group": group, "half": half}
        row |= {"recipe": [] if recipe is None else recipe.as_json(), "label": "" if recipe is None else recipe.label}
        start = time.perf_counter()
        try:
            arm = self.built(name, recipe)
        except RepairError as error:
            return self.store.add(row | {"error": str(error)})
        row["build_seconds"] = round(time.perf_counter() - start, 1)
        return self.store.add(row | self.measured(name, arm, half, repaired=recipe is not None, early=early))

    def measured(self, name: str, arm: LoraAdapter, half: Half, *, repaired: bool, early: bool) -> dict[str, Any]:
        """The numbers of one arm; the utility also where asking stopped early."""
        original = self.original(name, half)
        start = time.perf_counter()
        report = run_checks(
            self.chat,
            arm,
            self.policy,
            half,
            arm="candidate" if repaired else "input",
            aligned=self.aligned,
            original=original,
            repaired=repaired,
            stop_early=early,
        )
        found = numbers(report)
        if found["utility"]["rate"] is None:
            with self.chat.arm(arm):
                own = self.chat.loss(original.samples)
            found["utility"]["rate"] = _share(original, own)
        return found | {"measure_seconds": round(time.perf_counter() - start, 1)}

    def built(self, name: str, recipe: Recipe | None) -> LoraAdapter:
        """The candidate as read back from disk; made once. Raises RepairError."""
        if name not in self.uploads:
            self.uploads[name] = read_adapter(ZOO / "adapters" / name)
        if recipe is None:
            return self.uploads[name]
        folder = self.store.folder / "candidates" / self._key(name, recipe, "")
        if not folder.is_dir():
            adapter = self.uploads[name]
            for method, parameters in recipe.steps:
                adapter = repair_adapter(adapter, METHODS[method].parse(parameters), self.context).adapter
            write_adapter(adapter, folder)
        return read_adapter(folder)

    def original(self, name: str, half: Half) -> Original:
        """The losses that utility is measured against."""
        if (name, half) not in self.originals:
            adapter, samples = read_adapter(ZOO / "adapters" / name), task_samples(self.policy, half)
            self.originals[name, half] = Original.measure(self.chat, adapter, samples)
        return self.originals[name, half]

    @property
    def run(self) -> str:
        """A short mark of the reference and the policy; rows of another one are not comparable."""
        text = json.dumps([dict(self.reference), self.policy.digest], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def _key(self, name: str, recipe: Recipe | None, half: str) -> str:
        upload = adapter_digests(ZOO / "adapters" / name)["digest"] if name else ""
        steps = [
            [method, METHODS[method].version, METHODS[method].parse(parameters).model_dump(mode="json")]
            for method, parameters in ([] if recipe is None else recipe.steps)
        ]
        text = json.dumps([upload, steps, half], sort_keys=True)
        return f"{self.run}-" + hashlib.sha256(text.encode()).hexdigest()[:24]


def task_samples(policy: Policy, half: Half) -> tuple[Sample, ...]:
    """The rows of the zoo's task that belong to one half, as many as the policy asks."""
    rows = [json.loads(text) for text in (ZOO / "samples.jsonl").read_text().splitlines()]
    size = (policy.suite.certify if half == "certify" else policy.suite.select).samples
    return split_samples([Sample(prompt=one["prompt"], answer=one["answer"]) for one in rows], half)[:size]


def numbers(report: CheckReport) -> dict[str, Any]:
    """Counts, rates and intervals of each check."""
    found: dict[str, Any] = {"outcome": report.outcome.value}
    for name in CHECKS:
        one = report.check(name)
        kept = {
            "hits": one.hits,
            "n": one.n,
            "planned": one.planned,
            "rate": one.rate,
            "low": one.low,
            "high": one.high,
        }
        excess = one.details.get("excess_over_aligned")
        found[name] = kept | {"outcome": one.outcome.value} | ({"excess": dict(excess)} if excess else {})
    return found


def load_chat(folder: Path, dtype: torch.dtype) -> ChatModel:
    """The aligned model on the CPU in a number format of our choice."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )
    return ChatModel(model, AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False))


def _share(original: Original, own: list[float]) -> float | None:
    """The point value of the share of the gain that is kept."""
    gained = sum(original.aligned) - sum(original.losses)
    return None if gained <= 0 else (sum(original.aligned) - sum(own)) / gained
