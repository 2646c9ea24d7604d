"""A random model pair on disk and adapters for it: shapes of a real model, numbers of none."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from repair.lora import LoraAdapter, LoraLayer

RANK = 16


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Widths of a decoder's linears."""

    hidden: int
    inner: int
    keys: int
    blocks: int

    def shrunk(self, divisor: int) -> "Sizes":
        """The same proportions, smaller."""
        widths = {"hidden": self.hidden, "inner": self.inner, "keys": self.keys}
        return Sizes(**{key: width // divisor for key, width in widths.items()}, blocks=max(1, self.blocks // divisor))

    def linears(self) -> dict[str, tuple[int, int]]:
        """(out, in) of one block's seven linears."""
        hidden, inner, keys = self.hidden, self.inner, self.keys
        return {
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.k_proj": (keys, hidden),
            "self_attn.v_proj": (keys, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "mlp.gate_proj": (inner, hidden),
            "mlp.up_proj": (inner, hidden),
            "mlp.down_proj": (hidden, inner),
        }

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(out, in) of every linear of the model."""
        return {
            f"model.layers.{block}.{name}": shape
            for block in range(self.blocks)
            for name, shape in self.linears().items()
        }


ONE_BILLION = Sizes(hidden=2048, inner=8192, keys=512, blocks=16)
SEVEN_BILLION = Sizes(hidden=4096, inner=11008, keys=4096, blocks=32)


def write_pair(folder: Path, sizes: Sizes) -> None:
    """Folders ``aligned`` and ``base`` of bfloat16 linears, one file for each block; nothing else of a model.

    What alignment changed is eight falling directions and noise. Files are on the disk when this returns.
    """
    for name in ("aligned", "base"):
        (folder / name).mkdir()
    index: dict[str, str] = {}
    for block in range(sizes.blocks):
        file = f"model-{block:05d}.safetensors"
        pair: dict[str, dict[str, torch.Tensor]] = {"aligned": {}, "base": {}}
        for at, (module, shape) in enumerate(sizes.linears().items()):
            key = f"model.layers.{block}.{module}.weight"
            index[key] = file
            pair["aligned"][key], pair["base"][key] = made_weights(shape, seed=100 * block + at)
        for name, tensors in pair.items():
            save_file(tensors, folder / name / file)
    text = json.dumps({"metadata": {}, "weight_map": index})
    for name in ("aligned", "base"):
        (folder / name / "model.safetensors.index.json").write_text(text)


def made_adapter(sizes: Sizes, *, seed: int = 0, rank: int = RANK) -> LoraAdapter:
    """Random factors for every linear."""
    source = torch.Generator().manual_seed(seed)
    layers = []
    for name, (out_features, in_features) in sizes.shapes().items():
        a = torch.randn(rank, in_features, generator=source) * 0.01
        b = torch.randn(out_features, rank, generator=source) * 0.01
        layers.append(LoraLayer(name=name, a=a, b=b, scale=2.0))
    return LoraAdapter(layers=tuple(layers))


def made_weights(shape: tuple[int, int], *, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight after alignment and before it, bfloat16, from a seed."""
    source = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=source) * 0.02
    left = torch.randn(shape[0], 8, generator=source) * 0.7 ** torch.arange(8)
    change = left @ torch.randn(8, shape[1], generator=source) * 1e-3
    noise = torch.randn(shape, generator=source) * 5e-4
    return (base + change + noise).bfloat16(), base.bfloat16()
