"""The gradient of refusing on the way to an adapter: what a calibration pack holds for the aligned model, taken there.

An update that was learnt hard leaves the neighbourhood in which the aligned model's gradient predicts anything. Taken
halfway, the inner product with the update is the midpoint rule for the change of the loss over the whole way: exact
where the loss is quadratic along it (methods M14).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from repair.calibration import Calibration, CalibrationSettings
from repair.context import RepairContext
from repair.dora import remeasured
from repair.errors import MissingReference
from repair.listening import Ears, Weighted, gradients
from repair.lora import LoraAdapter, LoraLayer
from repair.refusing import calibration_rows, frozen, lookalikes, refusal_loss

_UNHEARD: Final = "no harmful prompt of the calibration reached this module with the adapter on the model"


@dataclass(frozen=True, kw_only=True)
class Slope:
    """Which gradient.

    Attributes:
        at: Where on the way from the aligned model, 0, to the adapter, 1.
        prompts: How many harmful prompts it is taken on.
        contrast: Take off the gradient of giving the same refusals to as many harmless look-alikes: what would refuse
            everything has no part in what is left.
    """

    at: float
    prompts: int
    contrast: bool = False


def on_the_way(adapter: LoraAdapter, context: RepairContext, slope: Slope) -> Calibration:
    """The calibration of ``context`` with that gradient, taken on the loaded model, in the place of its own.

    Taken once for an adapter: `context.heard` keeps the last one of each kind. A module that is not heard is left out,
    with the reason. Raises MissingReference without a calibration or a loaded model.
    """
    if context.calibration is None or context.chat is None:
        missing = "calibration" if context.calibration is None else "chat"
        raise MissingReference("a gradient on the way to the adapter needs it and it was not given", field=missing)
    known = context.heard.get(slope)
    if known is not None and _same(known[0].layers, adapter.layers):
        return known[1]
    calibration, chat = context.calibration, context.chat
    named = (calibration.entry_of(layer)[0] for layer in adapter.layers)
    wanted = {name for name in named if name is not None}
    losses = list(_losses(chat, slope, seed=calibration.settings.seed))
    # In this order: what DoRA measures of the model must not want a gradient.
    with frozen(chat.model), chat.arm(remeasured(adapter, adapter.scaled(slope.at), context)):
        sketches = gradients(chat.model, Ears(chat.model, calibration.settings), losses, context.progress, only=wanted)
    found = {name: sketch.finish() for name, sketch in sketches.items()}
    heard = calibration.with_gradients(found, dict.fromkeys(wanted - found.keys(), _UNHEARD))
    context.heard[slope] = adapter, heard
    return heard


def _losses(chat: Any, slope: Slope, *, seed: int) -> Iterator[Weighted]:
    share = 1 / slope.prompts
    rows = calibration_rows(CalibrationSettings(prompts=slope.prompts, gradient_prompts=slope.prompts, seed=seed))
    yield from ((share, partial(refusal_loss, chat, row)) for row in rows.harmful)
    if slope.contrast:
        others = lookalikes(slope.prompts, seed=seed)
        for row, other in zip(rows.harmful, others, strict=True):
            yield -share, partial(refusal_loss, chat, replace(other, answers=row.answers))


def _same(known: tuple[LoraLayer, ...], layers: tuple[LoraLayer, ...]) -> bool:
    return len(known) == len(layers) and all(one is other for one, other in zip(known, layers, strict=True))
