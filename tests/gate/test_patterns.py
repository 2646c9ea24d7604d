"""Patterns of a config: the answers of `re`, in linear time, and never one that could hang another engine."""

import re
import string

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gate.pattern import Budget, SafePattern
from gate.pattern_cost import MAX_WAYS, ways
from gate.pattern_syntax import PatternError, parse

# As unsloth writes it into real adapters.
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj)))"
)
REAL = [
    UNSLOTH,
    r".*\.(q_proj|v_proj)",
    r".*(q_proj|k_proj|v_proj|o_proj)$",
    r"model\.layers\.(1[0-9]|2[0-3])\..*(q|k|v)_proj",
    r".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$",
    r"^model\.layers\.\d+\.self_attn\.[qv]_proj",
    r".*\.layers\.[0-9]{1,2}\.mlp\.(gate|up|down)_proj",
    r"(?:.*\.)?mlp\.\w+",
]
NAMES = [
    "model.language_model.layers.0.self_attn.q_proj",
    "model.layers.12.self_attn.k_proj",
    "model.layers.3.mlp.up_proj",
    "decoder.block.1.layer.0.SelfAttention.q",
    "lm_head",
    "",
]
BOMBS = [
    "(a+)+$",
    "(a*)*b",
    "(a|aa)+$",
    "(([a-z._]+)*[0-9]*)+!",
    "(.|[a-z])" * 40 + "!",
    "(ab|a)(bc|c)?" * 30,
    "a?" * 30 + "a" * 30,
    ".*.*.*.*.*x",
    ".*[a-z].*[a-z].*[a-z].*!",
    r"\w*\d*\w*\d*\w*!",
    "(.*a){12}",
    "(?:a{0,30}){0,30}b",
    "[a-z]{1,60}" * 4,
]
FORBIDDEN = [
    "", "(?=a)b", "(?!a)b", "(?<=a)b", "(?i)a", "(?P<x>a)", r"(a)\1", r"a\Z", r"\B", r"\x41", "a**", "a*+", "a++",
    "a{2}{3}",
    "^*", "(a", "a)", "[a", "[]", "[z-a]", r"[\d-z]", "[[a]]", "a{", "a{,}", "a{3,1}", "a{1000}", "*a", "|*", "ü",
    "a\nb",
    "(" * 40 + "a" + ")" * 40, "a" * 5000, "[a&&b]", "a]",
]  # fmt: skip


@pytest.mark.parametrize("text", REAL)
@pytest.mark.parametrize("name", NAMES)
def test_patterns_in_use_match_as_in_python(text: str, name: str) -> None:
    """What real adapters contain is accepted, with the answer of `re.fullmatch`."""
    assert SafePattern(text).matches(name) == bool(re.fullmatch(text, name))


@pytest.mark.parametrize("text", BOMBS)
def test_bombs_are_refused(text: str) -> None:
    """None of them may reach an engine that backtracks."""
    with pytest.raises(PatternError):
        SafePattern(text)


@pytest.mark.parametrize("text", FORBIDDEN)
def test_the_rest_of_the_syntax_is_refused(text: str) -> None:
    """By a PatternError, whatever it is."""
    with pytest.raises(PatternError):
        SafePattern(text)


ATOM = st.sampled_from(
    ["a", "b", "_", r"\.", ".", "[ab]", "[^a]", r"\d", r"\w", "[a-c_]", r"\W", "1", r"[\d.]", "[-a]"]
)
QUANTIFIER = st.sampled_from(["", "", "", "*", "+", "?", "*?", "+?", "??", "{2}", "{1,2}", "{0,3}", "{,2}", "{2,}"])
PIECE = st.tuples(ATOM, QUANTIFIER).map("".join) | st.sampled_from(["^", "$", r"\b"])


def _grouped(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    branches = st.lists(inner, min_size=1, max_size=3).map("|".join)
    group = st.tuples(st.sampled_from(["({})", "(?:{})", "({})?"]), branches).map(lambda pair: pair[0].format(pair[1]))
    return st.lists(inner | group, min_size=1, max_size=3).map("".join)


PATTERN = st.recursive(PIECE, _grouped, max_leaves=8)
SUBJECT = st.text("ab_.1-c", max_size=8)


@settings(max_examples=250, suppress_health_check=list(HealthCheck))
@given(PATTERN, st.lists(SUBJECT, min_size=1, max_size=6))
def test_accepted_patterns_mean_what_they_mean_to_python(text: str, subjects: list[str]) -> None:
    """The automaton and `re` agree on the whole accepted syntax, as a whole pattern and below any parent."""
    try:
        whole, below = SafePattern(text), SafePattern(text, below_any_parent=True)
    except PatternError:
        assume(False)
        return
    for subject in subjects:
        assert whole.matches(subject) == bool(re.fullmatch(text, subject))
        assert below.matches(subject) == bool(re.match(rf"(.*\.)?({text})$", subject))


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(st.text(string.printable, max_size=12))
def test_any_text_is_compiled_or_refused(text: str) -> None:
    """Nothing but PatternError; and what is accepted, Python accepts too."""
    try:
        SafePattern(text)
    except PatternError:
        return
    re.compile(text)


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(PATTERN, st.integers(1, 60))
def test_matching_is_linear(text: str, length: int) -> None:
    """At each character no state is visited more often than once or twice, whatever the pattern."""
    try:
        pattern = SafePattern(text)
    except PatternError:
        assume(False)
        return
    for subject in ("a" * length, "a." * length, "ab_1" * length):
        before = pattern.budget.left
        pattern.matches(subject)
        assert before - pattern.budget.left <= len(pattern._states) * (len(subject) + 1)


def backtracking_steps(text: str, subject: str) -> int:
    """How many ways of matching a naive backtracking engine tries: every path through the tree."""
    steps = 0

    def walk(nodes: tuple[object, ...], at: int) -> None:
        nonlocal steps
        steps += 1
        if not nodes or steps > MAX_WAYS * 100:
            return
        node, rest = nodes[0], nodes[1:]
        kind = type(node).__name__
        if kind == "Chars":
            if at < len(subject) and node.mask >> ord(subject[at]) & 1:  # type: ignore[attr-defined]
                walk(rest, at + 1)
        elif kind == "Assertion":
            walk(rest, at)
        elif kind == "Sequence":
            walk((*node.items, *rest), at)  # type: ignore[attr-defined]
        elif kind == "Choice":
            for branch in node.branches:  # type: ignore[attr-defined]
                walk((branch, *rest), at)
        else:
            high = len(subject) if node.high is None else node.high  # type: ignore[attr-defined]
            for count in range(node.low, high + 1):  # type: ignore[attr-defined]
                walk((*(node.item,) * count, *rest), at)  # type: ignore[attr-defined]

    walk((parse(text),), 0)
    return steps


@settings(max_examples=300, suppress_health_check=list(HealthCheck))
@given(PATTERN, st.sampled_from(["aaaaaaaa", "abababab", "a.b.a.b.", "a1_a1_a1"]))
def test_the_cost_bound_holds(text: str, subject: str) -> None:
    """A naive engine needs at most `ways` attempts, each as long as pattern and subject together."""
    try:
        bound = ways(parse(text))
    except PatternError:
        assume(False)
        return
    assert backtracking_steps(text, subject) <= bound * 16 * (len(subject) + len(text) + 2)


def test_words_that_begin_one_another_count_once_each() -> None:
    """A list of names is cheap; of two that share a beginning both may be tried."""
    assert ways(parse("(q_proj|k_proj|v_proj)")) == 1
    assert ways(parse("(gate|gate_proj|up)")) == 2
    assert ways(parse("(a|a|a)")) == 3


def test_a_shared_budget_ends() -> None:
    """Many patterns on many modules cannot keep us busy."""
    pattern = SafePattern("[ab]*c[ab]*", budget=Budget(work=8))
    assert not pattern.matches("a")

    with pytest.raises(PatternError):
        pattern.matches("abcab")
