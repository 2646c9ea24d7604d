"""What the aligned model's own activations and gradients say about an update, out of a calibration pack.

The numbers are those that the three guards rank modules by; here they are told and nothing is edited.
"""

from typing import Any, Final

from repair.lora import LayerReference, LoraLayer
from repair.methods import METHODS

GUARDS: Final = {"damage": "gradient_guard", "response": "input_guard", "leak": "output_guard"}
"""Each measure and the method whose score it is, with that method's default parameters."""


def behaviour_of(layer: LoraLayer, reference: LayerReference) -> dict[str, Any]:
    """For each measure its value and that of an update without preference, or why there is none.

    ``damage`` is the predicted rise of the refusal loss in nats per token, to first order; ``response`` is 0 for an
    update that answers to benign prompts only, 1 for harmful only; ``leak`` is the share of the update's norm that goes
    where the aligned model writes on harmful prompts.
    """
    found: dict[str, Any] = {}
    for measure, method in GUARDS.items():
        seen = METHODS[method]().assess(layer, reference)
        found[measure] = (
            {"value": seen.score, "null": seen.null} if seen.unjudged is None else {"not_measured": seen.unjudged}
        )
    return found
