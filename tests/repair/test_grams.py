"""Grams against the definition, on their first and every later request; what is remembered goes with its factors."""

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from repair import grams
from repair.grams import gram, row_gram
from tests import tiny


def factor(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(31, 4, generator=tiny.generator(seed)).to(dtype)


def in_place(x: Tensor) -> list[Callable[[], Tensor]]:
    return [lambda: x.mul_(2), lambda: x[3:5].fill_(0), lambda: x.detach().add_(1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_grams_are_the_sums_of_products(dtype: torch.dtype) -> None:
    """In float64, for one factor, for two, from either side; the second request answers what the first did."""
    x, y = factor(0, dtype), factor(1, dtype)
    wide, other = x.double(), y.double()
    pairs = [
        (gram, (x, y), torch.einsum("ij,ik->jk", wide, other)),
        (gram, (x, x), torch.einsum("ij,ik->jk", wide, wide)),
        (gram, (y, x), torch.einsum("ij,ik->jk", other, wide)),
        (row_gram, (x,), torch.einsum("ij,kj->ik", wide, wide)),
    ]
    for ask, given, wanted in pairs:
        first = ask(*given)
        torch.testing.assert_close(first, wanted, rtol=1e-13, atol=1e-13)
        assert ask(*given) is first


def test_what_is_remembered_goes_with_the_factors() -> None:
    """Nothing of a factor that is gone stays, whichever of the two goes first."""
    gc.collect()
    before = len(grams._known)
    x, y = factor(0), factor(1)
    gram(x, y), gram(x, x), row_gram(y)
    assert len(grams._known) == before + 3
    del y
    assert len(grams._known) == before + 1
    del x
    assert len(grams._known) == before


def test_another_factor_never_gets_what_is_not_its_own() -> None:
    """Factors that come and go are given the places in memory of those before them."""
    places = set()
    for seed in range(50):
        x = factor(seed)
        places.add(id(x))
        torch.testing.assert_close(gram(x, x), x.double().T @ x.double())
    assert len(places) < 50


def test_a_factor_that_was_changed_is_asked_again() -> None:
    """By itself, through a view of it, or where torch keeps no count of changes."""
    x = factor(0)
    for change in in_place(x):
        assert gram(x, x) is gram(x, x)
        change()
        torch.testing.assert_close(gram(x, x), x.double().T @ x.double())
        torch.testing.assert_close(row_gram(x), x.double() @ x.double().T)
    with torch.inference_mode():
        y = factor(1).clone()
        gram(y, y)
        y.mul_(2)
        torch.testing.assert_close(gram(y, y), y.double().T @ y.double())
