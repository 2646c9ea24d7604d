"""A tiny world of each family: a model that chats, its base, an adapter by PEFT, a patch, and a calibration."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer

from repair.adapter_file import read_adapter
from repair.calibrate import measure_modules
from repair.calibration import Calibration, CalibrationSettings, Identity, MeasuredModule, write_calibration
from repair.checkpoint import Checkpoint
from repair.checks.chat import ChatModel
from repair.context import RepairContext
from repair.lora import LoraAdapter
from repair.refusing import CalibrationRows, calibration_rows
from tests import tiny
from tests.repair import families

WORDS = "how do I a the to make help me write with your you for is of i'm can't sorry, but that".split()  # noqa: SIM905
SETTINGS = CalibrationSettings(prompts=8, question_tokens=4, answer_tokens=2, gradient_prompts=2, directions=64)


@dataclass(frozen=True, kw_only=True)
class World:
    """All that there is to know about one model of a family."""

    family: str
    folder: Path

    @cached_property
    def model(self) -> Any:
        return families.model(self.family)

    @cached_property
    def chat(self) -> ChatModel:
        tiny._save_tokenizer(self.folder / "tokenizer", WORDS)
        return ChatModel(families.model(self.family), AutoTokenizer.from_pretrained(self.folder / "tokenizer"))

    @cached_property
    def adapter(self) -> LoraAdapter:
        """On every kind of linear, and on the experts where they are fused."""
        experts = {"target_parameters": families.PARAMETERS} if self.family in families.FUSED else {}
        return self._trained("in", **experts)

    @cached_property
    def rows(self) -> CalibrationRows:
        return calibration_rows(SETTINGS)

    @cached_property
    def measured(self) -> dict[str, MeasuredModule]:
        return measure_modules(self.chat, self.rows, SETTINGS)

    @cached_property
    def calibration(self) -> Calibration:
        identity = Identity(aligned=tiny.MODEL_DIGEST, rows="r", dtype="float32", settings=SETTINGS)
        write_calibration(identity, self.measured, self.folder / "calibration", about={})
        return Calibration.open(self.folder / "calibration", aligned=tiny.MODEL_DIGEST)

    @cached_property
    def context(self) -> RepairContext:
        return RepairContext(
            aligned=Checkpoint.open(families.folder(self.family, self.folder / "aligned")),
            base=Checkpoint.open(families.folder(self.family, self.folder / "base", seed=1)),
            patch=self._trained("patch", r=2, layers_to_transform=[1]),
            calibration=self.calibration,
            chat=self.chat,
        )

    def _trained(self, name: str, **config: Any) -> LoraAdapter:
        turned = {"fan_in_fan_out": True} if self.family == "gpt2" else {}
        given = {"target_modules": families.TARGETS[self.family], **turned, **config}
        families.trained(self.model, self.folder / name, **given)
        return read_adapter(self.folder / name)


def loaded(made: Any, directory: Path) -> Any:
    """As PEFT loads it, on ``made`` itself; any key that is missing or too many is an error."""
    config = PeftConfig.from_pretrained(directory)
    config.base_model_name_or_path = None  # PEFT warns that a model made on the spot has no name
    adapted = get_peft_model(made, config)
    result = set_peft_model_state_dict(adapted, load_file(directory / "adapter_model.safetensors"))
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    return adapted
