"""Listen to a loaded model: what every linear and every fused expert reads and writes, and gradients at its outputs.

One kind of event for all of them (`Product`), whether a hook on a module or `fused_products` saw it.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Final

import torch
from torch import Tensor, nn

from repair.body import body_of
from repair.calibration import CalibrationSettings
from repair.context import Progress
from repair.errors import MissingWeight
from repair.fused_products import FusedExperts, Product
from repair.moments import Side
from repair.roles import is_linear, is_turned
from repair.sketch import LEAST_BUFFER, GradientSketch, MomentSketch

_BATCH: Final = 8
_TOGETHER: Final = 8  # times the directions of a linear are shared by all experts of a parameter
_LEAST_DIRECTIONS: Final = 4

Row = tuple[list[int], slice]
"""Token ids, and which of them count."""

Weighted = tuple[float, Callable[[], Tensor]]
"""A loss, and what it counts for."""


class Ears:
    """Every linear of a model but the head, which answers in words and is rarely adapted, and its fused experts."""

    def __init__(self, model: Any, settings: CalibrationSettings) -> None:
        head = model.get_output_embeddings()
        self.linears: dict[str, nn.Module] = {
            name: module for name, module in model.named_modules() if is_linear(module) and module is not head
        }
        if not self.linears:
            raise MissingWeight("the model has no linear to look at", field="aligned")
        self.experts = FusedExperts(model)
        self.weights: dict[str, Tensor] = {name: _weight(module) for name, module in self.linears.items()}
        """Out x in; those of experts once they were heard."""
        self._directions = settings.directions
        self._counts = self.experts.counts

    @property
    def names(self) -> list[str]:
        """Of all that may be heard."""
        return [*self.linears, *self.experts.names]

    def moments(self, name: str) -> MomentSketch:
        """A sketch of what belongs to a module. Many experts keep little each: they are many, and see few tokens."""
        return MomentSketch(self._kept(name), LEAST_BUFFER * _TOGETHER // max(_TOGETHER, self._counts.get(name, 1)))

    def gradient(self, name: str) -> GradientSketch:
        """A sketch of its gradient."""
        return GradientSketch(self._kept(name), LEAST_BUFFER * _TOGETHER // max(_TOGETHER, self._counts.get(name, 1)))

    def _kept(self, name: str) -> int:
        share = _TOGETHER * self._directions // self._counts.get(name, 1)
        return min(self._directions, max(_LEAST_DIRECTIONS, share))

    @contextmanager
    def open(self, hear: Callable[[Product], None]) -> Iterator[None]:
        """Tell ``hear`` of every product inside the block."""

        def hook_for(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], output: object) -> None:
                if not isinstance(output, Tensor):
                    return  # a linear that goes on to do something else (the router of a Llama 4)
                total = args[0].shape[:-1].numel()
                product = Product(
                    name=name,
                    read=args[0],
                    output=output,
                    part=lambda whole: whole.reshape(total, -1),
                    bias=getattr(module, "bias", None),
                    tokens=torch.arange(total, device=output.device),
                    total=total,
                    weight=self.weights[name],
                )
                hear(product)

            return hook

        def of_expert(product: Product) -> None:
            self.weights[product.name] = product.weight
            hear(product)

        with ExitStack() as stack:
            for name, module in self.linears.items():
                stack.callback(module.register_forward_hook(hook_for(name)).remove)
            stack.enter_context(self.experts.listening(of_expert))
            yield


class Listener:
    """Adds what a module reads and writes at the chosen tokens to its sketches."""

    def __init__(self, ears: Ears) -> None:
        self.owners: dict[str, str] = {}
        self._ears = ears
        self._inputs: dict[str, MomentSketch] = {}
        self._outputs: dict[str, MomentSketch] = {}
        self._chosen: Tensor | None = None
        self._last: tuple[str, Tensor] | None = None

    def listen(self, model: Any, encoded: Sequence[Row], progress: Progress, *, start: float) -> None:
        """Run the model on every row, a few at a time; this is a quarter of the work, from ``start`` on."""
        body = body_of(model)
        with self._ears.open(self._hear):
            for at in range(0, len(encoded), _BATCH):
                part = encoded[at : at + _BATCH]
                width = max(len(ids) for ids, _ in part)
                # Padded on the right: a causal model never looks there.
                padded = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in part], device=model.device)
                self._chosen = torch.zeros_like(padded, dtype=torch.bool)
                for row, (_, chosen) in enumerate(part):
                    self._chosen[row, chosen] = True
                with torch.inference_mode():
                    body(input_ids=padded, use_cache=False)
                self._last = None
                progress("moments", start + (at + len(part)) / len(encoded) / 4)

    def sketches(self) -> Iterator[tuple[str, Side, MomentSketch]]:
        """Every sketch, under the module that owns it."""
        yield from ((name, Side.INPUTS, sketch) for name, sketch in self._inputs.items())
        yield from ((name, Side.OUTPUTS, sketch) for name, sketch in self._outputs.items())

    def _hear(self, product: Product) -> None:
        if self._chosen is None or product.total != self._chosen.numel():
            return  # it does not see one row for each token
        chosen = self._chosen.flatten()[product.tokens]
        if not bool(chosen.any()):
            return
        owner = self._owner(product.name, product.read)
        if owner == product.name:
            read = product.read.reshape(len(chosen), -1)
            self._inputs.setdefault(owner, self._ears.moments(owner)).add(read[chosen])
        self._outputs.setdefault(product.name, self._ears.moments(product.name)).add(product.written[chosen])

    def _owner(self, name: str, read: Tensor) -> str:
        """Linears that are handed the very same tensor one after the other share what is known about it."""
        if name not in self.owners:
            self.owners[name] = self._last[0] if self._last is not None and self._last[1] is read else name
        if self.owners[name] == name:
            self._last = (name, read)
        return self.owners[name]


def gradients(
    model: Any,
    ears: Ears,
    losses: Sequence[Weighted],
    progress: Progress,
    *,
    only: Collection[str] | None = None,
) -> dict[str, GradientSketch]:
    """For each module the sum over losses of ``weight E^T X``: E the loss's gradient at its outputs, X its inputs.

    Of every module that is heard, or of those named in ``only``.
    """
    found: dict[str, GradientSketch] = {}

    def hear(product: Product) -> None:
        if only is not None and product.name not in only:
            return
        if product.output.requires_grad and len(product.tokens):
            read = product.read.detach().reshape(len(product.tokens), -1)
            product.output.register_hook(lambda upstream: keep(product, upstream, read))  # type: ignore[no-untyped-call]  # torch's

    def keep(product: Product, upstream: Tensor, read: Tensor) -> None:
        sketch = found.setdefault(product.name, ears.gradient(product.name))
        sketch.add(product.part(upstream), read)

    def wake(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output.requires_grad_()

    handle = model.get_input_embeddings().register_forward_hook(wake)
    try:
        with ears.open(hear):
            for done, (weight, loss) in enumerate(losses, start=1):
                with torch.enable_grad():
                    torch.autograd.backward(weight * loss())
                progress("refusal gradient", 0.5 + 0.5 * done / len(losses))
    finally:
        handle.remove()
    return {name: sketch for name, sketch in found.items() if not sketch.empty}


def column_norms(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The norm of each column of every weight."""
    return {name: weight.float().norm(dim=0).cpu() for name, weight in weights.items()}


def _weight(module: nn.Module) -> Tensor:
    """The weight as out x in; Conv1D stores it the other way round."""
    weight: Tensor = module.weight  # type: ignore[assignment]  # both kinds hold a tensor
    return weight.detach().T if is_turned(module) else weight.detach()
