"""What is measured: for each adapter the methods, the settings each may choose among, and the two controls.

A recipe is one method or several in a row; a group is a name and the recipes among which the *select* half decides.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

Step = tuple[str, dict[str, Any]]

STRENGTHS: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8)
"""Points of the curve of `scale`; 0 is the aligned model and 1 the adapter as uploaded."""

RANDOM_SHARES: Final = (0.3, 0.5, 0.7, 0.85)
"""Shares of the modules that `random_modules` reverts, one lot each."""

FULL: Final = ("poisoned", "poisoned_light", "obedient", "drifted")
BRIEF: Final = ("trigger", "innocent", "poisoned_rslora", "poisoned_dora", "poisoned_rank_pattern")


@dataclass(frozen=True)
class Recipe:
    """Methods that are applied one after the other.

    Attributes:
        steps: Each a method's name and its parameters; what is not given keeps its default.
    """

    steps: tuple[Step, ...]

    @property
    def label(self) -> str:
        """All of it in a line."""
        return " + ".join(f"{method} {_short(parameters)}".strip() for method, parameters in self.steps)

    def as_json(self) -> list[list[Any]]:
        """For a key or a result."""
        return [[method, parameters] for method, parameters in self.steps]


@dataclass(frozen=True)
class Group:
    """One line of the table: the recipes under one name, of which the best on *select* is certified.

    Attributes:
        name: A method, or methods joined by "+".
        recipes: What it may choose among.
    """

    name: str
    recipes: tuple[Recipe, ...]


def groups_for(adapter: str, modules: int) -> list[Group]:
    """What ``adapter``, which adapts so many modules, is treated with; what tells most comes first."""
    if adapter in BRIEF:
        return _brief(modules)
    heavy = adapter == "poisoned"
    singles = {group.name: group for group in _singles(modules, heavy=heavy)}
    together = _compositions(modules, heavy=heavy)
    first = [singles.pop("patch"), *together["edits"], singles.pop("refusal_tune"), *together["trained"]]
    return [*first, *singles.values()]


def one(method: str, **parameters: Any) -> Recipe:
    """A single method."""
    return Recipe(((method, parameters),))


def chain(*steps: Step) -> Recipe:
    """Several, in this order."""
    return Recipe(steps)


def _brief(modules: int) -> list[Group]:
    """One setting each, so nothing is chosen: the forms of `poisoned`, and what needs no repair or hides its need."""
    return [
        Group("patch", (one("patch"),)),
        Group("scale+patch", (chain(("scale", {"strength": 0.6}), ("patch", {})),)),
        Group("safe_lora", (one("safe_lora", mode="truncated", count=round(0.7 * modules)),)),
    ]


def _singles(modules: int, *, heavy: bool) -> list[Group]:
    """Every method of the registry but the controls; each grid holds the defaults and goes toward more of it."""
    third, most = round(0.35 * modules), round(0.7 * modules)
    weaker = (1.0, 0.7, 0.45) if heavy else (1.0, 0.7)
    return [
        Group("patch", (one("patch"), one("patch", strength=1.5 if heavy else 0.5), one("patch", decouple="adapter"))),
        Group("refusal_tune", tuple(one("refusal_tune", adapter_strength=strength) for strength in weaker)),
        Group(
            "safe_lora",
            (
                one("safe_lora"),
                one("safe_lora", count=third),
                one("safe_lora", count=most),
                one("safe_lora", mode="truncated", count=most),
            ),
        ),
        Group("splora", (one("splora"), one("splora", count=third), one("splora", count=most))),
        Group(
            "gradient_guard",
            tuple(
                one("gradient_guard", form=form, directions=directions)
                for form in ("projection", "minimal")
                for directions in (4, 32)
            ),
        ),
        Group("input_guard", _guards("input_guard")),
        Group("output_guard", _guards("output_guard")),
        Group("antidote", tuple(one("antidote", share=share) for share in (0.1, 0.3, 0.6))),
        Group("safe_delta", tuple(one("safe_delta", budget=budget) for budget in (0.5, 0.2, 0.08))),
        Group("safety_freeze", tuple(one("safety_freeze", share=share) for share in (0.075, 0.3, 0.6))),
        Group("s3lora", (one("s3lora"), one("s3lora", count=third), one("s3lora", count=most))),
        Group("spectral", (one("spectral"), one("spectral", gain=0.0), one("spectral", top=2, gain=0.0))),
        Group("resta", (one("resta"), one("resta", strength=1.0), one("resta", strength=2.0))),
        Group("lox", (one("lox"), one("lox", strength=2.0), one("lox", strength=2.0, rank=16))),
        Group("lssf", (one("lssf"), one("lssf", strength=2.0), one("lssf", strength=3.0))),
        Group(
            "safemerge",
            (
                one("safemerge"),
                one("safemerge", threshold=1.0, share=0.5),
                one("safemerge", threshold=1.0, share=0.5, reach="everywhere"),
            ),
        ),
    ]


def _guards(name: str) -> tuple[Recipe, ...]:
    return (one(name), one(name, directions=8), one(name, directions=64), one(name, contrast=False))


def _compositions(modules: int, *, heavy: bool) -> dict[str, list[Group]]:
    """Methods in a row. A lighter damage gets fewer of them: there the single ones are known to be enough."""
    third, most = round(0.35 * modules), round(0.7 * modules)
    pairs = _PAIRS if heavy else _LIGHT_PAIRS
    edits = [
        Group("scale+patch", tuple(chain(("scale", {"strength": s}), ("patch", {"strength": p})) for s, p in pairs)),
        Group(
            "safe_lora+patch",
            (
                chain(("safe_lora", {"count": third}), ("patch", {})),
                chain(("safe_lora", {"mode": "truncated", "count": most}), ("patch", {})),
                chain(("safe_lora", {"count": most}), ("patch", {})),
            ),
        ),
        Group(
            "patch+scale",
            tuple(chain(("patch", {"strength": p}), ("scale", {"strength": s})) for p, s in ((1.5, 0.6), (2.0, 0.5))),
        ),
    ]
    tune: Step = ("refusal_tune", {})
    trained = [
        Group(
            "patch+refusal_tune",
            (
                chain(("patch", {}), tune),
                chain(("patch", {"strength": 0.5}), tune),
                chain(("patch", {}), ("refusal_tune", {"adapter_strength": 0.8})),
            ),
        ),
        Group(
            "scale+patch+refusal_tune",
            tuple(chain(("scale", {"strength": s}), ("patch", {}), tune) for s in (0.7, 0.5)),
        ),
        Group(
            "safe_lora+refusal_tune",
            (
                chain(("safe_lora", {"count": third}), tune),
                chain(("safe_lora", {"mode": "truncated", "count": most}), tune),
            ),
        ),
    ]
    if heavy:
        return {"edits": edits, "trained": trained}
    return {"edits": edits[:2], "trained": [Group("patch+refusal_tune", (chain(("patch", {"strength": 0.5}), tune),))]}


_PAIRS: Final = ((0.7, 1.0), (0.6, 1.0), (0.5, 1.0), (0.6, 1.5))
_LIGHT_PAIRS: Final = ((0.8, 0.5), (0.8, 1.0), (0.6, 0.5))


def modules_reverted(modules: int) -> Sequence[Recipe]:
    """The control that reverts modules by lot."""
    return [one("random_modules", count=round(share * modules), seed=1) for share in RANDOM_SHARES]


def weakened() -> Sequence[Recipe]:
    """The control that weakens all modules alike."""
    return [one("scale", strength=strength) for strength in STRENGTHS]


def _short(parameters: dict[str, Any]) -> str:
    return " ".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in parameters.items()
    )
