"""Adapters that tie the head to the embedding: one update, written down twice, and to be edited as one.

The head's factors are those of the embedding turned over. The embedding is what methods see, because its output side is
the narrow one; the head follows. The gate lets in no adapter whose two sides differ.
"""

from dataclasses import dataclass, replace

from repair.errors import UnsupportedAdapter
from repair.layout import CONFIG
from repair.lora import LayerKind, LoraAdapter, LoraLayer

_HEADS = frozenset({"lm_head", "embed_out"})
TIES = "ensure_weight_tying"


@dataclass(frozen=True, kw_only=True)
class Tie:
    """Which module follows which."""

    head: str
    words: str


def tie_of(adapter: LoraAdapter) -> Tie | None:
    """The tied pair of an adapter that says that it has one; None when it has no head and no embedding."""
    if not adapter.config.get(TIES):
        return None
    heads = [layer.name for layer in adapter.layers if layer.name.rpartition(".")[2] in _HEADS]
    words = [layer.name for layer in adapter.layers if layer.kind is LayerKind.EMBEDDING]
    if not heads and not words:
        return None
    if len(heads) != 1 or len(words) != 1:
        raise UnsupportedAdapter("ties the head to the embedding and does not have both", field=TIES, file=CONFIG)
    return Tie(head=heads[0], words=words[0])


def without_head(adapter: LoraAdapter) -> LoraAdapter:
    """What a method is to see: the tied update once."""
    tie = tie_of(adapter)
    if tie is None:
        return adapter
    return replace(adapter, layers=tuple(layer for layer in adapter.layers if layer.name != tie.head))


def with_head(edited: LoraAdapter, before: LoraAdapter) -> LoraAdapter:
    """The head again, mirroring what became of the embedding; ``before`` still has the uploaded one."""
    tie = tie_of(before)
    if tie is None:
        return edited
    layers = edited.by_name
    if tie.head in layers:
        raise UnsupportedAdapter("a patch cannot adapt a head that is tied to the embedding", field=tie.head)
    words, head = layers[tie.words], before.by_name[tie.head]
    followed = head if words is before.by_name[tie.words] else mirrored(words, head)
    return replace(edited, layers=(*edited.layers, followed))


def mirrored(words: LoraLayer, head: LoraLayer) -> LoraLayer:
    """``head`` with the update of the embedding, turned over."""
    return replace(head, a=words.b.T.contiguous(), b=words.a.T.contiguous(), scale=words.scale)
