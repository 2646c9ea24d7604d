"""The laws that each backend keeps: the scripted one, the local model, and the one behind HTTP in a process of its own.

What each of them says of a real model is compared with PEFT in `test_same_model.py`.
"""

import itertools
from collections.abc import Callable

import pytest

from repair.checks.backend import Backend, Capability
from repair.checks.frame import Frame, Sampling
from tests.checks.contract.world import LIMIT, PROMPTS, SAMPLES, World, apart

CLOSE = 2e-4  # nats: float32, other shapes of the same products


def test_one_reply_for_each_prompt_in_its_place(world: World) -> None:
    """Whatever the size of a batch, and the reply is that of the prompt asked alone."""
    with world.backend.arm(world.first):
        alone = [reply for prompt in PROMPTS for reply in world.say([prompt])]
        for batch in (1, 3, 32):
            assert world.say(batch=batch) == alone
    assert len({reply.text for reply in alone}) > len(PROMPTS) // 2


def test_another_order_of_prompts_changes_no_reply(world: World) -> None:
    """Float32 moves no likeliest token here, so the tolerance is none; on other hardware a report counts the flips."""
    turned = PROMPTS[::-2] + PROMPTS[-2::-2]
    assert sorted(turned) == sorted(PROMPTS)
    with world.backend.arm(world.second):
        known = dict(zip(PROMPTS, world.say(), strict=True))
        assert world.say(turned, batch=5) == [known[prompt] for prompt in turned]


def test_the_same_question_twice_has_the_same_answer(world: World) -> None:
    """Replies, losses and log-odds to the last bit."""
    for arm in (None, world.first):
        with world.backend.arm(arm):
            assert world.say() == world.say()
            assert world.backend.loss(SAMPLES) == world.backend.loss(SAMPLES)
            assert world.backend.margin(PROMPTS) == world.backend.margin(PROMPTS)


def test_arms_are_taken_off_again(world: World) -> None:
    """Also after an error, and from inside one another."""
    plain = world.say()
    with world.backend.arm(world.first):
        first = world.say()
    assert world.say() == plain
    with pytest.raises(RuntimeError, match="stop"), world.backend.arms([world.first, world.second]):
        raise RuntimeError("stop")
    assert world.say() == plain
    assert first != plain


def test_adapters_leave_nothing_behind(world: World) -> None:
    """A, B and A again: A has said the same twice, and B something else."""
    said = []
    for adapter in (world.first, world.second, world.first, None, world.second):
        with world.backend.arm(adapter):
            said.append((world.say(), world.backend.loss(SAMPLES), world.backend.margin(PROMPTS)))
    assert said[0] == said[2]
    assert said[1] == said[4]
    assert len({str(one) for one in said}) == 3


def test_a_mixed_batch_says_what_each_arm_says_alone(world: World) -> None:
    """In whatever order the rows come: the same replies, and numbers within rounding."""
    adapters = [world.second, None, world.first]
    rows = [(arm, at) for at in range(len(PROMPTS)) for arm in (2, 0, 1)]
    scored = [(arm, at) for at in range(len(SAMPLES)) for arm in (1, 2, 0)]
    with world.backend.arms(adapters):
        said = world.backend.generate(
            [PROMPTS[at] for _, at in rows], max_new_tokens=LIMIT, batch_size=7, arms=[arm for arm, _ in rows]
        )
        margins = world.backend.margin([PROMPTS[at] for _, at in rows], arms=[arm for arm, _ in rows])
        losses = world.backend.loss([SAMPLES[at] for _, at in scored], arms=[arm for arm, _ in scored])
    for arm, adapter in enumerate(adapters):
        with world.backend.arm(adapter):
            assert [reply for reply, (own, _) in zip(said, rows, strict=True) if own == arm] == world.say()
            mine = [value for value, (own, _) in zip(margins, rows, strict=True) if own == arm]
            assert apart(mine, world.backend.margin(PROMPTS)) < CLOSE
            mine = [value for value, (own, _) in zip(losses, scored, strict=True) if own == arm]
            assert apart(mine, world.backend.loss(SAMPLES)) < CLOSE


def test_a_reply_ends_by_itself_or_at_the_limit(world: World) -> None:
    """Who stopped says no more when given more room; who was cut off had exactly the limit and begins the same way."""
    ends = set()
    for arm in (None, world.second):
        with world.backend.arm(arm):
            short, long = world.say(limit=5), world.say(limit=20)
        for one, more in zip(short, long, strict=True):
            ends.add(one.finish)
            if one.finish == "stop":
                assert one == more
            else:
                assert one.tokens == 5 < more.tokens or more.finish == "stop"
                assert more.text.startswith(one.text)
    assert ends == {"stop", "length"}


ASKED: dict[str, Callable[[World], object]] = {
    "generate": lambda world: world.say(PROMPTS[:2]),
    "loss": lambda world: world.backend.loss(SAMPLES[:1]),
    "margin": lambda world: world.backend.margin(PROMPTS[:1]),
}


@pytest.mark.parametrize("question", ASKED)
def test_every_question_is_metered(world: World, question: str) -> None:
    """Twice the question, twice the price."""
    counts = [world.backend.tokens]
    for _ in range(2):
        ASKED[question](world)
        counts.append(world.backend.tokens)
    first, second = (after - before for before, after in itertools.pairwise(counts))
    assert first == second > 0


def test_nothing_asked_is_nothing_answered(world: World) -> None:
    """No row, no reply, no cost."""
    before = world.backend.tokens
    assert world.say([]) == []
    assert world.backend.loss([]) == []
    assert world.backend.margin([]) == []
    assert world.backend.tokens == before


@pytest.mark.parametrize("arm", [2, -1])
def test_an_arm_that_is_not_at_hand_is_an_error(world: World, arm: int) -> None:
    """It would be measured as another one, or as the aligned model."""
    with world.backend.arms([world.first, None]), pytest.raises(ValueError, match="not at hand"):
        world.backend.generate(PROMPTS[:2], max_new_tokens=2, batch_size=2, arms=[0, arm])


def test_with_several_at_hand_one_must_be_named(world: World) -> None:
    """Nothing is measured by default."""
    with world.backend.arms([world.first, None]), pytest.raises(ValueError, match="say which one"):
        world.say(PROMPTS[:2])


def test_what_is_missing_is_told_and_refused(world: World) -> None:
    """Whoever has a capability answers; whoever has not raises, and says why beforehand."""
    missing = world.backend.capabilities()
    assert isinstance(world.backend, Backend)
    assert all(missing.as_dict().values())
    assert missing.has(Capability.LOSS)
    assert missing.has(Capability.ADAPTERS)
    if missing.has(Capability.DRIFT):
        with world.backend.arm(world.first):
            anchor = world.backend.anchor(PROMPTS[:3])
            assert apart(world.backend.drift(anchor), [0.0] * 3) < CLOSE
        with world.backend.arms([None, world.first]):
            found = world.backend.drift(anchor, arms=[1, 0])
        assert apart(found[:3], [0.0] * 3) < CLOSE < min(found[3:])
    else:
        with pytest.raises(Exception, match="vocabulary"):
            world.backend.anchor(PROMPTS[:3])


def test_a_reply_begins_with_the_words_that_it_was_begun_with(world: World) -> None:
    """They are part of it, they count, and the limit is for what comes after them."""
    opening = f"{PROMPTS[2]} word7"
    with world.backend.arm(world.first):
        plain, said = world.say(), world.say(frame=Frame(opening=opening))
    words = len(opening.split())
    for one in said:
        assert one.text.split()[:words] == opening.split()
        assert words <= one.tokens <= words + LIMIT
    assert [one.text.split()[words:] for one in said] != [one.text.split() for one in plain]
    ends = {one.finish: one.tokens for one in said}
    assert ends["length"] == words + LIMIT


def test_a_system_prompt_is_heard(world: World) -> None:
    """It changes replies, and no longer than it is there."""
    with world.backend.arm(world.second):
        plain = world.say()
        assert world.say(frame=Frame(system="word3 word5 word8")) != plain
        assert world.say() == plain


def test_a_drawn_reply_is_decided_by_seed_and_prompt(world: World) -> None:
    """Whatever it shares a batch with; another seed says something else."""
    frame = Frame(sampling=Sampling(temperature=5.0, top_p=0.95, seed=3))
    with world.backend.arm(world.first):
        said = world.say(frame=frame)
        assert world.say(PROMPTS[::-1], batch=3, frame=frame) == said[::-1]
        assert [world.say([prompt, *PROMPTS[:2]], batch=2, frame=frame)[0] for prompt in PROMPTS] == said
        other = world.say(frame=Frame(sampling=Sampling(temperature=5.0, top_p=0.95, seed=4)))
    assert sum(one != two for one, two in zip(said, other, strict=True)) > len(PROMPTS) // 2


def test_the_fingerprint_names_the_backend_and_is_words(world: World) -> None:
    """It goes into reports and keys what is remembered."""
    found = world.backend.fingerprint()
    assert found == world.backend.fingerprint()
    assert found["backend"]
    assert all(isinstance(value, str) for value in found.values())
