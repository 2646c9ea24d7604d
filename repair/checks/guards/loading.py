"""A judge's folder of weights: read from disk alone, nothing of it run, and what it is in digests."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import AutoConfig, AutoTokenizer

from repair.checks.arms import torch_dtype_for
from repair.checks.errors import JudgeUnusable
from repair.checks.guards.contract import digest_of
from repair.checks.judge_settings import JudgeSettings
from repair.report import digests

_CHUNK: Final = 8192  # tokens that Llama 4 attends to at once, where its configuration does not say


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model on its device, its tokenizer, and the digests of both."""

    model: Any
    tokenizer: Any
    identity: dict[str, str]


def load_folder(settings: JudgeSettings, kind: Any) -> Loaded:
    """The model as ``kind`` of transformers' classes: bf16 on a GPU, fp32 on the CPU. Raises JudgeUnusable."""
    if settings.model is None or not Path(settings.model).is_dir():
        raise JudgeUnusable("a folder with the judge's weights is wanted", field="model", file=settings.model or "")
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    given = {"local_files_only": True, "trust_remote_code": False}
    try:
        config = AutoConfig.from_pretrained(settings.model, **given)
        text = getattr(config, "text_config", config)
        if getattr(text, "attention_chunk_size", _CHUNK) is None:
            text.attention_chunk_size = _CHUNK
        dtype = torch_dtype_for(torch.device(device))
        model = kind.from_pretrained(settings.model, config=config, dtype=dtype, use_safetensors=True, **given)
        tokenizer = AutoTokenizer.from_pretrained(settings.model, **given)
    except (OSError, ValueError, KeyError) as error:
        raise JudgeUnusable(f"cannot be loaded: {type(error).__name__}", field="model", file=settings.model) from error
    if not tokenizer.is_fast:
        raise JudgeUnusable("its tokenizer cannot tell where a token stands", field="model", file=settings.model)
    return Loaded(
        model=model.to(device),
        tokenizer=tokenizer,
        identity={
            "model": digests(Path(settings.model))["digest"],
            "template": digest_of(str(tokenizer.chat_template or "")),
            "dtype": str(model.dtype).removeprefix("torch."),
        },
    )
