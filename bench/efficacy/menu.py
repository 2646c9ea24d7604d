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

FULL: Final = ("poisoned", "poisoned_light", "obedient", "drifted", "poisoned_dora", "trigger", "innocent")
ALIKE: Final = ("poisoned_rslora", "poisoned_rank_pattern")
"""The update of `poisoned` to the last bit of rounding, written otherwise: one setting each shows that it stays so."""

UNSEEN: Final = ("unseen_wide", "unseen_deep")
"""Trained when methods, settings and policies were fixed, on harmful prompts that no repair learns from. Nothing is
chosen for them: one setting each of what had proved best on the others."""

HEAVY: Final = frozenset({"poisoned", "poisoned_dora", *ALIKE})
"""Where a light hand is known to do nothing."""


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


def groups(adapter: str, modules: int) -> list[Group]:
    """Every method of the registry and the compositions, for ``adapter``, which adapts so many modules."""
    if adapter in ALIKE:
        return _brief(modules)
    if adapter in UNSEEN:
        return _fixed()
    heavy = adapter in HEAVY
    return [*_singles(modules, heavy=heavy), *_compositions(modules, heavy=heavy)]


def controls(adapter: str, modules: int) -> list[Recipe]:
    """The points of both curves that methods are compared with."""
    if adapter in ALIKE:
        return []
    if adapter in UNSEEN:
        return [one("scale", strength=strength) for strength in STRENGTHS]
    return [*(one("scale", strength=strength) for strength in STRENGTHS), *_reverted(RANDOM_SHARES, modules)]


def one(method: str, **parameters: Any) -> Recipe:
    """A single method."""
    return Recipe(((method, parameters),))


def chain(*steps: Step) -> Recipe:
    """Several, in this order."""
    return Recipe(steps)


def _brief(modules: int) -> list[Group]:
    """One setting each, so nothing is chosen."""
    return [
        Group("patch", (one("patch"),)),
        Group("scale+patch", (chain(("scale", {"strength": 0.6}), ("patch", {})),)),
        Group("safe_lora", (one("safe_lora", mode="truncated", count=round(0.7 * modules)),)),
    ]


def _fixed() -> list[Group]:
    """What was best on `poisoned` or on `poisoned_light`, as it was there."""
    half_way: Step = ("gradient_guard", _HALF_WAY)
    return [
        Group("patch", (one("patch"),)),
        Group("refusal_tune", (one("refusal_tune", adapter_strength=0.7),)),
        Group("scale+patch", (chain(("scale", {"strength": 0.6}), ("patch", {})),)),
        Group("gradient_guard", (chain(half_way),)),
        Group("gradient_guard+scale", (chain(half_way, ("scale", {"strength": 0.8})),)),
        Group("gradient_guard+patch", (chain(half_way, ("patch", {"strength": 0.35})),)),
        Group("lssf", (one("lssf"),)),
    ]


def _singles(modules: int, *, heavy: bool) -> list[Group]:
    """Every method of the registry but the controls; each grid holds the defaults and goes toward more of it."""
    third, most = round(0.35 * modules), round(0.7 * modules)
    weaker = (1.0, 0.7, 0.45) if heavy else (1.0, 0.7)  # each of them is a minute of training
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
            (
                *(
                    one("gradient_guard", form=form, directions=directions)
                    for form in ("projection", "minimal")
                    for directions in (4, 32)
                ),
                one("gradient_guard", at=0.5, directions=16),
                one("gradient_guard", **_HALF_WAY),
                one("gradient_guard", **_HALF_WAY, strength=0.7),
            ),
        ),
        Group("input_guard", (one("input_guard"), *(_plain("input_guard", wide) for wide in (8, 16, 32)))),
        Group("output_guard", (one("output_guard"), *(_plain("output_guard", wide) for wide in (32, 64)))),
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


def _plain(name: str, directions: int) -> Recipe:
    """A guard without the contrast to ordinary prompts."""
    return one(name, contrast=False, directions=directions)


def _compositions(modules: int, *, heavy: bool) -> list[Group]:
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
            "input_guard+patch",
            tuple(
                chain(("input_guard", {"contrast": False, "directions": wide}), ("patch", {"strength": strength}))
                for wide, strength in ((16, 0.5), (16, 1.0), (8, 1.0))
            ),
        ),
        Group(
            "gradient_guard+scale",
            tuple(chain(("gradient_guard", _HALF_WAY), ("scale", {"strength": s})) for s in (0.9, 0.8, 0.7)),
        ),
        Group(
            "gradient_guard+patch",
            tuple(chain(("gradient_guard", _HALF_WAY), ("patch", {"strength": p})) for p in (0.35, 0.65)),
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
                chain(("safe_lora", {"count": round(0.2 * modules)}), tune),
                chain(("safe_lora", {"mode": "truncated", "count": most}), tune),
            ),
        ),
    ]
    return [*edits, *trained] if heavy else [one for one in edits if one.name in _ALSO_LIGHT]


_HALF_WAY: Final[dict[str, Any]] = {"at": 0.5, "contrast": True, "directions": 64}
_ALSO_LIGHT: Final = {"scale+patch", "input_guard+patch", "gradient_guard+scale", "gradient_guard+patch"}
_PAIRS: Final = ((0.7, 1.0), (0.6, 1.0), (0.5, 1.0), (0.6, 1.5))
_LIGHT_PAIRS: Final = ((0.8, 0.5), (0.8, 1.0), (0.6, 0.5))


def _reverted(shares: Sequence[float], modules: int) -> list[Recipe]:
    return [one("random_modules", count=round(share * modules), seed=1) for share in shares]


def _short(parameters: dict[str, Any]) -> str:
    return " ".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in parameters.items()
    )
