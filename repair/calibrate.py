"""Make a calibration pack: run the aligned model on harmful and benign prompts and listen to it.

Moments come from forward passes, the refusal gradient from one backward pass for each row. Rows are folded into a few
directions as they come, so memory does not grow with the number of prompts. Starts without transformers; whoever
calls brings the loaded model.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from repair.calibration import CalibrationSettings, MeasuredModule
from repair.checks.packs import Prompt
from repair.context import Progress, silent
from repair.listening import Ears, Listener, column_norms, gradients
from repair.moments import Topic
from repair.refusing import CalibrationRows, frozen, refusal_loss
from repair.sketch import GradientSketch
from repair.units import with_unit_scores


def measure_modules(
    chat: Any, rows: CalibrationRows, settings: CalibrationSettings, *, progress: Progress = silent
) -> dict[str, MeasuredModule]:
    """Everything a pack holds about every linear and every expert of ``chat``'s model; the model is left as it was.

    An expert that too few prompts were routed to is there with the reason why nothing is known about it. A linear that
    does not see one row for each token (an expert that is a module) is not there.
    """
    with chat.arm(None), frozen(chat.model):
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
        refused = rows.harmful[: settings.gradient_prompts]
        losses = [(1 / len(refused), partial(refusal_loss, chat, row)) for row in refused]
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


def _encode(chat: Any, row: Prompt, settings: CalibrationSettings) -> tuple[list[int], slice]:
    """Question and the opening of the answer in tokens, and which of them count."""
    question = chat.encode(row.text)
    answer = chat.tokenizer.encode(row.answers[0], add_special_tokens=False)[: settings.answer_tokens]
    return question + answer, slice(max(0, len(question) - settings.question_tokens), len(question) + len(answer))
