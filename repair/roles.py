"""What a linear does in its block, whatever the model class calls it: the names of a Llama stand for the roles.

A fused linear plays every role of its parts: ``gate_up_proj`` is gate and up in one, ``qkv_proj`` all of q, k and v.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

from torch import nn

from repair.errors import MissingWeight

_QKV: Final = ("qkv_proj", "c_attn", "query_key_value", "Wqkv", "wqkv")

ROLES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "up_proj": ("up_proj", "gate_up_proj", "fc1", "c_fc", "dense_h_to_4h", "fc_in", "w3"),
        "gate_proj": ("gate_proj", "gate_up_proj", "w1"),
        "down_proj": ("down_proj", "fc2", "mlp.c_proj", "dense_4h_to_h", "fc_out", "w2"),
        "o_proj": ("o_proj", "dense", "out_proj", "attn.c_proj", "wo"),
        "q_proj": ("q_proj", *_QKV),
        "k_proj": ("k_proj", *_QKV),
        "v_proj": ("v_proj", *_QKV),
    }
)
"""For each role how a linear that plays it may be called: the end of its path."""

INSTEAD: Final[Mapping[str, str]] = MappingProxyType({"up_proj": "o_proj"})
"""What is tuned in a block without such a linear. A block whose experts are fused has no linear in its MLP."""


@dataclass(frozen=True, kw_only=True)
class Cast:
    """The linears that play a role.

    Attributes:
        names: Full paths, in the order of the model.
        notes: Where they are called otherwise, or another role stands in.
    """

    names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def is_linear(module: nn.Module) -> bool:
    """A linear of torch, or GPT-2's, which stores its weight as in x out."""
    return isinstance(module, nn.Linear) or is_turned(module)


def is_turned(module: nn.Module) -> bool:
    """Whether it is GPT-2's."""
    return type(module).__name__ == "Conv1D"


def block_of(name: str) -> int:
    """Number of the block that a module belongs to; -1 outside of all."""
    return next((int(part) for part in name.split(".") if part.isdigit()), -1)


def cast(model: Any, role: str, blocks: tuple[int, int]) -> Cast:
    """The linears of ``role`` in each block from the first to one before the last; raises MissingWeight.

    A block without one gives what stands in for it (`INSTEAD`), where anything does.
    """
    inside: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if is_linear(module) and blocks[0] <= block_of(name) < blocks[1]:
            inside.setdefault(block_of(name), []).append(name)
    found: list[str] = []
    ends: dict[str, str] = {}
    for linears in inside.values():
        for played in filter(None, (role, INSTEAD.get(role))):
            end = next((end for end in ROLES[played] if any(_ends(name, end) for name in linears)), None)
            if end is not None:
                found += [name for name in linears if _ends(name, end)]
                ends[end] = played
                break
    if not found:
        known = sorted({name.rpartition(".")[2] for linears in inside.values() for name in linears})
        detail = f"no linear of these blocks does what {role} does in a Llama; there are {', '.join(known) or 'none'}"
        raise MissingWeight(detail, field="target")
    told = (_told(role, end, played) for end, played in ends.items())
    return Cast(names=tuple(found), notes=tuple(filter(None, told)))


def _ends(name: str, end: str) -> bool:
    return name.endswith(f".{end}")


def _told(role: str, end: str, played: str) -> str:
    if end == role:
        return ""
    if played == role:
        return f"{end} was tuned, which is the {role} of this model"
    return f"{end} was tuned in blocks whose MLP has no linear to tune: their experts are fused"
