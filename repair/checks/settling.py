"""What a policy does with an upload that replaces whole tensors of the model, before anything of it is measured.

From here on the settled adapter is *the* adapter: it is what the input's numbers are about, and what every repair
starts from. It is written and read back, so that it can be released as the very bytes that were measured.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from gate.digest import root_digest
from gate.model import file_digests
from repair.adapter_file import read_adapter, write_adapter
from repair.errors import MissingWeight, ShapeMismatch, UnsupportedAdapter
from repair.layout import WEIGHTS
from repair.lora import LoraAdapter
from repair.replacements import Model, settled, with_values
from repair.treatment import Replacements, Treatment

SETTLING: Final = "replacements"
"""What stands where a method's name does, where settling was all that was done."""
VERSION: Final = 1
_BECAME: Final[Mapping[Treatment, str]] = {
    Treatment.DROP: "dropped",
    Treatment.REVERT: "reverted",
    Treatment.INTERPOLATE: "interpolated",
}


@dataclass(frozen=True, kw_only=True)
class Settled:
    """An upload without its replacements, or with other ones in their place.

    Attributes:
        adapter: As read back, with the values of what still replaces something.
        directory: Where its files lie.
        files: Their digests by name.
        how: What was asked for.
        tensors: What the upload replaced, and what became of each.
        notes: The same in sentences.
    """

    adapter: LoraAdapter
    directory: Path
    files: Mapping[str, str]
    how: Replacements
    tensors: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]

    @property
    def digest(self) -> str:
        """Root digest of the files."""
        return root_digest(self.files)

    def as_dict(self) -> dict[str, Any]:
        """For the report."""
        return {"how": str(self.how), "digest": self.digest, "tensors": [dict(one) for one in self.tensors]}


def settle(adapter: LoraAdapter, how: Replacements, aligned: Model, directory: Path) -> Settled | None:
    """The settled upload under ``directory``; None where there is nothing to settle, or nobody said what to do.

    Raises UnsupportedAdapter when a tensor cannot be put back or mixed: the model has none of its name or its shape.
    """
    if how.refuses or not adapter.extras:
        return None
    try:
        chosen = settled(adapter, how, aligned)
    except (MissingWeight, ShapeMismatch) as error:
        raise UnsupportedAdapter(error.detail, field=error.field, file=WEIGHTS) from error
    write_adapter(chosen, directory)
    gone = {extra.key for extra in adapter.extras} - {extra.key for extra in chosen.extras}
    idle = frozenset[str]() if how.treatment is Treatment.DROP else gone
    return Settled(
        adapter=with_values(read_adapter(directory), chosen),
        directory=directory,
        files=file_digests(directory),
        how=how,
        tensors=tuple(
            {
                "key": extra.key,
                "kind": extra.kind.value,
                "shape": list(extra.shape),
                "became": "left out, the aligned model's own" if extra.key in idle else _BECAME[how.treatment],
            }
            for extra in adapter.extras
        ),
        notes=chosen.notes[len(adapter.notes) :],
    )
