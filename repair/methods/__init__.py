"""The repair methods: whatever lies in this folder is offered under its declared name."""

from collections.abc import Iterator
from importlib import import_module
from inspect import isabstract
from pkgutil import iter_modules
from types import MappingProxyType

from repair.method import RepairMethod

for _found in iter_modules(__path__):
    import_module(f"{__name__}.{_found.name}")


def _whole(kind: type[RepairMethod]) -> Iterator[type[RepairMethod]]:
    """Every class below ``kind`` that leaves nothing to be said; what several share is none itself."""
    for below in kind.__subclasses__():
        if not isabstract(below):
            yield below
        yield from _whole(below)


# The interface itself is abstract; its subclasses are asked for, nothing is made of it.
METHODS = MappingProxyType(
    {found.name: found for found in sorted(_whole(RepairMethod), key=lambda found: found.name)}  # type: ignore[type-abstract]
)
"""Every method by name, sorted."""
