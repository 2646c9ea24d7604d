"""Everything that was found, as one JSON file that the table and the plots are made from."""

import json
from pathlib import Path
from typing import Any, Final

import torch
import transformers

from bench.efficacy.lab import ZOO, Lab
from bench.machine import machine
from repair.adapter_file import read_adapter
from repair.methods import METHODS
from repair.run import repair_adapter

RESULTS: Final = Path(__file__).parents[1] / "results" / "efficacy.json"


def collect(lab: Lab, path: Path) -> None:
    """Write all rows that this run told, with what they depend on."""
    rows = [lab.store.rows[key] for key in lab.seen]
    document = {
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "reference": dict(lab.reference),
        "policy": lab.policy.model_dump(mode="json") | {"digest": lab.policy.digest},
        "methods": {name: method.version for name, method in METHODS.items()},
        "rows": rows,
        "alignment": {name: alignment(lab, name) for name in sorted({row["adapter"] for row in rows} - {""})},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, indent=1) + "\n")


def alignment(lab: Lab, name: str) -> list[dict[str, Any]]:
    """How far each module's update agrees with what alignment changed (rho), beside a random update's (its null)."""
    adapter = read_adapter(ZOO / "adapters" / name)
    found = repair_adapter(adapter, METHODS["safe_lora"].parse({}), lab.context)
    return [
        {"module": one.name, "rho": one.score, "null": one.null, "energy": one.energy_before} for one in found.verdicts
    ]
