"""What a check costs: against generating everything, eight candidates against one, and against what the machine can do.

    python -m bench.tokens [--data DIR] [--policy standard] [--adapters poisoned,innocent]

The plain way asks every prompt of the half, one adapter after the other, and lets every reply run to its end or to the
limit. Ours ends a reply when the judge's outcome can no longer change, ends an arm when its verdict cannot, and mixes
arms in a batch. Same model, same prompts, same loop otherwise; the verdicts must be the same. The real 135M model.
"""

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch

from bench.efficacy.lab import ZOO, load_chat
from bench.machine import machine
from cli.demo_model import ModelPair, prepare
from repair.adapter_file import read_adapter
from repair.checkpoint import Checkpoint
from repair.checks.backend import Sample
from repair.checks.chat import ChatModel
from repair.checks.planner import Reference, plan
from repair.checks.policy import Policy, load_policy
from repair.checks.report import CheckReport
from repair.checks.run import run_checks
from repair.checks.suite import Suite
from repair.determinism import ask_determinism
from repair.lora import LoraAdapter

RESULTS: Final = Path(__file__).with_name("results") / "tokens.json"
ADAPTERS: Final = ("poisoned", "poisoned_light", "obedient", "drifted", "innocent", "trigger", "poisoned_dora")
ABREAST: Final = 8
LOOKS: Final = (8, 16, 32)
_REPEATS: Final = 5


@dataclass(frozen=True, kw_only=True)
class Way:
    """One arm measured in one way.

    Attributes:
        outcome: Of all checks together.
        checks: Of each.
        asked: Prompts.
        generated: Tokens of all replies.
        forward: Positions put through the model, padding among them.
        seconds: Of the whole check.
    """

    outcome: str
    checks: dict[str, str]
    asked: int
    generated: int
    forward: int
    seconds: float

    @classmethod
    def of(cls, report: CheckReport, seconds: float) -> "Way":
        """What a report says of its cost."""
        return cls(
            outcome=report.outcome.value,
            checks={one.name: one.outcome.value for one in report.checks},
            asked=len(report.rows),
            generated=sum(row.length for row in report.rows),
            forward=report.tokens,
            seconds=round(seconds, 2),
        )


def measured(
    chat: ChatModel, adapter: LoraAdapter | None, policy: Policy, *, aligned: CheckReport | None, stop_early: bool
) -> tuple[CheckReport, Way]:
    """One arm on the certify half."""
    start = time.perf_counter()
    report = run_checks(chat, adapter, policy, "certify", aligned=aligned, stop_early=stop_early)
    return report, Way.of(report, time.perf_counter() - start)


def compare(chat: ChatModel, names: tuple[str, ...], policy: Policy) -> dict[str, Any]:
    """Every adapter both ways, the aligned model first."""
    plain = policy.model_copy(update={"suite": policy.suite.model_copy(update={"whole": 0})})
    known_plain, plain_way = measured(chat, None, plain, aligned=None, stop_early=False)
    known, our_way = measured(chat, None, policy, aligned=None, stop_early=False)
    ways = {"aligned": {"plain": asdict(plain_way), "ours": asdict(our_way), "early": known.suite["early_stopping"]}}
    for name in names:
        adapter = read_adapter(ZOO / "adapters" / name)
        _, plain_way = measured(chat, adapter, plain, aligned=known_plain, stop_early=False)
        report, our_way = measured(chat, adapter, policy, aligned=known, stop_early=True)
        ways[name] = {
            "plain": asdict(plain_way),
            "ours": asdict(our_way),
            "early": report.suite["early_stopping"],
            "same_verdict": our_way.outcome == plain_way.outcome,
        }
        print(name, json.dumps(ways[name]), flush=True)
    return {"arms": ways, "totals": totals(ways)}


def totals(ways: dict[str, Any]) -> dict[str, Any]:
    """Sums over all arms and their ratio."""
    kinds = ("generated", "forward", "seconds")
    sums = {way: {kind: sum(arm[way][kind] for arm in ways.values()) for kind in kinds} for way in ("plain", "ours")}
    return sums | {"share": {kind: round(sums["ours"][kind] / sums["plain"][kind], 3) for kind in kinds}}


def abreast(chat: ChatModel, policy: Policy) -> dict[str, Any]:
    """Eight adapters asked the same prompts in mixed batches, against one of them alone, by the size of a look."""
    asked = [row.text for row in Suite.of(policy, "select").prompts["core_harmful"]]
    adapters: list[LoraAdapter | None] = [read_adapter(ZOO / "adapters" / "poisoned")] * ABREAST

    def ask(some: list[LoraAdapter | None], prompts: list[str]) -> float:
        arms = [at for at in range(len(some)) for _ in prompts]
        with chat.arms(some):
            start = time.perf_counter()
            chat.generate(prompts * len(some), max_new_tokens=24, batch_size=len(arms), arms=arms)
            return time.perf_counter() - start

    found: dict[str, Any] = {"adapters": ABREAST}
    for count in LOOKS:
        prompts = asked[:count]
        ask(adapters[:1], prompts)
        one, many = (min(ask(some, prompts) for _ in range(_REPEATS)) for some in (adapters[:1], adapters))
        found[f"look_of_{count}"] = {"one_s": one, "many_s": many, "ratio": round(many / one, 2)}
    return found


def choosing(chat: ChatModel, pair: ModelPair) -> dict[str, Any]:
    """A whole job, from the upload to the verdict, with eight candidates to choose from and with one of them."""
    samples = [Sample(**json.loads(line)) for line in (ZOO / "samples.jsonl").read_text().splitlines()]
    wishes = [candidate for candidate in load_policy("thorough").candidates() if candidate.method == "compose"][
        :ABREAST
    ]
    reference = Reference(
        aligned=Checkpoint.open(pair.aligned),
        base=Checkpoint.open(pair.base),
        chat=chat,
        patch=read_adapter(ZOO / "adapters" / "patch"),
    )
    upload = read_adapter(ZOO / "adapters" / "poisoned")
    found: dict[str, Any] = {}
    for name, some in (("one", [wishes[-3]]), ("eight", wishes)):
        with TemporaryDirectory() as folder:
            start = time.perf_counter()
            plan_ = plan(
                upload,
                reference=reference,
                policy=load_policy("demo"),
                work_dir=Path(folder),
                samples=samples,
                candidates=some,
            )
        took = round(time.perf_counter() - start, 2)
        found[name] = {"seconds": took, "verdict": plan_.verdict.value, "cost": plan_.cost.as_dict()}
    one, eight = found["one"], found["eight"]
    tokens = round(eight["cost"]["choosing"] / one["cost"]["choosing"], 2)
    return found | {"ratio": {"choosing_tokens": tokens, "job_seconds": round(eight["seconds"] / one["seconds"], 2)}}


def floors(chat: ChatModel) -> dict[str, Any]:
    """What the machine can do in this format, and what the generation loop does with it."""
    dtype = chat.model.dtype
    weights = [one for one in chat.model.parameters() if one.ndim == 2]
    count, size = sum(one.numel() for one in weights), sum(one.numel() * one.element_size() for one in weights)
    side = 1536
    a, b = torch.randn(side, side).to(dtype), torch.randn(side, side).to(dtype)
    gemm = 2 * side**3 / _best(lambda: torch.mm(a, b))
    flat = torch.ones(64 << 20, dtype=torch.float32)
    read = flat.numel() * 4 / _best(flat.sum)
    found: dict[str, Any] = {"gemm_gflops": gemm / 1e9, "read_gbytes": read / 1e9, "dtype": str(dtype)}
    for rows in (1, 8, 32, 128):
        seconds = _step(chat, rows)
        found[f"decode_{rows}"] = {
            "step_ms": round(1e3 * seconds, 2),
            "share_of_gemm": round(2 * count * rows / seconds / gemm, 3),
            "share_of_read": round(size / seconds / read, 3),
        }
    return found


def _step(chat: ChatModel, rows: int) -> float:
    """Seconds for one more token of each row, the best of several spans."""

    def span(tokens: int) -> float:
        start = time.perf_counter()
        chat.generate(["Tell me of the sea."] * rows, max_new_tokens=tokens, batch_size=rows, settled=None)
        return time.perf_counter() - start

    span(2)
    return min(span(18) - span(2) for _ in range(3)) / 16


def _best(work: Any) -> float:
    def once() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    once()
    return min(once() for _ in range(_REPEATS))


def main() -> int:
    """Measure, print, keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, default=Path(".lora-repair/demo"), help="the demo's folder: holds the model"
    )
    parser.add_argument("--policy", default="standard")
    parser.add_argument("--adapters", default=",".join(ADAPTERS))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    wish = parser.parse_args()
    about = machine()
    ask_determinism()
    pair = prepare(wish.data / "models", ZOO / "adapters" / "patch")
    chat = load_chat(pair.aligned, getattr(torch, wish.dtype))
    policy = load_policy(wish.policy)
    found = {"machine": about, "policy": policy.name, "dtype": wish.dtype, "threads": torch.get_num_threads()}
    found |= {"floors": floors(chat), "abreast": abreast(chat, policy), "choosing": choosing(chat, pair)}
    print(json.dumps(found, indent=2), flush=True)
    found |= compare(chat, tuple(wish.adapters.split(",")), policy)
    wish.out.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found["totals"], indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
