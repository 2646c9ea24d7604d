"""Attenuate the most suspicious singular components of every update (methods M15).

A backdoor, or a poison that was learnt hard, may sit in few singular components of an update. The suspicion of one is
its share of the module's energy, less ``protect`` times its share of what the update says on ordinary prompts. Without
that, the data-free form, the largest components are the suspicious ones, the useful ones among them.
"""

from collections.abc import Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from repair import linalg
from repair.calibration import known_about
from repair.lora import LayerReference, LoraLayer
from repair.method import Assessment, Choice, Cost, Decision, Laws, Need, Otherwise, RepairMethod, unjudged
from repair.moments import Moments, Side, Topic
from repair.selection import everything


class Spectral(RepairMethod):
    """Attenuate the largest singular components of every module's update.

    Acts on the update, not on its factors: a re-factored adapter gets the same repair. The rank stays, the factors come
    out balanced. A bias is one more input that reads 1, so it is edited by the same operator on the outputs.
    """

    name: ClassVar[str] = "spectral"
    version: ClassVar[int] = 1
    paper: ClassVar[str] = "https://arxiv.org/abs/2602.15195"
    needs: ClassVar[frozenset[Need]] = frozenset()
    cost: ClassVar[Cost] = Cost.SECONDS
    laws: ClassVar[Laws] = Laws(
        noop=MappingProxyType({"gain": 1.0}),
        revert=MappingProxyType({"top": 100_000, "gain": 0.0}),
    )

    otherwise: ClassVar[tuple[Otherwise, ...]] = (
        Otherwise(parameter="protect", needs=frozenset({Need.ALIGNED, Need.CALIBRATION})),
    )

    top: int = Field(
        default=1, ge=1, le=100_000, description="How many of the most suspicious components are attenuated"
    )
    gain: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="What their singular values are multiplied by; 1 keeps them, 0 removes them",
    )
    protect: float = Field(
        default=0.0,
        ge=0,
        le=10,
        description="How much a component's share of what the update says on ordinary prompts counts for it; above 0 "
        "the calibration is read",
    )

    def assess(self, layer: LoraLayer, reference: LayerReference) -> Assessment:
        """The module with its most suspicious components attenuated; the score is the suspicion of the first."""
        if linalg.delta_energy(layer) == 0:
            return Assessment(
                layer=layer, edited=layer, action=Decision.KEPT, unjudged="zero adapter: nothing is added here"
            )
        factors = linalg.homogeneous(layer)
        found = linalg.spectrum(factors.b, factors.a)  # scale left out: it multiplies all alike and stays in the layer
        suspicion = found.values.square() / found.values.square().sum()
        if self.protect > 0:
            known = known_about(layer, reference)
            if isinstance(known, str):
                return unjudged(layer, known)
            suspicion = suspicion - self.protect * _clean(found, known.moments(Side.INPUTS, Topic.BENIGN))
            found = _in_order(found, suspicion)
        whole = self.top >= len(found.values)
        removed = Decision.DROPPED if whole else Decision.PROJECTED
        return Assessment(
            layer=layer,
            edited=layer.scaled(self.gain) if whole or self.gain == 1 else self._attenuated(layer, factors.b, found),
            action=removed if self.gain == 0 else Decision.SCALED,
            score=float(suspicion.max()),
        )

    def choose(self, assessments: Sequence[Assessment]) -> Choice:
        """Every module; none at full gain."""
        if self.gain == 1:
            return Choice(names=frozenset(), reason="gain 1 keeps every component")
        return everything(assessments)

    def _attenuated(self, layer: LoraLayer, columns: Tensor, found: linalg.Spectrum) -> LoraLayer:
        """``D - (1 - gain) U U^T D`` for the top left singular vectors U: an edit of the outputs, so the rank stays."""
        u, wide = found.u[:, : self.top], columns.double()
        edited = wide - (1 - self.gain) * (u @ (u.T @ wide))
        factors = linalg.balanced(edited[:, : layer.rank], layer.a)
        missing = layer.rank - factors.a.shape[0]  # a rank above both dimensions has fewer singular values
        return replace(
            layer,
            a=pad(factors.a, (0, 0, 0, missing)).to(layer.a.dtype).contiguous(),
            b=pad(factors.b, (0, missing)).to(layer.b.dtype).contiguous(),
            bias=None if layer.bias is None else edited[:, layer.rank].to(layer.bias.dtype).contiguous(),
        )


def _clean(found: linalg.Spectrum, inputs: Moments) -> Tensor:
    """Each component's share of what the update says on ordinary prompts: ``s_k rms(v_k x)``, summing to 1.

    The root mean square stands for the mean absolute value of the definition: a pack has second moments. A bias reads
    1, which is the last entry of v.
    """
    v = found.v.double()
    reads = v[: len(inputs.squares)]
    squares = inputs.form(reads.T).diagonal()
    if len(v) > len(reads):
        squares = squares + 2 * v[-1] * (reads.T @ inputs.mean.double()) + v[-1].square()
    said: Tensor = found.values.double() * squares.clamp(min=0).sqrt()
    return said / said.sum() if float(said.sum()) > 0 else said


def _in_order(found: linalg.Spectrum, suspicion: Tensor) -> linalg.Spectrum:
    """The components, most suspicious first; those that are equally so by their size."""
    order = suspicion.argsort(descending=True, stable=True)
    return linalg.Spectrum(u=found.u[:, order], values=found.values[order], v=found.v[:, order])
