"""Heads that are tied to the embedding: with `ensure_weight_tying` the two adapters are one, written down twice.

PEFT makes both of one pair of factors, the head's being those of the embedding turned over. A file in which they differ
would be served as one or the other.
"""

from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from gate.config import AdapterConfig
from gate.errors import Refused, Rule
from gate.header import Header
from gate.names import CONFIG_FILE, WEIGHTS_FILE
from gate.records import PREFIX, ModuleKind, Weights
from gate.targets import OUTPUT_LAYERS


def check_tied(stream: BinaryIO, header: Header, config: AdapterConfig, weights: Weights) -> None:
    """Refuse an adapter that says that head and embedding are tied and holds two different ones, or one alone."""
    if not config.raw.get("ensure_weight_tying"):
        return
    heads = [module for module in weights.modules if module.name.rpartition(".")[2] in OUTPUT_LAYERS]
    words = [module for module in weights.modules if module.kind is ModuleKind.EMBEDDING]
    if not heads and not words:
        return
    if len(heads) != 1 or len(words) != 1:
        detail = "ties the head to the embedding, and the file does not have one of each: train without it"
        raise Refused(Rule.UNSUPPORTED_LAYOUT, detail, file=CONFIG_FILE, field="ensure_weight_tying")
    head, word = heads[0], words[0]
    if head.scale != word.scale:
        detail = f"tied to {word.name}, which has another scale"
        raise Refused(Rule.UNSUPPORTED_LAYOUT, detail, file=CONFIG_FILE, field=head.name)
    pairs = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A"}
    for one, other in pairs.items():
        key = f"{PREFIX}{head.name}.{one}"
        mirror = _bytes(stream, header, f"{PREFIX}{word.name}.{other}")
        mine = _bytes(stream, header, key)
        if mine.shape != mirror.swapaxes(0, 1).shape or not np.array_equal(mine, mirror.swapaxes(0, 1)):
            detail = f"ensure_weight_tying says that it mirrors {word.name}, and it does not: train without it"
            raise Refused(Rule.UNSUPPORTED_LAYOUT, detail, file=WEIGHTS_FILE, field=key)


def _bytes(stream: BinaryIO, header: Header, key: str) -> NDArray[np.uint8]:
    """A matrix as rows, columns and the bytes of each number."""
    entry = header.tensors[key]
    stream.seek(entry.start)
    raw = np.frombuffer(stream.read(entry.end - entry.start), dtype=np.uint8)
    return raw.reshape(*entry.shape, -1)
