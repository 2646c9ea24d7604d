"""The safety vector of one weight as a few singular triplets, and the low-rank layer that adds it back (methods M7).

``v = aligned - base`` comes from two checkpoints, streamed row by row, or from a harmful twin: a LoRA that was tuned to
obey harmful requests. Then ``v = -s_h b_h a_h`` is low-rank as it stands and no checkpoint is read. `resta`, `lox` and
`lssf` differ only in how many triplets they take and how they weigh them: that is their `Cut`.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from repair.alignment import alignment_basis
from repair.errors import UnsupportedAdapter
from repair.interaction import directions
from repair.linalg import Spectrum, delta_energy
from repair.lora import LayerReference, LoraAdapter, LoraLayer
from repair.method import Assessment, Choice, Decision
from repair.selection import everything


@dataclass(frozen=True, kw_only=True)
class SafetyVector:
    """What alignment changed in one weight.

    Attributes:
        triplets: Its largest singular triplets, largest first; u is out x k, v is in x k.
        energy: Squared norm of all of it, whatever the triplets leave out.
        directions: How many singular values it can have.
    """

    triplets: Spectrum
    energy: float
    directions: int


Cut = Callable[[SafetyVector], Tensor]
"""What to multiply the leading singular values with, in float64; its length is the rank to add."""


def from_models(reference: LayerReference, rank: int) -> SafetyVector | None:
    """The ``rank`` largest triplets of ``aligned - base`` by randomised SVD; None where alignment changed nothing.

    The weights are streamed seven times; out x (rank + 16) and in x (rank + 16) numbers are all that is held.
    """
    basis = alignment_basis(reference, rank)
    if basis is None:
        return None
    if reference.basis is not None:
        return SafetyVector(triplets=basis, energy=reference.basis.norm**2, directions=min(reference.shape))
    squares = (float(tile.values.square().sum(dtype=torch.float64)) for tile in reference.alignment_tiles())
    return SafetyVector(triplets=basis, energy=sum(squares), directions=min(reference.shape))


def from_twin(layer: LoraLayer) -> SafetyVector:
    """The negated update of a harmful twin, exactly; without triplets where the twin adds nothing."""
    found = directions(layer)
    negated = replace(found, u=-found.u)
    return SafetyVector(triplets=negated, energy=float(found.values.square().sum()), directions=len(found.values))


def added(layer: LoraLayer, vector: SafetyVector, weights: Tensor) -> LoraLayer:
    """``u diag(weights * values) v^T`` for the module of ``layer``, with the root of the values in either factor."""
    kept = len(weights)
    root = vector.triplets.values[:kept].double().sqrt()
    b = vector.triplets.u[:, :kept].double() * (root * weights)
    a = root[:, None] * vector.triplets.v[:, :kept].double().T
    return replace(
        layer,
        b=b.to(layer.b.dtype).contiguous(),
        a=a.to(layer.a.dtype).contiguous(),
        scale=1.0,
        bias=None,
        magnitude=None,
    )


def assess(layer: LoraLayer, reference: LayerReference, *, rank: int, cut: Cut, limit: float | None) -> Assessment:
    """The layer, and the part of its safety vector to concatenate; the score is that part's share of the energy.

    ``rank`` is how many triplets are looked for, ``limit`` the most that may be added, in norms of the layer's update.
    """
    if reference.unusable is not None:
        return _unjudged(layer, reference.unusable)
    if limit is not None and delta_energy(layer) == 0:
        return _unjudged(layer, "zero adapter: nothing to limit the safety vector by")
    vector = from_models(reference, rank)
    if vector is None:
        return _unjudged(layer, "no alignment displacement: alignment did not change this weight")
    weights = cut(vector)
    return Assessment(
        layer=layer,
        edited=layer,
        action=Decision.KEPT,
        score=float(vector.triplets.values[: len(weights)].double().square().sum()) / vector.energy,
        added=limited(added(layer, vector, weights), layer, limit),
    )


def negated_twin(twin: LoraAdapter, adapter: LoraAdapter, *, cut: Cut, limit: float | None) -> LoraAdapter:
    """The safety vector out of a harmful twin, for each module that the twin adapts.

    ``limit`` holds where the adapter has an update of its own. Raises UnsupportedAdapter for anything but a plain LoRA.
    """
    if twin.uses_dora or twin.extras or any(layer.bias is not None for layer in twin.layers):
        raise UnsupportedAdapter("a harmful twin must be a plain LoRA", field="twin")
    own, layers = adapter.by_name, []
    for layer in twin.layers:
        vector = from_twin(layer)
        if vector.energy > 0:
            found = added(layer, vector, cut(vector))
            layers.append(limited(found, own.get(layer.name), limit))
    return replace(twin, layers=tuple(layers))


def choose(assessments: Sequence[Assessment], *, strength: float, twin: bool) -> Choice:
    """Every module that could be judged; with a twin the modules are its own."""
    if strength == 0:
        return Choice(names=frozenset(), reason="strength 0 adds nothing")
    if twin:
        return Choice(names=frozenset(), reason="the twin does not adapt this module")
    return everything(assessments)


def limited(addition: LoraLayer, own: LoraLayer | None, limit: float | None) -> LoraLayer:
    """The addition, shrunk to ``limit`` norms of the module's own update; a module without one sets no limit."""
    if limit is None or own is None:
        return addition
    allowed, size = limit * math.sqrt(delta_energy(own)), math.sqrt(delta_energy(addition))
    return addition if size <= allowed else addition.scaled(allowed / size)


def _unjudged(layer: LoraLayer, why: str) -> Assessment:
    return Assessment(layer=layer, edited=layer, action=Decision.KEPT, unjudged=why)
