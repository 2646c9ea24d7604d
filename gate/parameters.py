"""Which parameters the tensors of `target_parameters` belong to: the file does not name them, PEFT's wrappers do.

PEFT puts one wrapper around a module for each of its parameters that is adapted, in the order in which the module
registered them. The outermost writes under the module's own name, each further in under one more ``.base_layer``. A
parameter with three dimensions holds one matrix for each expert; the factors of all experts lie in one pair of tensors.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from gate.errors import Refused, Rule
from gate.names import CONFIG_FILE, WEIGHTS_FILE

BASE_LAYER: Final = ".base_layer"
WEIGHT: Final = "weight"
# In the order in which the model classes register them; anything else is only clear when it stands alone.
_ORDER: Final = ("gate_up_proj", "gate_proj", "up_proj", "w13", "w1", "w3", "w2", "down_proj")
# How checkpoints store what the model class fuses: the rows of these modules, one below the other.
_APART: Final = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}
_CONTAINERS: Final = (".mlp.experts", ".block_sparse_moe.experts", ".feed_forward.experts")


@dataclass(frozen=True, kw_only=True, order=True)
class Site:
    """Where in a file a pair of factors stands: the module, and under how many ``.base_layer``."""

    module: str
    nested: int = 0


def site_of(path: str) -> Site:
    """A path as it stands in a tensor's name, without the wrappers."""
    module = path
    while module.endswith(BASE_LAYER):
        module = module.removesuffix(BASE_LAYER)
    return Site(module=module, nested=(len(path) - len(module)) // len(BASE_LAYER))


def parameters_at(sites: Iterable[Site], targets: Sequence[str], *, ordinary: Callable[[str], bool]) -> dict[Site, str]:
    """The full path of the parameter at each site that is one; sites of ordinary modules are not in the answer.

    Args:
        sites: All that the file has.
        targets: `target_parameters`.
        ordinary: Whether a module is targeted as a module; asked where a target names no module.

    Raises:
        Refused: the names do not tell which of several parameters a site is.
    """
    parents: dict[str, set[str]] = {}
    for target in targets:
        parent, _, leaf = target.rpartition(".")
        parents.setdefault(parent, set()).add(leaf)
    nested: dict[str, set[int]] = {}
    for site in sites:
        nested.setdefault(site.module, set()).add(site.nested)
    found: dict[Site, str] = {}
    for module, depths in nested.items():
        leaves = set().union(*(parents.get(ending, set()) for ending in _endings(module)))
        if not leaves and (depths != {0} or not ordinary(module)):
            leaves = parents.get("", set())
        if not leaves and depths == {0}:
            continue
        if depths != set(range(len(leaves))):
            detail = f"{len(depths)} parameters of it are in the file, target_parameters names {len(leaves)}"
            raise Refused(Rule.NOT_TARGETED, detail, file=WEIGHTS_FILE, field=module)
        ordered = reversed(_in_order(module, leaves))
        found |= {Site(module=module, nested=at): f"{module}.{leaf}" for at, leaf in enumerate(ordered)}
    return found


def nesting(parameters: Iterable[str]) -> dict[str, Site]:
    """The site of each parameter, when these are all that are adapted."""
    leaves: dict[str, list[str]] = {}
    for parameter in parameters:
        module, _, leaf = parameter.rpartition(".")
        leaves.setdefault(module, []).append(leaf)
    return {
        f"{module}.{leaf}": Site(module=module, nested=at)
        for module, names in leaves.items()
        for at, leaf in enumerate(reversed(_in_order(module, names)))
    }


def stored_apart(parameter: str, expert: int, known: Callable[[str], bool]) -> tuple[str, ...] | None:
    """The modules of a checkpoint whose rows make up one expert of a fused parameter; None when it has none such."""
    container, _, leaf = parameter.rpartition(".")
    for place in (container, *(_elsewhere(container))):
        for names in _APART.get(leaf, ()):
            parts = tuple(f"{place}.{expert}.{name}" for name in names)
            if all(known(part) for part in parts):
                return parts
    return None


def fused_home(module: str) -> tuple[str, int, int, int] | None:
    """For an expert that a file spells apart: the fused parameter, the expert, which part of its rows, of how many."""
    place, _, name = module.rpartition(".")
    container, _, number = place.rpartition(".")
    if not number.isdecimal():
        return None
    for leaf, spellings in _APART.items():
        for names in spellings:
            if name in names:
                return f"{container}.{leaf}", int(number), names.index(name), len(names)
    return None


def spellings(module: str) -> tuple[str, ...]:
    """A module's path, and for the router of a Mixtral its path in files, or in the model class."""
    for ending, other in ((".mlp.gate", ".block_sparse_moe.gate"), (".block_sparse_moe.gate", ".mlp.gate")):
        if module.endswith(ending):
            return (module, f"{module.removesuffix(ending)}{other}")
    return (module,)


def homes(parameter: str) -> tuple[str, ...]:
    """This parameter, and what else model classes call it."""
    container, _, leaf = parameter.rpartition(".")
    return (parameter, *(f"{place}.{leaf}" for place in _elsewhere(container)))


def _elsewhere(container: str) -> tuple[str, ...]:
    for ending in _CONTAINERS:
        if container.endswith(ending):
            start = container.removesuffix(ending)
            return tuple(f"{start}{other}" for other in _CONTAINERS if other != ending)
    return ()


def _endings(module: str) -> Iterator[str]:
    """The path, and what is left of it after each dot: PEFT's rule for a target is that the path ends with it."""
    while module:
        yield module
        module = module.partition(".")[2]


def _in_order(module: str, leaves: Iterable[str]) -> list[str]:
    names = sorted(leaves)
    if len(names) > 1 and not set(names) <= set(_ORDER):
        detail = f"which of {', '.join(names)} of {module} a tensor belongs to is not written in the file"
        raise Refused(Rule.UNSUPPORTED_LAYOUT, detail, file=CONFIG_FILE, field="target_parameters")
    return sorted(names, key=lambda leaf: _ORDER.index(leaf) if leaf in _ORDER else 0)
