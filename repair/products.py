"""float32 products on a CPU at the speed of the CPU.

`torch.mm` uses a library that leaves half of an AVX-512 unit idle on processors of another maker than its own. The
product that `torch.compile` calls does not. It is asked for by name and only there; everywhere else this is ``x @ y``.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

_WIDE = torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability() == "AVX512"  # type: ignore[no-untyped-call]
_LINEAR: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if _WIDE else None


def product(x: Float[Tensor, "rows inner"], y: Float[Tensor, "inner columns"]) -> Float[Tensor, "rows columns"]:
    """``x @ y``. No gradient passes through it."""
    if _LINEAR is not None and _fits(x) and _fits(y):
        found: Tensor = _LINEAR(x, y.T, None, "none", [], "")
        return found
    return x @ y


def _fits(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_cpu and x.numel() > 0 and not x.requires_grad
