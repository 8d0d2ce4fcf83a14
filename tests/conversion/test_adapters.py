"""LoRA adapters of a checkpoint on its export: the same logits as on the original."""

import copy
import json
import shutil

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from exportable import KINDS
from hf_cnllm.cli import USER_ERROR, main

IDS = torch.randint(3, 250, (2, 20), generator=torch.Generator().manual_seed(1))
CONFIGS = {
    "packed": LoraConfig(r=3),
    "everything, DoRA": LoraConfig(r=3, target_modules="all-linear", use_dora=True),
    "biases": LoraConfig(r=2, bias="lora_only"),
    "one layer": LoraConfig(r=3, layers_to_transform=[1], layers_pattern=["layers", "h"]),
}


def adapted(folder, config, output):
    """Saves an adapter with random weights, and returns what the model gives with it."""
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), copy.deepcopy(config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name or (name.endswith("bias") and parameter.requires_grad):
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        model.save_pretrained(output)
        return model(IDS).logits


def logits_with(folder, adapter):
    with torch.no_grad():
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), adapter).eval()(IDS).logits


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["baichuan", "qwen", "chatglm2", "chatglm2-mha", "chatglm2-llama"])
def test_lora(name, config, checkpoint, exported, tmp_path):
    expected = adapted(checkpoint(name), CONFIGS[config], tmp_path / "adapter")
    words = [tmp_path / "adapter", tmp_path / "out", "--to", KINDS[name].target, "--base", exported(name)]
    assert main(["export", *map(str, words)]) == 0
    assert (logits_with(exported(name), tmp_path / "out") - expected).abs().max() < 2e-5
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(exported(name))
    assert any(module.endswith("q_proj") for module in settings["target_modules"])


def test_a_head_that_was_trained_with_it(checkpoint, exported, tmp_path):
    config = LoraConfig(r=3, modules_to_save=["lm_head", "embed_tokens"])
    expected = adapted(checkpoint("baichuan2"), config, tmp_path / "adapter")
    words = [tmp_path / "adapter", tmp_path / "out", "--to", "llama", "--base", exported("baichuan2")]
    assert main(["export", *map(str, words)]) == 0
    assert (logits_with(exported("baichuan2"), tmp_path / "out") - expected).abs().max() < 2e-5


@pytest.mark.parametrize(
    ("name", "config", "reason"),
    [
        ("qwen", IA3Config(), "only LoRA"),
        ("qwen", LoraConfig(rank_pattern={"h.0.attn.c_attn": 2}), "`rank_pattern`"),
        ("baichuan2", LoraConfig(target_modules=["lm_head"]), "normalized after that"),
    ],
)
def test_others_are_refused(name, config, reason, checkpoint, exported, tmp_path, capsys):
    get_peft_model(AutoModelForCausalLM.from_pretrained(checkpoint(name)), config).save_pretrained(
        tmp_path / "adapter"
    )
    words = [tmp_path / "adapter", tmp_path / "out", "--to", KINDS[name].target, "--base", exported(name)]
    assert main(["export", *map(str, words)]) == USER_ERROR
    said = capsys.readouterr().err.splitlines()[-1]
    assert reason in said and "merge it into its model" in said and not (tmp_path / "out").exists()


def test_a_base_of_the_same_shapes_but_another_model(checkpoint, exported, tmp_path, capsys):
    """It took the adapter without a word."""
    adapted(checkpoint("chatglm3"), LoraConfig(r=1), tmp_path / "adapter")
    words = ["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--to", "glm", "--base"]
    assert main([*words, str(exported("chatglm3-32k"))]) == USER_ERROR
    assert "(another `rope_parameters`)" in capsys.readouterr().err
    shutil.copytree(exported("chatglm3"), tmp_path / "base")
    file = tmp_path / "base" / "original" / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_bytes()) | {"generation": "chatglm2"}))
    assert main([*words, str(tmp_path / "base")]) == USER_ERROR
    assert "(chatglm2, not chatglm3)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_base_is_asked_for(checkpoint, exported, tmp_path, capsys):
    adapted(checkpoint("qwen"), LoraConfig(r=1), tmp_path / "adapter")
    words = ["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--to", "qwen2"]
    assert main(words) == USER_ERROR and "--base" in capsys.readouterr().err
    assert main([*words, "--base", str(exported("baichuan"))]) == USER_ERROR
    assert "not the export of the model" in capsys.readouterr().err
    words = [
        "export",
        str(checkpoint("qwen")),
        str(tmp_path / "out"),
        "--to",
        "qwen2",
        "--base",
        str(exported("qwen")),
    ]
    assert main(words) == USER_ERROR and "go together" in capsys.readouterr().err
    words = ["export", str(tmp_path / "adapter"), str(tmp_path / "out"), "--to", "original", "--base", "x"]
    assert main(words) == USER_ERROR and "adapters do not go back" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
