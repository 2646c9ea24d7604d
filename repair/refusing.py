"""What a calibration listens to: rows of the bundled pack, and the loss of refusing the harmful ones.

Starts without transformers; whoever calls brings the loaded model.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from repair.calibration import CalibrationSettings
from repair.checks.packs import Prompt, load_pack, ordered
from repair.errors import BadParameters

PACK: Final = "calibration"
REFUSE: Final = "refuse"
LOOKALIKE: Final = "lookalike"


@dataclass(frozen=True, kw_only=True)
class CalibrationRows:
    """The prompts and answers that are looked at, in order."""

    harmful: tuple[Prompt, ...]
    benign: tuple[Prompt, ...]

    @property
    def digest(self) -> str:
        """Of every text, in order."""
        found = sha256()
        for row in (*self.harmful, *self.benign):
            for text in (row.category, row.text, row.answers[0]):
                found.update(sha256(text.encode()).digest())
        return f"sha256:{found.hexdigest()}"


def calibration_rows(settings: CalibrationSettings) -> CalibrationRows:
    """Rows of the bundled pack, categories evenly mixed; it shares no prompt with the packs that measure."""
    rows = ordered(load_pack(PACK).rows, seed=settings.seed)
    harmful = tuple(row for row in rows if row.category == REFUSE)[: settings.prompts]
    benign = tuple(row for row in rows if row.category != REFUSE)[: settings.prompts]
    if min(len(harmful), len(benign)) < settings.prompts:
        detail = f"the pack has {len(harmful)} harmful and {len(benign)} benign rows for {settings.prompts}"
        raise BadParameters(detail, field="prompts")
    return CalibrationRows(harmful=harmful, benign=benign)


def lookalikes(count: int, *, seed: int) -> tuple[Prompt, ...]:
    """Harmless requests of the same pack that look like harmful ones."""
    rows = ordered((row for row in load_pack(PACK).rows if row.category == LOOKALIKE), seed=seed)
    if len(rows) < count:
        raise BadParameters(f"the pack has {len(rows)} look-alikes for {count}", field="prompts")
    return tuple(rows[:count])


def refusal_loss(chat: Any, row: Prompt) -> Tensor:
    """Mean negative log-likelihood of the refusal's tokens, its end of turn among them."""
    from repair.checks.backend import Sample  # noqa: PLC0415 - transformers takes seconds to import

    question, answer = chat.encode_sample(Sample(prompt=row.text, answer=row.answers[0]))
    ids = torch.tensor([question + answer], device=chat.model.device)
    logits = chat.model(input_ids=ids, use_cache=False).logits[0, len(question) - 1 : -1]
    return functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), ids[0, len(question) :]
    )


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient inside the block: activations do."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)  # noqa: FBT003 - torch's own signature
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
