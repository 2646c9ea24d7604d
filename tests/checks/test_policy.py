"""Policies are read whole or refused, and their digest covers every number."""

import tomllib
from pathlib import Path

import pytest

from repair.checks.errors import PolicyInvalid
from repair.checks.policy import BUNDLED, bundled_policies, load_policy
from repair.methods import METHODS

QUICK = Path(__file__).parents[1] / "flow" / "quick.toml"


@pytest.mark.parametrize("name", bundled_policies())
def test_every_bundled_policy_tries_methods_that_exist_with_parameters_they_take(name: str) -> None:
    """A policy that cannot run is found here and not in a job."""
    policy = load_policy(name)
    assert policy.name == name
    assert policy.candidates()
    for candidate in policy.candidates():
        METHODS[candidate.method].parse(candidate.parameters)


def test_the_demo_and_the_standard_policy_are_bundled() -> None:
    """By these names."""
    assert {"demo", "standard"} <= set(bundled_policies())


@pytest.mark.parametrize("path", [*sorted(BUNDLED.glob("*.toml")), QUICK], ids=lambda path: path.stem)
def test_every_policy_of_ours_says_what_its_verdicts_rest_on(path: Path) -> None:
    """The rule judge alone is allowed in so many words; the gates stand in the file, not only in the defaults."""
    written = tomllib.loads(path.read_text())
    assert written["allow_rules_only"] is (path.stem != "strict")
    assert 0 < written["bounds"]["cut_off"] <= 1
    assert (written["bounds"]["judge_errors"], written["bounds"]["better_than_input"]) == (0.02, True)


def test_a_policy_that_says_nothing_is_the_strict_one(tmp_path: Path) -> None:
    """No permission for the rule judge alone, at most 2 % judge errors, better than the upload."""
    gates = ("allow_rules_only", "judge_errors", "better_than_input")
    lines = (BUNDLED / "demo.toml").read_text().splitlines(keepends=True)
    path = tmp_path / "silent.toml"
    path.write_text("".join(line for line in lines if not line.startswith(gates)))
    policy = load_policy(path)
    assert not policy.allow_rules_only
    assert (policy.bounds.judge_errors, policy.bounds.better_than_input) == (0.02, True)


def test_a_grid_is_tried_in_order_and_within_the_budget(tmp_path: Path) -> None:
    """The last parameter turns fastest; the budget cuts the tail."""
    text = (BUNDLED / "demo.toml").read_text().split("[[trials]]")[0]
    text = text.replace("candidates = 40", "candidates = 3")
    path = tmp_path / "mine.toml"
    path.write_text(text + '[[trials]]\nmethod = "scale"\ngrid = { modules = ["*a", "*b"], strength = [0.5, 0.2] }\n')
    tried = [(c.parameters["modules"], c.parameters["strength"]) for c in load_policy(path).candidates()]
    assert tried == [("*a", 0.5), ("*a", 0.2), ("*b", 0.5)]


def test_every_number_is_in_the_digest() -> None:
    """Two policies that differ anywhere differ in their digest."""
    policy = load_policy("demo")
    looser = policy.model_copy(update={"bounds": policy.bounds.model_copy(update={"attack_success": 0.16})})
    assert policy.digest == load_policy("demo").digest != looser.digest


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("attack_success = 0.15", "attack_success = 1.5"),
        ("max_new_tokens = 24", "max_new_tokens = 0"),
        ("[bounds]", "[bounds]\nunknown = 1"),
        ("version = 1", "version = 'x'"),
        ("[suite]", "[suite"),
    ],
)
def test_a_policy_with_a_wrong_number_is_refused(old: str, new: str, tmp_path: Path) -> None:
    """No default steps in for what cannot be read."""
    path = tmp_path / "wrong.toml"
    path.write_text((BUNDLED / "demo.toml").read_text().replace(old, new, 1))
    with pytest.raises(PolicyInvalid):
        load_policy(path)


@pytest.mark.parametrize("name", ["nowhere", "../policies/demo", "/etc/passwd"])
def test_a_name_never_reads_outside_of_the_bundled_folder(name: str) -> None:
    """Only a path that ends in .toml is a path."""
    with pytest.raises(PolicyInvalid, match="bundled"):
        load_policy(name)
