"""First-order gradient guard (methods M14): take out of each update what raises the loss of refusing.

With G the gradient of the mean refusal loss at the aligned weight, ``<G, D>`` is the damage that an update D is
predicted to do; for a large update it is better taken on the way there (`at`, see `slopes.py`). The idea that a few
directions hold what safety needs is that of SPF, a training method; using it on a finished adapter is our own
derivation.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from types import MappingProxyType
from typing import ClassVar

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from repair import alignment
from repair.calibration import known_about
from repair.context import RepairContext
from repair.first_order import first_order_damage
from repair.lora import LayerReference, LoraAdapter, LoraLayer
from repair.method import Assessment, Choice, Cost, Decision, Laws, Need, Otherwise, RepairMethod, unjudged
from repair.moments import Gradient
from repair.selection import highest, share_of

_PACK = "calibration"


class Form(StrEnum):
    """How the damage is taken out."""

    PROJECTION = "projection"
    """``B - strength U U^T B`` with the top left singular vectors of G: the rank stays."""
    MINIMAL = "minimal"
    """``D - strength (<G, D> / |G|^2) G``: the smallest change that leaves no predicted damage; the rank grows."""
    SCALE = "scale"
    """``(1 - strength) D`` where damage is predicted: the plain scale of M4, its modules picked by gradient."""


class GradientGuard(RepairMethod):
    """Take out of each update what raises the loss of refusing, to first order."""

    name: ClassVar[str] = "gradient_guard"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "https://arxiv.org/abs/2601.10141"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ALIGNED, Need.CALIBRATION})
    cost: ClassVar[Cost] = Cost.SECONDS
    laws: ClassVar[Laws] = Laws(
        noop=MappingProxyType({"strength": 0.0}),
        idempotent=MappingProxyType({"strength": 1.0, "directions": 3}),
        never_grows=MappingProxyType({"directions": 3}),
    )

    otherwise: ClassVar[tuple[Otherwise, ...]] = tuple(
        Otherwise(parameter=one, needs=frozenset({Need.ALIGNED, Need.CALIBRATION, Need.CHAT}))
        for one in ("at", "contrast")
    )

    form: Form = Field(
        default=Form.PROJECTION,
        description="projection keeps the rank; minimal changes least and adds `directions`; scale shrinks the whole "
        "update of a module",
    )
    directions: int = Field(default=4, ge=1, le=64, description="Singular directions of the gradient that are used")
    strength: float = Field(default=1.0, ge=0, le=1, description="Share of the damage that is taken out; 0 keeps all")
    share: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Share of the modules predicted to do damage that is edited, those that do most first",
    )

    at: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Where on the way from the aligned model, 0, to the upload, 1, the gradient is taken; at 0.5 the "
        "predicted damage is that of the midpoint rule",
    )
    contrast: bool = Field(
        default=False,
        description="Take off the gradient of refusing harmless look-alikes: what refuses everything is left alone",
    )
    prompts: int = Field(
        default=16, ge=1, le=256, description="Harmful prompts that the gradient is taken on where it is not the pack's"
    )

    @property
    def packs(self) -> tuple[str, ...]:
        """The rows of the calibration, where the gradient is taken anew."""
        return (_PACK,) if self._listens else ()

    @property
    def _listens(self) -> bool:
        return self.strength > 0 and (self.at > 0 or self.contrast)

    def look(self, adapter: LoraAdapter, context: RepairContext) -> RepairContext:
        """With the gradient that was asked for, in the place of the pack's."""
        if not self._listens:
            return context
        # Late: whoever only lists the methods need not read prompts.
        from repair.slopes import Slope, on_the_way  # noqa: PLC0415

        slope = Slope(at=self.at, prompts=self.prompts, contrast=self.contrast)
        return replace(context, calibration=on_the_way(adapter, context, slope))

    def assess(self, layer: LoraLayer, reference: LayerReference) -> Assessment:
        """The predicted rise of the refusal loss, in nats per token; 0 for an update without any preference."""
        known = known_about(layer, reference)
        if isinstance(known, str):
            return unjudged(layer, known)
        gradient = known.gradient()
        if gradient.total == 0:
            return unjudged(layer, "the refusal loss does not depend on this module")
        damage = first_order_damage(layer, gradient)
        if self.form is Form.MINIMAL:
            edited, action = self._shifted(layer, gradient, damage), Decision.PATCHED
        elif self.form is Form.SCALE:
            edited, action = layer.scaled(1 - self.strength), Decision.SCALED
        else:
            edited, action = self._projected(layer, gradient), Decision.PROJECTED
        return Assessment(layer=layer, edited=edited, action=action, score=damage, null=0.0)

    def choose(self, assessments: Sequence[Assessment]) -> Choice:
        """The modules whose update is predicted to raise the loss."""
        if self.strength == 0:
            return Choice(names=frozenset(), reason="strength 0 keeps every module")
        harmful = [one for one in assessments if one.score is not None and one.score > 0]
        names = highest(harmful, share_of(harmful, self.share)).names
        return Choice(names=names, reason="it is not predicted to raise the loss of refusing, or others do so more")

    def _projected(self, layer: LoraLayer, gradient: Gradient) -> LoraLayer:
        u = gradient.u[:, : self.directions]

        def outside(x: Float[Tensor, "out columns"]) -> Float[Tensor, "out columns"]:
            return x - self.strength * alignment.project(x, u)

        bias = None if layer.bias is None else outside(layer.bias[:, None])[:, 0].contiguous()
        return replace(layer, b=outside(layer.b), bias=bias)

    def _shifted(self, layer: LoraLayer, gradient: Gradient, damage: float) -> LoraLayer:
        """Along the held part of G, and along the gradient of the bias where there is a bias."""
        values = gradient.values[: self.directions].double()
        energy = float(values.square().sum())
        if layer.bias is not None:
            energy += float(gradient.bias.double().square().sum())
        step = self.strength * damage / energy
        root = math.sqrt(abs(step)) * values.sqrt()
        b = -math.copysign(1.0, step) * gradient.u[:, : self.directions].double() * root
        a = root[:, None] * gradient.v[:, : self.directions].double().T
        shifted = None
        if layer.bias is not None:
            shifted = (layer.scale * layer.bias.double() - step * gradient.bias.double()).to(layer.bias.dtype)
        return replace(
            layer,
            a=torch.cat([layer.a, a.to(layer.a.dtype)], dim=0),
            b=torch.cat([layer.scale * layer.b, b.to(layer.b.dtype)], dim=1),
            bias=shifted,
            scale=1.0,
        )
