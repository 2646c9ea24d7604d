"""Listen to fused experts: every product of tokens with one expert's slice of a fused parameter, seen from outside.

Such experts are no modules, so there is nothing to hook. But a model class multiplies the tokens that were routed to an
expert with a view of the parameter, one expert after the other or all at once, and torch lets a caller watch every
product. Which expert it was stands in the view's place in memory, which tokens in what the experts were called with.
Nothing of a model class is written again here; where the tokens are not those that the routing names, nothing is said.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from repair.experts import slot_name
from repair.lora import ParameterSlot

_MATRIX, _EXPERTS = 2, 3  # dimensions
_TURNED: Final = frozenset({functional.linear})  # takes its weight as out x in; the others as in x out
_PRODUCTS: Final = _TURNED | {
    torch.matmul,
    torch.mm,
    torch.bmm,
    Tensor.matmul,
    Tensor.__matmul__,
    Tensor.mm,
    Tensor.bmm,
}


@dataclass(frozen=True, kw_only=True)
class Product:
    """What one expert reads and writes in one forward pass.

    Attributes:
        name: As a layer of an adapter is called that adapts this expert.
        read: What it reads, a row for each of ``tokens``.
        output: The tensor that its outputs are part of.
        part: Cuts the rows of ``tokens`` out of ``output``, or out of a gradient with respect to it.
        bias: What ``output`` holds besides the product.
        tokens: Places of the tokens among all of the batch, row after row.
        total: How many tokens the batch has.
        weight: The expert's matrix, out x in.
    """

    name: str
    read: Tensor
    output: Tensor
    part: Callable[[Tensor], Tensor]
    bias: Tensor | None
    tokens: Tensor
    total: int
    weight: Tensor

    @property
    def written(self) -> Tensor:
        """``W x`` for each of the tokens."""
        found = self.part(self.output)
        return found if self.bias is None else found - self.bias


@dataclass(kw_only=True)
class _Called:
    """With what the experts of a block were called: their tokens, and for each of those its experts."""

    hidden: Tensor
    index: Tensor | None
    entered: set[int] = field(default_factory=set)
    odd: bool = False


@dataclass(frozen=True, kw_only=True, eq=False)
class _Home:
    """A fused parameter and the module that holds it."""

    module: nn.Module
    path: str
    parameter: nn.Parameter

    @property
    def names(self) -> list[str]:
        """Of its experts, in their order."""
        count = len(self.parameter)
        slots = (ParameterSlot(parameter=self.path, expert=at, experts=count) for at in range(count))
        return [slot_name(slot) for slot in slots]

    def holds(self, view: Tensor) -> bool:
        """Whether this is one expert of it, or all."""
        same = view.untyped_storage().data_ptr() == self.parameter.untyped_storage().data_ptr()
        return same and 0 <= self.place(view) < self.parameter.numel() and view.ndim in {_MATRIX, _EXPERTS}

    def place(self, view: Tensor) -> int:
        """Where a view of it begins, counted in its numbers."""
        return int(view.storage_offset()) - int(self.parameter.storage_offset())


class FusedExperts:
    """The fused experts of a model, and what becomes of those that cannot be listened to."""

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._homes = tuple(_homes(model))
        self._used: set[_Home] = set()
        self.strange: dict[str, str] = {}
        """Experts whose tokens could not be told, and why."""

    @property
    def names(self) -> list[str]:
        """Every expert of every fused parameter."""
        return [name for home in self._homes for name in home.names]

    @property
    def counts(self) -> Mapping[str, int]:
        """With how many others each shares its parameter, itself counted."""
        return {name: len(home.parameter) for home in self._homes for name in home.names}

    @property
    def interleaved(self) -> list[str]:
        """Those among whose outputs gate and up take turns; in the others the gate's come first."""
        return [name for one in self._homes if not getattr(one.module, "is_concatenated", True) for name in one.names]

    @property
    def seen(self) -> set[str]:
        """Every expert of a parameter that took part in a product."""
        return {name for home in self._used for name in home.names}

    @contextmanager
    def listening(self, hear: Callable[[Product], None]) -> Iterator[None]:
        """Tell ``hear`` of every product inside the block; the model is left as it was."""
        if not self._homes:
            yield
            return
        calls: dict[nn.Module, _Called] = {}

        def called(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            given = [one for one in (*args, *kwargs.values()) if isinstance(one, Tensor)]
            index = next((one for one in given if not one.is_floating_point() and one.ndim == _MATRIX), None)
            calls[module] = _Called(hidden=given[0], index=index)

        with ExitStack() as stack:
            for module in {home.module for home in self._homes}:
                stack.callback(module.register_forward_pre_hook(called, with_kwargs=True).remove)
            stack.enter_context(_one_by_one(self._model))
            stack.enter_context(_Watch(self._homes, lambda seen: self._heard(seen, calls, hear)))
            yield

    def _heard(self, seen: "_Seen", calls: Mapping[nn.Module, _Called], hear: Callable[[Product], None]) -> None:
        self._used.add(seen.home)
        call = calls.get(seen.home.module)
        experts = range(len(seen.home.parameter)) if seen.expert is None else [seen.expert]
        for expert in experts:
            product = None if call is None else _product(seen, expert, call)
            name = seen.home.names[expert]
            if product is None:
                self.strange[name] = "the model class does not tell which tokens are routed to this expert"
            elif name not in self.strange:
                hear(product)


@dataclass(frozen=True, kw_only=True)
class _Seen:
    """A product with a view of a fused parameter."""

    home: _Home
    expert: int | None
    read: Tensor
    output: Tensor
    bias: Tensor | None
    turned: bool


class _Watch(TorchFunctionMode):
    """Looks at every product while it is on."""

    def __init__(self, homes: Sequence[_Home], tell: Callable[[_Seen], None]) -> None:
        super().__init__()
        self._homes, self._tell = homes, tell

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and len(args) > 1:
            read, weight = args[:2]
            home = next((home for home in self._homes if home.holds(weight)), None)
            if home is not None:
                bias = args[2] if len(args) > _MATRIX else (kwargs or {}).get("bias")
                expert = None if weight.ndim == _EXPERTS else home.place(weight) // home.parameter.stride(0)
                self._tell(
                    _Seen(home=home, expert=expert, read=read, output=output, bias=bias, turned=func not in _TURNED)
                )
        return output


def _product(seen: _Seen, expert: int, call: _Called) -> Product | None:
    """The part of one expert; None where its tokens are not those that the block was called with."""
    weight = seen.home.parameter.detach()[expert]
    hidden = call.hidden.reshape(-1, call.hidden.shape[-1])
    first = expert not in call.entered
    call.entered.add(expert)
    if seen.expert is None and len(seen.read) == len(
        seen.home.parameter
    ):  # all experts at once: the tokens once for each, and zeros where it was not asked
        read = seen.read[expert]
        total = len(hidden) // len(seen.home.parameter)
        tokens = read.detach().abs().amax(1).nonzero()[:, 0]
        known = hidden[expert * total : (expert + 1) * total]
        part = _rows(expert, tokens)
        read = read[tokens]
    elif seen.expert is not None and call.index is not None:
        read, total, part = seen.read, len(hidden), _all
        tokens = (call.index == expert).T.nonzero()[:, 1]
        known = hidden
    else:
        return None
    if call.odd or len(tokens) != len(read) or (first and not torch.equal(known[tokens], read)):
        call.odd = True  # nor is anything else that it does in this pass what it seems
        return None
    return Product(
        name=seen.home.names[expert],
        read=read,
        output=seen.output,
        part=part,
        bias=seen.bias,
        tokens=tokens,
        total=total,
        weight=weight.T if seen.turned else weight,
    )


def _all(whole: Tensor) -> Tensor:
    return whole


def _rows(expert: int, tokens: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda whole: whole[expert][tokens]


def _homes(model: nn.Module) -> Iterator[_Home]:
    """Every parameter with three dimensions whose module is none of torch's own (a convolution has such weights)."""
    for name, module in model.named_modules():
        if type(module).__module__.startswith("torch.nn"):
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == _EXPERTS:
                yield _Home(module=module, path=f"{name}.{leaf}", parameter=parameter)


@contextmanager
def _one_by_one(model: Any) -> Iterator[None]:
    """Model classes know faster ways than one expert after the other, which do their products elsewhere."""
    before = model.get_experts_implementation()
    if all(one in {None, "eager"} for one in before.values()):
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
