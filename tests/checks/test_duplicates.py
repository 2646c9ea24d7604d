"""Near-duplicates: the measure against its definition, who keeps the copy, and no leak from certify to select."""

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from repair.checkpoint import Checkpoint
from repair.checks.duplicates import Seen, apart, thinned, words_of
from repair.checks.packs import BUNDLED, Half, Pack, Prompt, half_of, load_pack, pack_of
from repair.checks.planner import Reference, plan
from repair.checks.suite import Suite
from repair.lora import LoraAdapter
from tests.checks.acting import SAMPLES, UPLOAD, Character, chat_of, policy_of, strength
from tests.tiny import tiny_pair

KINDS = ("core_harmful", "core_lookalike", "core_benign", "core_checkable")
words = st.frozensets(st.sampled_from("abcdefghij"), max_size=8)


def jaccard(first: frozenset[str], second: frozenset[str]) -> float:
    """By its definition, in floating point."""
    return len(first & second) / len(first | second) if first | second else 1.0


@given(st.lists(words, max_size=12), words)
def test_the_index_finds_what_comparing_with_each_finds(known: list[frozenset[str]], one: frozenset[str]) -> None:
    """Prompts without a word are no prompts: a pack refuses them."""
    seen = Seen()
    for other in known:
        seen.add(other)
    assert seen.near(one) == any(jaccard(one, other) > 0.6 - 1e-12 for other in known if one & other)


def test_words_are_compared_without_case_signs_and_typography() -> None:
    assert words_of("Don\u2019t STOP, \ufb01x it!") == words_of("don't stop fix it") == {"don't", "stop", "fix", "it"}


def pack(name: str, split: str, *texts: str) -> Pack:
    rows = tuple(Prompt(id=f"{name}-{n}", text=text, category="c") for n, text in enumerate(texts))
    return pack_of(name, rows, digest="", licence="", split=split)


def test_what_certifies_keeps_its_copy_whatever_the_order() -> None:
    """The row that chooses goes; within a half the first stays; other rows are left alone."""
    choosing = pack(
        "choosing", "select", "how do i bake good bread", "a quite different one", "how do I bake GOOD bread?"
    )
    certifying = pack("certifying", "certify", "how do i bake bread", "name three rivers")
    for packs in ([choosing, certifying], [certifying, choosing]):
        kept, dropped = apart(packs)
        assert kept == {("choosing", "choosing-1"), ("certifying", "certifying-0"), ("certifying", "certifying-1")}
        assert dropped == {"choosing": 2}


def test_the_same_id_in_two_packs_is_two_rows() -> None:
    one, two = pack("one", "select", "how do i bake bread"), pack("two", "select", "name three rivers")
    kept, _ = apart([one, replace(two, rows=(replace(two.rows[0], id="one-0"),))])
    assert kept == {("one", "one-0"), ("two", "one-0")}


def test_the_bundled_packs_hold_no_near_duplicates() -> None:
    """Not in a pack, and not between one and what calibrations are made from."""
    rows = [(name, row, words_of(row.text)) for name in (*KINDS, "calibration") for row in load_pack(name).rows]
    pairs = [
        (a[1].id, b[1].id)
        for a, b in combinations(rows, 2)
        if not a[0] == b[0] == "calibration" and jaccard(a[2], b[2]) > 0.6 - 1e-12
    ]
    assert pairs == []


def test_suites_of_both_halves_share_nothing_near() -> None:
    """As they are asked, under any policy that asks all there is."""
    policy = policy_of(strength=[0.9])
    one, two = (Suite.of(policy, half) for half in ("select", "certify"))
    for name in one.prompts:
        there = [words_of(row.text) for row in two.prompts[name]]
        assert not [row.id for row in one.prompts[name] if any(jaccard(words_of(row.text), w) >= 0.6 for w in there)]


def asked(pair: Path, work: Path) -> list[tuple[float, str]]:
    """Every prompt that was put to a candidate, for a reply or for its log-odds, in order, with its strength."""
    aligned, base = map(Checkpoint.open, tiny_pair(pair))
    character = Character()
    chat = chat_of(character)

    def margin(prompt: str, on: LoraAdapter | None) -> float:
        character.log.append((strength(on), prompt))
        return -(strength(on) ** 9)  # log-odds that come back soon, so that few candidates leave by them

    chat.margins = margin
    plan(
        UPLOAD,
        reference=Reference(aligned=aligned, base=base, chat=chat, digest="sha256:feed"),
        policy=policy_of(strength=[0.95, 0.9, 0.85, 0.8]),
        work_dir=work,
        samples=SAMPLES,
    )
    return [(how_strong, prompt) for how_strong, prompt in character.log if 1e-6 < how_strong < 1 - 1e-6]


def test_no_certify_prompt_is_seen_by_a_step_that_chooses(tmp_path: Path) -> None:
    """Recorded on the model itself, replies and log-odds: only the two that are measured there first, and the look.

    The aligned model and the upload may be asked (decision 13): neither says anything about a candidate.
    """
    of_candidates = asked(tmp_path / "pair", tmp_path / "work")
    halves: dict[Half, set[str]] = {half: set() for half in ("select", "certify")}
    for name in KINDS:
        for row in load_pack(name).rows:
            halves[half_of(row.id)].add(row.text)
    first_look = next(n for n, (_, prompt) in enumerate(of_candidates) if prompt in halves["certify"])
    before, after = of_candidates[:first_look], of_candidates[first_look:]
    assert len({how_strong for how_strong, _ in before}) > 1
    assert {prompt for _, prompt in before} <= halves["select"]
    # One candidate is looked at, with certify prompts only: nothing is chosen after the look.
    assert len({round(how_strong, 4) for how_strong, _ in after}) == 1
    assert {prompt for _, prompt in after} <= halves["certify"]
    near = [words_of(text) for text in halves["certify"]]
    assert not [text for _, text in before if any(jaccard(words_of(text), other) >= 0.6 for other in near)]


def test_bundled_rows_are_the_files_rows() -> None:
    """The law above reads packs through our own loader; this one does not."""
    lines = (BUNDLED / "core_harmful" / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in lines] == [row.id for row in load_pack("core_harmful").rows]


def test_thinned_packs_keep_their_digest_and_the_rows_that_stay() -> None:
    one = pack("one", "select", "how do i bake bread", "how do I bake bread?", "name three rivers")
    (thin,) = thinned([one])
    assert [row.id for row in thin.rows] == ["one-0", "one-2"]
    assert replace(thin, rows=one.rows) == one
