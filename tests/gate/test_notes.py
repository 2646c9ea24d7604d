"""What a person should know about an adapter that is let in."""

from pathlib import Path

import pytest

from gate.admission import admit
from tests import tiny

QUANTISED = ["unsloth/llama-3-8b-bnb-4bit", "org/Model-7B-GPTQ", "org/model.awq", "org/m-8bit", "org/qwen2-7b-int4"]
PLAIN = ["meta-llama/Llama-3.1-8B-Instruct", "org/bitnet-base", "HuggingFaceTB/SmolLM2-135M", "org/abit-4", ""]


@pytest.mark.parametrize("name", [*QUANTISED, *PLAIN])
def test_a_quantised_base_is_pointed_out(tmp_path: Path, name: str) -> None:
    """The factors are not quantised, but what they are repaired against must not be either."""
    made = tiny.adapter()
    config = {**made.config, "base_model_name_or_path": name}

    notes = admit(tiny.write_adapter_files(tmp_path, tiny.adapter_tensors(made), config)).notes

    assert any("16 bit originals" in note for note in notes) == (name in QUANTISED)
