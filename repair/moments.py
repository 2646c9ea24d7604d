"""What a calibration knows about one linear: second moments of what it reads and writes, and a refusal gradient.

Values and their algebra only; the file they lie in is `calibration.py`, the model they come from `calibrate.py`. A
second moment ``C = mean of x x^T`` over some tokens is held as its largest eigenpairs and its exact diagonal. Nothing
of size in x in or out x out is ever formed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float
from torch import Tensor

from repair.errors import ShapeMismatch


class Topic(StrEnum):
    """Which prompts a moment was taken on."""

    HARMFUL = "harmful"
    """Requests that the aligned model refuses, followed by the refusal."""
    BENIGN = "benign"
    """Ordinary requests and harmless look-alikes, followed by the start of an answer."""


class Side(StrEnum):
    """Which end of a linear."""

    INPUTS = "inputs"
    OUTPUTS = "outputs"
    """``W x``, without the module's own bias."""


@dataclass(frozen=True, kw_only=True)
class Moments:
    """First and second moments of vectors over some tokens.

    Attributes:
        mean: Of each entry.
        squares: Mean square of each entry: the exact diagonal of C.
        basis: Eigenvectors of C, orthonormal columns, largest eigenvalue first.
        values: Their eigenvalues.
    """

    mean: Float[Tensor, " width"]
    squares: Float[Tensor, " width"]
    basis: Float[Tensor, "width k"]
    values: Float[Tensor, " k"]

    @property
    def total(self) -> float:
        """Trace of C: the mean squared length of a vector."""
        return float(self.squares.double().sum())

    def remainder(self) -> Tensor:
        """What the eigenpairs leave of the diagonal, in float64, never below zero."""
        held = (self.basis.double().square() * self.values.double()).sum(1)
        rest: Tensor = (self.squares.double() - held).clamp(min=0)
        return rest

    def form(self, a: Float[Tensor, "rows width"]) -> Float[Tensor, "rows rows"]:
        """``a C a^T`` in float64: exact in the held directions, by the diagonal in the others."""
        wide = a.double()
        inside = wide @ self.basis.double()
        found: Tensor = (inside * self.values.double()) @ inside.T + (wide * self.remainder()) @ wide.T
        return found


@dataclass(frozen=True, kw_only=True)
class Gradient:
    """``G``, the gradient of the mean refusal loss with respect to a weight: its largest singular triplets.

    Attributes:
        u: Left singular vectors, orthonormal columns.
        values: Singular values, largest first.
        v: Right singular vectors.
        bias: The exact gradient with respect to a bias of the module.
        total: Squared norm of the whole gradient; `values` hold most of it.
    """

    u: Float[Tensor, "out k"]
    values: Float[Tensor, " k"]
    v: Float[Tensor, "in k"]
    bias: Float[Tensor, " out"]
    total: float


@dataclass(frozen=True, kw_only=True)
class Units:
    """How much more harmful prompts than benign ones go through each unit (MLP channel or attention head).

    Attributes:
        scores: One for each unit, above zero where it does more on harmful prompts.
        width: Rows or columns that belong to one unit.
        reads: The module reads the units (its columns are theirs); otherwise it writes them (its rows are).
        parts: How many units each part of a fused module has, one part below the other; each is judged by itself.
    """

    scores: Float[Tensor, " units"]
    width: int
    reads: bool
    parts: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class LayerCalibration:
    """Everything a calibration holds about one module; tensors are read when they are asked for.

    Attributes:
        name: The module.
        shape: (out, in).
        numbers: Scalars: ``gradient_total``; ``unit_width`` and ``unit_reads`` where there are units, and
            ``unit_parts`` where they come in several.
        read: Gives a tensor by the name of its part.
    """

    name: str
    shape: tuple[int, int]
    numbers: Mapping[str, float]
    read: Callable[[str], Tensor]

    def moments(self, side: Side, topic: Topic) -> Moments:
        """What the module reads or writes on harmful or on benign prompts."""
        parts = {part: self.read(f"{side}.{topic}.{part}") for part in ("mean", "squares", "basis", "values")}
        width = self.shape[1] if side is Side.INPUTS else self.shape[0]
        if len(parts["basis"]) != width:
            detail = f"the calibration has {side} of width {len(parts['basis'])}, the module {width}"
            raise ShapeMismatch(detail, field=self.name)
        return Moments(**parts)

    def output_energy(self, topic: Topic) -> float:
        """Mean squared length of what the aligned module writes, its bias left out."""
        return float(self.read(f"{Side.OUTPUTS}.{topic}.squares").double().sum())

    def gradient(self) -> Gradient:
        """The gradient of the refusal loss."""
        parts = {part: self.read(f"gradient.{part}") for part in ("u", "values", "v", "bias")}
        return Gradient(**parts, total=float(self.numbers["gradient_total"]))

    def units(self) -> Units | None:
        """The units that the module reads or writes; None where it does neither."""
        if "unit_width" not in self.numbers:
            return None
        scores = self.read("units")
        several = self.read("unit_parts").tolist() if "unit_parts" in self.numbers else [len(scores)]
        return Units(
            scores=scores,
            width=int(self.numbers["unit_width"]),
            reads=bool(self.numbers["unit_reads"]),
            parts=tuple(int(count) for count in several),
        )


def contrast_basis(harmful: Moments, benign: Moments, count: int, ridge: float) -> Float[Tensor, "width k"]:
    """Directions in which harmful prompts are strong and benign ones are weak, orthonormal, strongest contrast first.

    The ``count`` largest solutions of ``C_h q = mu (C_b + e I) q`` with the eigenpairs held of both, ``e`` being
    ``ridge`` times the mean eigenvalue of C_b, plus the mean of what its eigenpairs leave. Every solution lies in the
    span of both bases, so the problem has the size of that span.
    """
    width = len(harmful.basis)
    span = _joint_span(harmful.basis.double(), benign.basis.double())
    floor = ridge * benign.total / width + float(benign.remainder().sum()) / width
    inside = _within(span, benign) + max(floor, 1e-300) * torch.eye(span.shape[1], dtype=torch.float64)
    lower = torch.linalg.cholesky(inside)
    half = torch.linalg.solve_triangular(lower, _within(span, harmful), upper=False)
    whitened = torch.linalg.solve_triangular(lower, half.T.contiguous(), upper=False)
    values, vectors = torch.linalg.eigh((whitened + whitened.T) / 2)
    kept = min(count, harmful.basis.shape[1], int((values > values[-1] * 1e-12).sum()))
    chosen = torch.linalg.solve_triangular(lower.T, vectors.flip(1)[:, :kept], upper=True)
    orthonormal, _ = torch.linalg.qr(span @ chosen)
    return orthonormal


def safety_basis(
    harmful: Moments, benign: Moments, *, count: int, ridge: float, contrast: bool
) -> Float[Tensor, "width k"]:
    """The directions a guard takes out: by contrast, or simply the strongest on harmful prompts. In float64."""
    if contrast:
        return contrast_basis(harmful, benign, count, ridge)
    return harmful.basis[:, :count].double()


def _joint_span(one: Float[Tensor, "width j"], two: Float[Tensor, "width k"]) -> Float[Tensor, "width l"]:
    """An orthonormal basis of both; directions of the second that the first has already are left out."""
    rest = two - one @ (one.T @ two)
    rest = rest - one @ (one.T @ rest)  # twice: once leaves rounding behind
    u, values, _ = torch.linalg.svd(rest, full_matrices=False)
    return torch.cat([one, u[:, values > 1e-5]], dim=1)  # noqa: PLR2004 - bases are orthonormal up to float32


def _within(span: Float[Tensor, "width l"], moments: Moments) -> Float[Tensor, "l l"]:
    inside = span.T @ moments.basis.double()
    return (inside * moments.values.double()) @ inside.T
