"""What recipes are as commands: a YAML file and flags, and one line for what a user can mend."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from hf_cnllm.training.recipe import RecipeArguments, parse_arguments, run_recipe


def test_a_yaml_file_may_give_one_file_as_a_text():
    arguments = RecipeArguments(model="m", data="one.jsonl", output="o")
    assert arguments.data == ["one.jsonl"] and RecipeArguments("m", ["a", "b"], "o").data == ["a", "b"]


@pytest.mark.parametrize("text", [b"a: [1\nb: :", b"\xff\xfe"])
def test_a_yaml_file_that_is_none(text, tmp_path, monkeypatch, capsys):
    (tmp_path / "odd.yaml").write_bytes(text)
    monkeypatch.setattr(sys, "argv", ["odd", f"--config={tmp_path / 'odd.yaml'}"])
    with pytest.raises(SystemExit) as stopped:
        run_recipe(lambda: parse_arguments("", RecipeArguments, TrainingArguments))
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and "odd.yaml is no YAML" in line


def test_a_config_without_a_file_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["odd", "--model", "m", "--config"])
    with pytest.raises(ValueError, match="--config is given without a file"):
        parse_arguments("", RecipeArguments, TrainingArguments)


def test_weights_of_other_shapes_are_one_line_and_other_failures_are_not_hidden(tmp_path, capsys):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes)).save_pretrained(tmp_path)
    LlamaConfig(vocab_size=8, **sizes | {"hidden_size": 16}).save_pretrained(tmp_path)
    with pytest.raises(SystemExit):
        run_recipe(lambda: LlamaForCausalLM.from_pretrained(tmp_path))
    assert "weights of other shapes than its config.json says" in capsys.readouterr().err
    with pytest.raises(RuntimeError, match="size"):
        run_recipe(lambda: torch.zeros(2) @ torch.zeros(3))


@pytest.mark.parametrize("flags", [["--data", "gone.jsonl"], ["--data=gone.jsonl"], ["--data", "here", "gone.jsonl"]])
def test_a_file_that_is_not_there_is_named_with_its_option(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["sft", *flags])
    with pytest.raises(SystemExit):
        run_recipe(lambda: Path("gone.jsonl").read_text())
    assert capsys.readouterr().err == "sft: error: --data gone.jsonl: there is no such file or folder\n"
