"""First-order damage: how much an update is predicted to raise the loss of refusing, from gradients alone.

``<G, D>`` with G the gradient of the mean refusal loss at the aligned weights (a calibration pack holds its largest
singular triplets) and D the update; nats per token, to first order. No forward pass. Source: SafeGrad
(https://arxiv.org/abs/2601.10141) uses the same product to find conflicting directions.
"""

import math

from repair.calibration import Calibration
from repair.lora import LoraAdapter, LoraLayer
from repair.moments import Gradient


def first_order_damage(layer: LoraLayer, gradient: Gradient) -> float:
    """``<G, s B A>`` with the held triplets of G, and the bias with its own gradient."""
    writes = gradient.u.double().T @ layer.b.double()
    reads = layer.a.double() @ gradient.v.double()
    total = float((gradient.values.double()[:, None] * writes * reads.T).sum())
    if layer.bias is not None:
        total += float(layer.bias.double() @ gradient.bias.double())
    return layer.scale * total


def adapter_damage(adapter: LoraAdapter, calibration: Calibration | None) -> float | None:
    """The sum over the modules that the calibration looked at; None where that is none of them.

    A DoRA's update is not ``s B A`` alone: it is left out. Raises ShapeMismatch where the adapter is for another model.
    """
    if calibration is None:
        return None
    known = [(layer, calibration.for_layer(layer)) for layer in adapter.layers if layer.magnitude is None]
    found = [first_order_damage(layer, module.gradient()) for layer, module in known if module is not None]
    return math.fsum(found) if found else None
