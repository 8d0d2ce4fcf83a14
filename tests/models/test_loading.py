"""Checkpoints that are damaged or another family's end in one clear error."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForMultipleChoice

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


@pytest.fixture
def sharded(tmp_path):
    AutoModelForCausalLM.from_pretrained(GOLDENS / "qwen").save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


INDEX = "model.safetensors.index.json"


def other_model():
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / "qwen")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    return model


def is_loaded_as(folder, model):
    state = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("size", ["20KB", "60KB", "1GB"])
@pytest.mark.parametrize("variant", [None, "fp16"])
def test_saving_over_shards_gives_the_new_model(size, variant, sharded):
    new = other_model()
    new.save_pretrained(sharded, max_shard_size=size, variant=variant)
    assert not list(sharded.glob("*.unfinished"))
    state = AutoModelForCausalLM.from_pretrained(sharded, variant=variant).state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in new.state_dict().items())
    if variant:  # beside it, the older one
        assert is_loaded_as(sharded, AutoModelForCausalLM.from_pretrained(GOLDENS / "qwen"))


def test_a_save_that_is_interrupted_among_shards_leaves_nothing_that_loads(sharded, monkeypatch):
    written = []

    def save_or_die(*args, **kwargs):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(args)
        return save_file(*args, **kwargs)

    monkeypatch.setattr("transformers.modeling_utils.safe_save_file", save_or_die)
    with pytest.raises(KeyboardInterrupt):
        other_model().save_pretrained(sharded, max_shard_size="20KB")
    monkeypatch.undo()
    with pytest.raises(OSError, match="was interrupted: its shards"):
        AutoModelForCausalLM.from_pretrained(sharded)
    other_model().save_pretrained(sharded, max_shard_size="20KB")
    assert is_loaded_as(sharded, other_model()) and not list(sharded.glob("*.unfinished"))


def test_a_save_that_writes_no_weights_leaves_the_older_ones(sharded):
    model = other_model()
    with pytest.raises(ValueError):
        model.save_pretrained(sharded, max_shard_size="many")
    assert is_loaded_as(sharded, AutoModelForCausalLM.from_pretrained(GOLDENS / "qwen"))
    model.save_pretrained(sharded, is_main_process=False, max_shard_size="20KB")
    assert is_loaded_as(sharded, AutoModelForCausalLM.from_pretrained(GOLDENS / "qwen"))


@pytest.mark.parametrize("auto_class", [AutoModelForMultipleChoice, AutoModelForCausalLM])
def test_code_named_by_auto_map_does_not_run_for_classes_that_a_family_lacks_either(auto_class, tmp_path):
    shutil.copytree(GOLDENS / "qwen", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config["auto_map"] = {auto_class.__name__: "planted.Model"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    (tmp_path / "model" / "planted.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w').close()")
    try:
        auto_class.from_pretrained(tmp_path / "model", trust_remote_code=True)
    except ValueError as error:
        assert "has no model for AutoModelForMultipleChoice" in str(error) and auto_class is AutoModelForMultipleChoice
    assert not (tmp_path / "it-ran").exists()
