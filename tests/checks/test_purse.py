"""What choosing may still cost."""

from hypothesis import given
from hypothesis import strategies as st

from repair.checks.purse import Purse

steps = st.lists(st.tuples(st.integers(1, 500), st.integers(0, 16)), max_size=30)


@given(steps, st.floats(100, 5000), st.sampled_from([0.5, 2 / 3, 1.0]))
def test_who_stops_when_broke_stays_within_what_may_be_spent(
    taken: list[tuple[int, int]], limit: float, share: float
) -> None:
    """As long as no step is dearer than the dearest before it."""
    purse = Purse(limit=limit, share=share)
    dearest = max((tokens for tokens, _ in taken), default=0)
    purse.dearest = dearest
    for tokens, prompts in taken:
        if purse.broke:
            break
        purse.pay(tokens, prompts=prompts)
        assert purse.spent <= limit * share
        assert purse.dearest == dearest
    assert 0 <= purse.used <= 1


def test_a_look_is_priced_by_its_prompts() -> None:
    """At the dearest price so far, so that a short look may still be taken where a long one may not."""
    purse = Purse(limit=100.0)
    purse.pay(40, prompts=4)
    purse.pay(18, prompts=2)
    assert purse.affords(4)
    assert not purse.affords(5)
    assert not purse.broke
    purse.pay(10)
    assert purse.broke
    assert purse.affords(3)
    assert purse.exhausted() == "the 100 forward tokens that choosing may cost were spent"
