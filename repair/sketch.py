"""Sums of outer products, held as a few directions while they grow. Float64 on the CPU, whatever comes in.

While the vectors seen fit into the buffer the result is exact; beyond that the smallest directions are let go each
time the buffer fills, as in incremental SVD.
"""

from dataclasses import dataclass
from typing import Final

import torch
from jaxtyping import Float
from torch import Tensor

from repair.linalg import spectrum
from repair.moments import Gradient, Moments

_FOLDS: Final = 4  # the buffer holds this many times the directions that are kept
LEAST_BUFFER: Final = 256
"""Vectors that are held however few directions are kept of them."""
_NOISE: Final = 1e-6  # below this share of the largest, a direction is the rounding of a 32-bit model


class MomentSketch:
    """``mean of x x^T`` of vectors that arrive a few at a time."""

    def __init__(self, directions: int, least_buffer: int = LEAST_BUFFER) -> None:
        self._directions = directions
        self._buffer = max(least_buffer, _FOLDS * directions)
        self._rows: list[Tensor] = []
        self._held = 0
        self._seen = 0
        self._sum: Tensor | None = None
        self._squares: Tensor | None = None

    def add(self, rows: Float[Tensor, "tokens width"]) -> None:
        """Take in some vectors."""
        wide = rows.detach().double().cpu()
        self._sum = wide.sum(0) if self._sum is None else self._sum + wide.sum(0)
        squares = wide.square().sum(0)
        self._squares = squares if self._squares is None else self._squares + squares
        self._seen += len(wide)
        self._rows.append(wide)
        self._held += len(wide)
        if self._held > self._buffer:
            found = _largest(torch.cat(self._rows), self._buffer // 2)
            self._rows = [found.values.sqrt()[:, None] * found.basis.T]
            self._held = len(found.values)

    def finish(self) -> Moments:
        """The moments of all that was added."""
        if self._sum is None or self._squares is None:
            raise ValueError("nothing was added")
        found = _largest(torch.cat(self._rows), self._directions)
        return Moments(
            mean=self._sum / self._seen,
            squares=self._squares / self._seen,
            basis=found.basis,
            values=found.values / self._seen,
        )


class GradientSketch:
    """``sum of E^T X`` of factor pairs that arrive one after the other."""

    def __init__(self, directions: int, least_buffer: int = LEAST_BUFFER) -> None:
        self._directions = directions
        self._buffer = max(least_buffer, _FOLDS * directions)
        self._upstream: list[Tensor] = []
        self._inputs: list[Tensor] = []
        self._held = 0
        self._bias: Tensor | None = None
        self._let_go = 0.0

    @property
    def empty(self) -> bool:
        """Whether no token with a gradient was added."""
        return not self._held

    def add(self, upstream: Float[Tensor, "tokens out"], inputs: Float[Tensor, "tokens in"]) -> None:
        """Take in one pair; tokens without a gradient say nothing and are left out."""
        e, x = upstream.detach().double().cpu(), inputs.detach().double().cpu()
        self._bias = e.sum(0) if self._bias is None else self._bias + e.sum(0)
        live = e.abs().amax(1) > 0
        self._upstream.append(e[live])
        self._inputs.append(x[live])
        self._held += int(live.sum())
        if self._held > self._buffer:
            self._fold(self._buffer // 2)

    def finish(self) -> Gradient:
        """The largest singular triplets of the sum."""
        if self._bias is None:
            raise ValueError("nothing was added")
        found = spectrum(torch.cat(self._upstream).T, torch.cat(self._inputs))
        kept = min(self._directions, len(found.values))
        return Gradient(
            u=found.u[:, :kept],
            values=found.values[:kept],
            v=found.v[:, :kept],
            bias=self._bias,
            total=self._let_go + float(found.values.square().sum()),
        )

    def _fold(self, kept: int) -> None:
        found = spectrum(torch.cat(self._upstream).T, torch.cat(self._inputs))
        self._let_go += float(found.values[kept:].square().sum())
        root = found.values[:kept].sqrt()
        self._upstream, self._inputs = [(found.u[:, :kept] * root).T], [(found.v[:, :kept] * root).T]
        self._held = len(root)


@dataclass(frozen=True, kw_only=True)
class _Eigenpairs:
    """Orthonormal columns and their eigenvalues, largest first."""

    basis: Float[Tensor, "width k"]
    values: Float[Tensor, " k"]


def _largest(rows: Float[Tensor, "rows width"], count: int) -> _Eigenpairs:
    """The largest eigenpairs of ``rows^T rows``, through the smaller of the two Grams."""
    tall = rows.shape[0] > rows.shape[1]
    squares, vectors = torch.linalg.eigh(rows.T @ rows if tall else rows @ rows.T)
    values, vectors = squares.flip(0).clamp(min=0), vectors.flip(1)
    kept = max(1, min(count, int((values > values[0] * _NOISE**2).sum())))
    if tall:
        return _Eigenpairs(basis=vectors[:, :kept], values=values[:kept])
    basis, _ = torch.linalg.qr(rows.T @ vectors[:, :kept])
    return _Eigenpairs(basis=basis, values=values[:kept])
