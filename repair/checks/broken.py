"""Candidates that break while they are made: a fault of this program, not of the adapter and not of the machine.

It would come again at every attempt, so a retry is of no use; and it says nothing of the other candidates. What may be
the machine's fault (no memory, no disk, a lost lease, and `RuntimeError`, by which torch reports a failing device as
well as shapes that do not fit) is let through, and the attempt is made again.
"""

import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch

from gate.errors import Refused
from repair.checks.errors import CandidatesBroke
from repair.checks.verdict import Tried

FAULTS: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
    torch.linalg.LinAlgError,  # type: ignore[attr-defined]  # torch does not list it
    Refused,  # of bytes that we wrote ourselves
)
"""What only a mistake in a method, or a model class that it was not made for, can raise."""


def told(fault: BaseException) -> str:
    """What happened and where; never its text, which may quote anything."""
    last = traceback.extract_tb(fault.__traceback__)[-1]
    where = f"{type(fault).__name__} in {Path(last.filename).name}, line {last.lineno}"
    return f"broke while it was made: {where}; a fault of this program, please report it"


def require_one_tried(tried: Sequence[Tried]) -> None:
    """Raise CandidatesBroke where nothing was measured and something broke: that is no verdict on the adapter."""
    broken = [one for one in tried if one.broke]
    if broken and all(one.select is None for one in tried):
        raise CandidatesBroke(broken[0].lost, field=broken[0].method)
