"""All diagnostics of one adapter as JSON: what could be measured with what is at hand, and why the rest was not.

Factors alone always; a weight is read once where the aligned model is at hand, v where the pair is and no basis pack
stands in for it; activations by a calibration pack; the profile where a chat model is loaded. Nothing here decides.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from repair.context import RepairContext
from repair.diagnostics.behaviour import behaviour_of
from repair.diagnostics.payload import payload_of
from repair.diagnostics.profile import PACKS, interpolation_profile, select_prompts
from repair.diagnostics.space import from_pack, from_pair
from repair.diagnostics.spectra import spectrum_of, weight_norm
from repair.lora import LoraAdapter, LoraLayer
from repair.score import ModuleScore, score_adapters

SCHEMA: Final = "lora-repair/diagnostics/v1"
NEEDS: Final = {
    "relative_norm": "needs the aligned model's weights",
    "alignment": (
        "needs a basis pack or the weights of both models: `lora-repair reference prepare NAME` makes the pack for a "
        "reference of the service, `lora-repair basis` for --basis"
    ),
    "behaviour": (
        "first-order damage, response and leak need a calibration pack of the aligned model: `lora-repair reference "
        "prepare NAME` makes it for a reference of the service, `lora-repair calibrate` for --calibration"
    ),
    "profile": "needs the aligned model loaded as a chat",
}
_NO_DIRECTIONS: Final = "inside, r_align and r_after need a basis pack: they would read both models many times"


def diagnose(
    adapter: LoraAdapter, context: RepairContext, *, directions: int = 0, weights: bool | None = None
) -> dict[str, Any]:
    """Everything that ``context`` allows; ``directions`` above 0 looks for so many of v where there is no basis pack.

    ``weights`` says whether the aligned weights may be read; None for where no basis pack stands in for them.

    Tells ``context.progress`` as it goes. Raises what reading a reference raises: MissingWeight or ShapeMismatch when
    the adapter is for another model, WrongReference when a pack is damaged.
    """
    factors = replace(adapter, extras=())
    reads = context.aligned is not None and (context.basis is None if weights is None else weights)
    scores = _scores(factors, context)
    modules = [_module(layer, context, scores, directions, reads=reads) for layer in factors.layers]
    profile = None
    if context.chat is not None:
        harmful, benign = select_prompts()
        profile = interpolation_profile(factors, context, harmful=harmful, benign=benign) | {"packs": list(PACKS)}
    return {
        "schema": SCHEMA,
        "summary": summary(modules),
        "payload": payload_of(adapter),
        "profile": profile,
        "modules": modules,
        "not_measured": _unmeasured(context, directions, reads=reads),
    }


def summary(modules: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all modules: the norm of the whole update, where it is largest next to its weight, the predicted damage."""
    norm = math.sqrt(sum(one["spectrum"]["norm"] ** 2 for one in modules))
    relative = [(one["relative_norm"], one["name"]) for one in modules if one["relative_norm"] is not None]
    damage = [one["behaviour"]["damage"].get("value") for one in modules if one["behaviour"] is not None]
    known = [value for value in damage if value is not None]
    return {
        "modules": len(modules),
        "norm": norm,
        "largest_relative_norm": max(relative)[0] if relative else None,
        "largest_relative_norm_in": max(relative)[1] if relative else None,
        "damage": math.fsum(known) if known else None,
        "damage_known_for": len(known),
    }


def _unmeasured(context: RepairContext, directions: int, *, reads: bool) -> dict[str, str]:
    pair = context.aligned is not None and context.base is not None
    missing = {
        "relative_norm": not reads,
        "alignment": context.basis is None and not pair,
        "behaviour": context.calibration is None,
        "profile": context.chat is None,
    }
    found = {name: NEEDS[name] for name, absent in missing.items() if absent}
    if context.aligned is not None and not reads:
        found["relative_norm"] = "the basis pack stands in for the models, whose weights were not read"
    if context.basis is None and pair and directions == 0:
        found["alignment.inside"] = _NO_DIRECTIONS
    found["intruder_dimensions"] = "would need singular vectors of every whole weight"
    return found


def _scores(adapter: LoraAdapter, context: RepairContext) -> dict[str, ModuleScore]:
    """Cosines by the weights of the pair, which are read once for each module; none where a pack stands in."""
    if context.basis is not None or context.aligned is None or context.base is None:
        return {}
    return {one.name: one for one in score_adapters({"upload": adapter}, context)}


def _module(
    layer: LoraLayer, context: RepairContext, scores: Mapping[str, ModuleScore], directions: int, *, reads: bool
) -> dict[str, Any]:
    spectrum = spectrum_of(layer)
    reference = None if context.aligned is None else context.reference_for(layer, with_base=bool(scores))
    relative, aside = None, None
    if reference is not None and reads:
        relative = spectrum["norm"] / size if (size := weight_norm(reference)) > 0 else None
    if context.basis is not None:
        basis = context.basis.for_layer(layer)
        aside = basis if isinstance(basis, str) else from_pack(layer, basis)
    elif reference is not None and layer.name in scores:
        aside = from_pair(layer, reference, scores[layer.name], directions)
    measured = context.calibration is not None and reference is not None
    return {
        "name": layer.name,
        "spectrum": spectrum,
        "relative_norm": relative,
        "alignment": {"not_measured": aside} if isinstance(aside, str) else aside,
        "behaviour": behaviour_of(layer, reference) if measured and reference is not None else None,
    }
