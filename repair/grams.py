"""Gram matrices of factors, remembered while the factors live.

Every candidate for one adapter asks how large the upload is, and most of them how it relates to one projection. Those
Grams are r x r, their factors are long: what was found once is kept for as long as the factors live and nobody changes
one in place.
"""

import weakref
from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor

_Key = tuple[int, int, bool]
_Held = tuple[weakref.ref[Tensor], weakref.ref[Tensor], tuple[int, int], Tensor]
_known: dict[_Key, _Held] = {}


def gram(x: Float[Tensor, "rows left"], y: Float[Tensor, "rows right"]) -> Float[Tensor, "left right"]:
    """``x.T @ y``, summed in float64; for the same two tensors the same result, not to be changed."""
    return _remembered(x, y, turned=False)


def row_gram(a: Float[Tensor, "rank in"]) -> Float[Tensor, "rank rank"]:
    """``a @ a.T``, likewise."""
    return _remembered(a, a, turned=True)


def _remembered(x: Tensor, y: Tensor, *, turned: bool) -> Tensor:
    if x.is_inference() or y.is_inference():  # torch does not count what is done to them
        return _product(x.T, y.T) if turned else _product(x, y)
    key, changes = (id(x), id(y), turned), (x._version, y._version)  # noqa: SLF001 - its notes on autograd name this counter
    held = _known.get(key)
    if held is not None and held[0]() is x and held[1]() is y and held[2] == changes:
        return held[3]
    found = _product(x.T, y.T) if turned else _product(x, y)
    forget = _forgetting(key)
    _known[key] = weakref.ref(x, forget), weakref.ref(y, forget), changes, found
    return found


def _forgetting(key: _Key) -> Callable[[weakref.ref[Tensor]], object]:
    return lambda _dead: _known.pop(key, None)


def _product(x: Tensor, y: Tensor) -> Tensor:
    wide = x.double()
    same = x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype
    return wide.T @ (wide if same else y.double())  # widening costs more than the product
