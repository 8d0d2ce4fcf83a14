"""Checkpoints that are damaged or another family's end in one clear error."""

import shutil

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_cnllm  # noqa: F401
from goldens import GOLDENS


def damaged_checkpoint(folder, change):
    shutil.copy(GOLDENS / "baichuan2_13b" / "config.json", folder)
    weights = (GOLDENS / "baichuan2_13b" / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(change(weights))
    return folder


@pytest.mark.parametrize(
    "change", [lambda data: data[: len(data) // 2], lambda data: b"garbage" * 99, lambda data: b""]
)
def test_a_damaged_weight_file_is_named(change, tmp_path):
    with pytest.raises(OSError, match=r"model\.safetensors is damaged or truncated"):
        AutoModelForCausalLM.from_pretrained(damaged_checkpoint(tmp_path, change))


def test_weights_of_another_family_are_refused(tmp_path):
    shutil.copy(GOLDENS / "baichuan2_13b" / "config.json", tmp_path)
    weights = load_file(GOLDENS / "qwen" / "model.safetensors")
    weights.pop("lm_head.weight")
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="another family's checkpoint"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
