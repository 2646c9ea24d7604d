"""How strongly an update answers to the inputs that a calibration has seen, from their moments alone (identity I9)."""

import math

from repair.grams import gram
from repair.lora import LoraLayer
from repair.moments import LayerCalibration, Moments, Side, Topic


def unscaled_energy(layer: LoraLayer, inputs: Moments) -> float:
    """Mean of ``|B A x + bias|^2`` over the tokens of ``inputs``; the layer's scale is left out."""
    outputs = gram(layer.b, layer.b)
    energy = float((outputs * inputs.form(layer.a)).sum())
    if layer.bias is not None:
        bias = layer.bias.double()
        energy += 2 * float((bias @ layer.b.double()) @ (layer.a.double() @ inputs.mean.double()))
        energy += float(bias.square().sum())
    return energy


def response_ratio(own: LoraLayer, added: LoraLayer, known: LayerCalibration | None) -> float | None:
    """``|D x| / |D_added x|``, root mean squares over harmful prompts: how loud an update is beside an addition.

    None without a calibration of the module, where the update is a DoRA's (no sum of factors), or where the addition
    says nothing. Methods M5.
    """
    if known is None or own.magnitude is not None or added.magnitude is not None:
        return None
    inputs = known.moments(Side.INPUTS, Topic.HARMFUL)
    theirs = added.scale**2 * unscaled_energy(added, inputs)
    if theirs <= 0:
        return None
    return math.sqrt(max(0.0, own.scale**2 * unscaled_energy(own, inputs)) / theirs)
