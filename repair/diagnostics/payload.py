"""What an adapter brings besides low-rank factors. A repair of the factors is void if the harm sits there."""

from typing import Any

from repair.lora import LayerKind, LoraAdapter


def payload_of(adapter: LoraAdapter) -> dict[str, Any]:
    """Full replacements, output biases, DoRA magnitudes, adapted embeddings, and config keys nobody understood.

    Other files (tokenizer, chat template, code) need no mention: an adapter folder that has them is refused.
    """
    return {
        "replacements": [{"key": e.key, "kind": e.kind.value, "shape": list(e.shape)} for e in adapter.extras],
        "output_biases": [layer.name for layer in adapter.layers if layer.bias is not None],
        "magnitudes": [layer.name for layer in adapter.layers if layer.magnitude is not None],
        "embeddings": [layer.name for layer in adapter.layers if layer.kind is LayerKind.EMBEDDING],
        "notes": list(adapter.notes),
    }
