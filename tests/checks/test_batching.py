"""Batches hold everything once, and never more than fits."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from repair.checks.batching import batches


@given(lengths=st.lists(st.integers(1, 300), max_size=60), rows=st.integers(1, 20), tokens=st.integers(1, 2000))
def test_every_row_once_and_never_too_many(lengths: list[int], rows: int, tokens: int) -> None:
    """Memory is bounded by the setting; only a row that is too long by itself goes beyond, and alone."""
    found = list(batches(lengths, rows=rows, tokens=tokens))
    assert sorted(place for batch in found for place in batch) == list(range(len(lengths)))
    for batch in found:
        padded = len(batch) * max(lengths[place] for place in batch)
        assert len(batch) <= rows
        assert padded <= tokens or len(batch) == 1


def test_like_lengths_share_a_batch() -> None:
    """So that little is padding."""
    assert list(batches([5, 100, 6, 99, 7], rows=3, tokens=1000)) == [[0, 2, 4], [3, 1]]


@pytest.mark.parametrize(("rows", "tokens"), [(0, 10), (10, 0)])
def test_no_room_is_an_error(rows: int, tokens: int) -> None:
    """Rather than an endless loop, or a batch of luck."""
    with pytest.raises(ValueError, match="no batch"):
        list(batches([1], rows=rows, tokens=tokens))
