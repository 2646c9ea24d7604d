"""The part of a loaded causal model that gives hidden states: everything but the head."""

from typing import Any, Final

from torch import nn

from repair.errors import WrongReference

_INNER: Final = ("model", "language_model", "transformer")


def body_of(model: Any) -> nn.Module:
    """The module below the head; raises WrongReference where a model class hides it.

    `base_model` is it as a rule. A model class whose prefix names nothing of its own (Llama 4) answers with itself,
    head and all, and would give logits where hidden states are asked for.
    """
    head = model.get_output_embeddings()
    body: nn.Module = model.base_model
    while any(module is head for module in body.modules()):
        inner = next((part for name in _INNER if isinstance(part := getattr(body, name, None), nn.Module)), None)
        if inner is None:
            detail = f"no part of a {type(model).__name__} gives hidden states without its head"
            raise WrongReference(detail, field="aligned")
        body = inner
    return body
