"""Tiny adapters, checkpoints and models, made on the spot from a seed. Shapes are odd on purpose: nothing fits by luck.

The writers here are PEFT's format by hand, so that our own reader and writer are never tested against themselves.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from repair.calibration import Calibration, CalibrationSettings, Identity, MeasuredModule, write_calibration
from repair.lora import LayerKind, LoraAdapter, LoraLayer
from repair.units import with_unit_scores

Shapes = Mapping[str, tuple[int, int]]

SHAPES: Shapes = {
    "model.layers.0.self_attn.q_proj": (61, 53),
    "model.layers.0.self_attn.k_proj": (17, 53),
    "model.layers.0.mlp.up_proj": (97, 53),
    "model.layers.0.mlp.down_proj": (53, 97),
    "model.layers.1.self_attn.q_proj": (61, 53),
    "model.layers.1.self_attn.k_proj": (17, 53),
    "model.layers.1.mlp.up_proj": (97, 53),
    "model.layers.1.mlp.down_proj": (53, 97),
}
"""Modules of a model that does not exist, (out, in): wide, narrow and tall ones."""


def generator(seed: int) -> torch.Generator:
    """A seeded source of numbers."""
    return torch.Generator().manual_seed(seed)


def layer(
    name: str = "model.layers.0.mlp.up_proj",
    shape: tuple[int, int] = (97, 53),
    *,
    rank: int = 3,
    seed: int = 0,
    scale: float = 2.0,
    **fields: Any,
) -> LoraLayer:
    """One layer with random factors."""
    source = generator(seed)
    a = torch.randn(rank, shape[1], generator=source) * 0.1
    b = torch.randn(shape[0], rank, generator=source) * 0.1
    return LoraLayer(name=name, a=a, b=b, scale=scale, **fields)


def adapter(shapes: Shapes = SHAPES, *, rank: int = 3, seed: int = 0, scale: float = 2.0) -> LoraAdapter:
    """An adapter over all of ``shapes``."""
    layers = [
        layer(name, shape, rank=rank, seed=seed + at, scale=scale) for at, (name, shape) in enumerate(shapes.items())
    ]
    return LoraAdapter(layers=tuple(layers), config=adapter_config(rank=rank, alpha=int(scale * rank)))


def adapter_config(*, rank: int = 3, alpha: int = 6, **keys: Any) -> dict[str, Any]:
    """A config as PEFT writes it."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": ["q_proj", "k_proj", "up_proj", "down_proj"],
        "bias": "none",
        "use_rslora": False,
        "use_dora": False,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "inference_mode": True,
        **keys,
    }


def adapter_tensors(made: LoraAdapter, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The tensors of an adapter under the names that PEFT gives them."""
    tensors: dict[str, Tensor] = {}
    for one in made.layers:
        prefix = f"base_model.model.{one.name}."
        if one.kind is LayerKind.EMBEDDING:
            tensors |= {f"{prefix}lora_embedding_A": one.a.to(dtype), f"{prefix}lora_embedding_B": one.b.to(dtype)}
            continue
        tensors |= {f"{prefix}lora_A.weight": one.a.to(dtype), f"{prefix}lora_B.weight": one.b.to(dtype)}
        if one.bias is not None:
            tensors[f"{prefix}lora_B.bias"] = one.bias.to(dtype)
        if one.magnitude is not None:
            tensors[f"{prefix}lora_magnitude_vector"] = one.magnitude.to(dtype)
    return tensors


def write_adapter_files(directory: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """An adapter folder, by hand."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / "adapter_model.safetensors")
    (directory / "adapter_config.json").write_text(json.dumps(dict(config)))
    return directory


def tiny_adapter_dir(directory: Path, *, seed: int = 0, rank: int = 3, dtype: torch.dtype = torch.float32) -> Path:
    """A plain adapter over `SHAPES` on disk."""
    made = adapter(seed=seed, rank=rank)
    return write_adapter_files(directory, adapter_tensors(made, dtype), made.config)


def write_checkpoint(directory: Path, tensors: Mapping[str, Tensor], *, shards: int = 1) -> Path:
    """A model folder with its weights in one file, or dealt out to several with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    whole = {key: tensor.contiguous() for key, tensor in tensors.items()}
    if shards == 1:
        save_file(whole, directory / "model.safetensors")
        return directory
    files = {key: f"model-{at % shards:05d}-of-{shards:05d}.safetensors" for at, key in enumerate(sorted(whole))}
    for name in sorted(set(files.values())):
        save_file({key: whole[key] for key, where in files.items() if where == name}, directory / name)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return directory


def weights(shapes: Shapes = SHAPES, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Random weights, one ``.weight`` for each module."""
    source = generator(seed)
    return {f"{name}.weight": torch.randn(shape, generator=source).to(dtype) for name, shape in shapes.items()}


def aligned_from(base: Mapping[str, Tensor], *, seed: int = 1, rank: int = 4) -> dict[str, Tensor]:
    """What alignment made of ``base``: a low-rank change with a falling spectrum and a little of everything else."""
    source = generator(seed)
    aligned = {}
    for key, weight in base.items():
        out_features, in_features = weight.shape
        u = torch.randn(out_features, rank, generator=source) * torch.tensor([0.5**i for i in range(rank)])
        change = u @ torch.randn(rank, in_features, generator=source) * 0.2
        noise = torch.randn(weight.shape, generator=source) * 0.02
        aligned[key] = (weight.float() + change + noise).to(weight.dtype)
    return aligned


def tiny_pair(
    directory: Path, *, shapes: Shapes = SHAPES, seed: int = 0, dtype: torch.dtype = torch.bfloat16, shards: int = 1
) -> tuple[Path, Path]:
    """Folders (aligned, base) of a model that does not run but has weights."""
    base = weights(shapes, seed=seed, dtype=dtype)
    aligned = aligned_from(base, seed=seed + 1)
    return (
        write_checkpoint(directory / "aligned", aligned, shards=shards),
        write_checkpoint(directory / "base", base, shards=shards),
    )


MODEL_DIGEST = f"sha256:{'7' * 64}"
"""Stands for the aligned model of `calibration`; nobody has that model."""


def calibration(
    directory: Path,
    shapes: Shapes = SHAPES,
    *,
    directions: int = 5,
    seed: int = 0,
    heads: int = 1,
    units: bool = True,
    aligned: str = MODEL_DIGEST,
) -> Calibration:
    """A written and opened calibration with random numbers for all of ``shapes``."""
    source = generator(seed)
    modules = {name: _measured(shape, directions, source, units=units) for name, shape in shapes.items()}
    norms = {name: torch.rand(shape[1], generator=source) for name, shape in shapes.items()}
    settings = CalibrationSettings(directions=directions, seed=seed)
    identity = Identity(aligned=aligned, rows="sha256:rows", dtype="float32", settings=settings)
    write_calibration(identity, with_unit_scores(modules, norms, heads), directory, about={})
    return Calibration.open(directory, aligned=aligned)


def _measured(shape: tuple[int, int], directions: int, source: torch.Generator, *, units: bool) -> MeasuredModule:
    out_features, in_features = shape
    values = torch.tensor([0.6**i for i in range(directions)])
    tensors = {
        "gradient.u": _orthonormal(out_features, directions, source),
        "gradient.values": values * 0.3,
        "gradient.v": _orthonormal(in_features, directions, source),
        "gradient.bias": torch.randn(out_features, generator=source) * 0.1,
    }
    for side, width in (("inputs", in_features), ("outputs", out_features)):
        for topic in ("harmful", "benign"):
            basis = _orthonormal(width, directions, source)
            tensors |= {
                f"{side}.{topic}.mean": torch.randn(width, generator=source) * 0.1,
                f"{side}.{topic}.squares": (basis.square() * values).sum(1)
                + 0.02 * torch.rand(width, generator=source),
                f"{side}.{topic}.basis": basis,
                f"{side}.{topic}.values": values,
            }
    numbers = {"gradient_total": 0.3}
    if units:  # where no known reader gives other ones
        tensors["units"] = torch.randn(out_features, generator=source)
        numbers |= {"unit_width": 1.0, "unit_reads": 0.0}
    return MeasuredModule(shape=shape, tensors=tensors, numbers=numbers)


def _orthonormal(width: int, columns: int, source: torch.Generator) -> Tensor:
    found: Tensor = torch.linalg.qr(torch.randn(width, columns, generator=source))[0]
    return found


def tiny_llama(
    directory: Path,
    *,
    seed: int = 0,
    tie: bool = False,
    words: Sequence[str] | None = None,
    sizes: tuple[int, int] = (32, 56),
    shards: int = 1,
) -> Path:
    """A Llama with two small blocks that runs, saved as a model folder; with ``words`` also a tokenizer that chats.

    ``sizes`` are those of the hidden and of the intermediate states.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128 if words is None else len(words) + 4,
        hidden_size=sizes[0],
        intermediate_size=sizes[1],
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    if shards > 1:
        whole = load_file(directory / "model.safetensors")
        (directory / "model.safetensors").unlink()
        write_checkpoint(directory, whole, shards=shards)
    if words is not None:
        _save_tokenizer(directory, words)
    return directory


def _save_tokenizer(directory: Path, words: Sequence[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>"]
    vocabulary = {word: at for at, word in enumerate([*special, *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ '<s> ' + message['content'] + ' </s> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<s> ' }}{% endif %}"
    )
    tokenizer.save_pretrained(directory)
