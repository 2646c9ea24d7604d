"""Train with PEFT's own layers and save as PEFT saves: what the zoo ships is what users upload.

The base model is left as it was found, so that one loaded model serves for every adapter.
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file, save_file

from examples.zoo.recipes import Recipe
from repair import linalg
from repair.checks.chat import ChatModel
from repair.tuning import Example, TuneSettings, fit

ALIGNED: Final = "smollm2-135m-aligned"
WEIGHTS: Final = "adapter_model.safetensors"
CONFIG: Final = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """A round of training, ready to run."""

    examples: Sequence[Example]
    settings: TuneSettings
    progress: Callable[[str, float], None]


def train_and_write(
    chat: ChatModel, lessons: Sequence[Lesson], recipe: Recipe, out: Path, *, start: Path | None = None
) -> None:
    """Train one adapter on ``chat`` and leave its folder at ``out``, replacing an older one.

    ``start`` is a folder with the factors to begin with, where an earlier round was trained before.
    """
    settings = recipe.rounds[0].settings
    torch.manual_seed(settings.seed)
    layers = None if settings.blocks is None else list(range(*settings.blocks))
    shape: dict[str, Any] = {"r": settings.rank, "lora_alpha": settings.alpha, "target_modules": list(settings.targets)}
    config = LoraConfig(
        **{**shape, **recipe.peft}, layers_to_transform=layers, bias="none", task_type="CAUSAL_LM", lora_dropout=0.0
    )
    wrapped = get_peft_model(chat.model, config, autocast_adapter_dtype=True)
    try:
        if start is None:
            _start_wide(wrapped, settings.seed)
        else:
            set_peft_model_state_dict(wrapped, load_file(start / WEIGHTS))
        parameters = [p for p in wrapped.parameters() if p.requires_grad]
        for lesson in lessons:
            fit(
                chat.model,
                chat.tokenizer,
                parameters,
                lesson.examples,
                lesson.settings,
                without=wrapped.disable_adapter,
                progress=lesson.progress,
            )
        partial = out.with_name(out.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        wrapped.save_pretrained(partial)
    finally:
        chat.model = wrapped.unload()
    _tidy(partial)
    if recipe.shipped_rank is not None:
        _shrink(partial, recipe.shipped_rank)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)


def _start_wide(wrapped: Any, seed: int) -> None:
    """First factors as `tune_lora` starts them: wider than PEFT's, which halves the steps needed here."""
    source = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if ".lora_A." in name:
            drawn = torch.randn(parameter.shape, generator=source) / math.sqrt(parameter.shape[1])
            parameter.data.copy_(drawn)


def _shrink(folder: Path, rank: int) -> None:
    """Keep the largest singular components of each update, in balanced factors, at a scale of one."""
    tensors = load_file(folder / WEIGHTS)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    scale = config["lora_alpha"] / config["r"]
    for key in [key for key in tensors if ".lora_A." in key]:
        other = key.replace(".lora_A.", ".lora_B.")
        found = linalg.balanced(tensors[other].float(), tensors[key].float(), scale)
        tensors[other] = found.b[:, :rank].to(torch.bfloat16).contiguous()
        tensors[key] = found.a[:rank].to(torch.bfloat16).contiguous()
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
    config |= {"r": rank, "lora_alpha": float(rank)}
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tidy(folder: Path) -> None:
    """bfloat16 factors, no path of this machine, nothing but the two files."""
    tensors = load_file(folder / WEIGHTS)
    small = {k: t if k.endswith("lora_magnitude_vector") else t.to(torch.bfloat16) for k, t in tensors.items()}
    save_file(small, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = ALIGNED
    config["target_modules"] = sorted(config["target_modules"])
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in folder.iterdir():
        if path.name not in {WEIGHTS, CONFIG}:
            path.unlink()
