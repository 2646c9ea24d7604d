"""Make a calibration pack: run the aligned model on harmful and benign prompts and listen to it.

Moments come from forward passes, the refusal gradient from one backward pass for each row. Rows are folded into a few
directions as they come, so memory does not grow with the number of prompts. Starts without transformers; whoever
calls brings the loaded model.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from repair.calibration import CalibrationSettings, MeasuredModule
from repair.checks.packs import Prompt, load_pack, ordered
from repair.context import Progress, silent
from repair.errors import BadParameters
from repair.listening import Ears, Listener, column_norms, gradients
from repair.moments import Topic
from repair.sketch import GradientSketch
from repair.units import with_unit_scores

PACK: Final = "calibration"
_REFUSE: Final = "refuse"


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
    harmful = tuple(row for row in rows if row.category == _REFUSE)[: settings.prompts]
    benign = tuple(row for row in rows if row.category != _REFUSE)[: settings.prompts]
    if min(len(harmful), len(benign)) < settings.prompts:
        detail = f"the pack has {len(harmful)} harmful and {len(benign)} benign rows for {settings.prompts}"
        raise BadParameters(detail, field="prompts")
    return CalibrationRows(harmful=harmful, benign=benign)


def measure_modules(
    chat: Any, rows: CalibrationRows, settings: CalibrationSettings, *, progress: Progress = silent
) -> dict[str, MeasuredModule]:
    """Everything a pack holds about every linear and every expert of ``chat``'s model; the model is left as it was.

    An expert that too few prompts were routed to is there with the reason why nothing is known about it. A linear that
    does not see one row for each token (an expert that is a module) is not there.
    """
    with chat.arm(None), _frozen(chat.model):
        ears = Ears(chat.model, settings)
        tensors: dict[str, dict[str, Tensor]] = {name: {} for name in ears.names}
        listeners = {topic: Listener(ears) for topic in Topic}
        for half, (topic, prompts) in enumerate(((Topic.HARMFUL, rows.harmful), (Topic.BENIGN, rows.benign))):
            encoded = [_encode(chat, row, settings) for row in prompts]
            listeners[topic].listen(chat.model, encoded, progress, start=half / 4)
            for name, side, sketch in listeners[topic].sketches():
                found = sketch.finish()
                for part in ("mean", "squares", "basis", "values"):
                    tensors[name][f"{side}.{topic}.{part}"] = getattr(found, part)
        losses = [partial(_refusal_loss, chat, row) for row in rows.harmful[: settings.gradient_prompts]]
        slopes = gradients(chat.model, ears, losses, progress)
    owners = listeners[Topic.BENIGN].owners
    heard = {str(topic): set(one.owners) for topic, one in listeners.items()} | {"gradient's": set(slopes)}
    whole = set.intersection(*heard.values()) - set(ears.experts.strange)
    modules = {name: _measured(name, owners, tensors[name], slopes[name]) for name in ears.names if name in whole}
    norms = column_norms({name: ears.weights[name] for name in modules})
    heads = getattr(chat.model.config.get_text_config(), "num_attention_heads", None)
    scored = with_unit_scores(modules, norms, heads, interleaved=frozenset(ears.experts.interleaved))
    return {**scored, **_left_out(ears, heard)}


def _measured(
    name: str, owners: Mapping[str, str], tensors: Mapping[str, Tensor], slope: GradientSketch
) -> MeasuredModule:
    gradient = slope.finish()
    parts = {f"gradient.{part}": getattr(gradient, part) for part in ("u", "values", "v", "bias")}
    return MeasuredModule(
        shape=(len(gradient.bias), len(gradient.v)),
        tensors={**tensors, **parts},
        numbers={"gradient_total": gradient.total},
        inputs=owners[name] if owners[name] != name else None,
    )


def _left_out(ears: Ears, heard: Mapping[str, set[str]]) -> dict[str, MeasuredModule]:
    """Fused experts that nothing can be said about, with the reason."""
    found = {}
    for name in ears.experts.names:
        missing = next((kind for kind, names in heard.items() if name not in names), None)
        if name in ears.experts.strange:
            why = ears.experts.strange[name]
        elif name not in ears.experts.seen:
            why = "the model class works with this expert in a way that cannot be listened to"
        else:
            why = f"no {missing} prompt of the calibration was routed to this expert" if missing else ""
        if why:
            found[name] = MeasuredModule(shape=(0, 0), tensors={}, numbers={}, left_out=why)
    return found


def _refusal_loss(chat: Any, row: Prompt) -> Tensor:
    """Mean negative log-likelihood of the refusal's tokens, its end of turn among them."""
    from repair.checks.backend import Sample  # noqa: PLC0415 - transformers takes seconds to import

    question, answer = chat.encode_sample(Sample(prompt=row.text, answer=row.answers[0]))
    ids = torch.tensor([question + answer], device=chat.model.device)
    logits = chat.model(input_ids=ids, use_cache=False).logits[0, len(question) - 1 : -1]
    return functional.cross_entropy(
        logits.to(torch.promote_types(logits.dtype, torch.float32)), ids[0, len(question) :]
    )


def _encode(chat: Any, row: Prompt, settings: CalibrationSettings) -> tuple[list[int], slice]:
    """Question and the opening of the answer in tokens, and which of them count."""
    question = chat.encode(row.text)
    answer = chat.tokenizer.encode(row.answers[0], add_special_tokens=False)[: settings.answer_tokens]
    return question + answer, slice(max(0, len(question) - settings.question_tokens), len(question) + len(answer))


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter takes a gradient inside the block: activations do."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)  # noqa: FBT003 - torch's own signature
        yield
    finally:
        for parameter, flag in before:
            parameter.requires_grad_(flag)
