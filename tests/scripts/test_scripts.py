"""The scripts for users, run as a user runs them, on tiny models."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cnllm.data.conversations import load_instructions
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint

SCRIPTS = Path(__file__).parents[2] / "scripts"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts") / "checkpoint"
    write_tiny_checkpoint("baichuan", folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("scripts") / "data.jsonl"
    path.write_text("\n".join(json.dumps({"messages": c}) for c in load_instructions()[:8]))
    return path


def script(name, *options, **kwargs):
    file = [str(SCRIPTS / name)] if name.endswith(".py") else ["-m", f"hf_cnllm.recipes.{name}"]
    command = [sys.executable, *file, *map(str, options)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **kwargs)


@pytest.mark.parametrize(
    ("options", "written"),
    [
        (["--z_loss_weight", "2e-4"], "model.safetensors"),
        (["--use_peft", "--gradient_checkpointing"], "adapter_model.safetensors"),
    ],
    ids=["full", "lora"],
)
def test_sft_then_chat(options, written, checkpoint, data, tmp_path):
    output = tmp_path / "out"
    words = ["--output", output, "--num_train_epochs", 1, *options]
    done = script("sft", "--model", checkpoint, "--data", data, *words)
    assert done.returncode == 0, done.stderr
    assert (output / written).is_file() and (output / "tokenizer.model").is_file()
    command = [sys.executable, "-m", "hf_cnllm", "chat", str(output), "--greedy", "--max-new-tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, input="你好\n/clear\nHello\n", check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("(a new chat)") == 1


def test_bad_data_is_one_line(checkpoint, tmp_path):
    (tmp_path / "data.jsonl").write_text("{}")
    done = script("sft", "--model", checkpoint, "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out")
    assert done.returncode == 2 and "line 1: needs the field 'messages'" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_pretraining_glm_shows_losses_and_a_filled_blank(tmp_path):
    texts = [message["content"].replace("\n", " ") for c in load_instructions() for message in c]
    (tmp_path / "texts.txt").write_text("\n".join(texts), encoding="utf-8")
    write_tiny_checkpoint("glm", tmp_path / "glm")
    (tmp_path / "glm" / "model.safetensors").unlink()  # its configuration, and a new model
    options = ["--model", tmp_path / "glm", "--data", tmp_path / "texts.txt", "--max_steps", 4, "--max_length", 64]
    options += ["--infill", "今天[MASK]很好[MASK]。"]
    done = script("pretrain_glm.py", "--output", tmp_path / "out", *options)
    assert done.returncode == 0, done.stderr
    for objective in ("token", "sentence", "document"):
        assert f"| {objective} | " in done.stdout
    assert "今天[MASK]很好[MASK]。\n-> " in done.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()
    again = script("pretrain_glm.py", "--output", tmp_path / "out", *options)
    assert again.returncode == 2 and "is not empty" in again.stderr


STUDIES = {
    "length_extrapolation": "--steps 2 --length 16 --eval-tokens 512",
    "stability": "--steps 10 --rates 1e-3 10 --seeds 0 --hidden-size 32",
    "scaling_law": "--widths 8 16 24 32 --tokens-per-parameter 0.3 --eval-tokens 4096",
    "blank_infilling": "--steps 2 --seeds 0 --words 8 --vocabulary 300 --length 48 --hidden-size 16",
    "efficiency": "--lengths 64 128 --hidden-size 64 --vocabulary 2000 --train-tokens 32 --rounds 1",
}


@pytest.mark.parametrize("study", STUDIES)
def test_a_study_writes_table_numbers_and_plot(study, tmp_path):
    done = script(f"{study}.py", *STUDIES[study].split(), "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "plot.png").stat().st_size > 5000
    assert (tmp_path / "out" / "table.md").read_text(encoding="utf-8") in done.stdout + "\n"
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    if study == "stability":
        assert {name for name, runs in results.items() if runs[-1]["diverged"]} >= {"plain head", "plain head + max-z"}
    if study == "blank_infilling":
        assert {name for name, (run,) in results["models"].items() if 1 < run["perplexity"] < 600} == set(
            results["models"]
        )
    if study == "efficiency":
        assert results["int4_gb"]["ChatGLM2-6B"]["8192"] < 6 < results["int4_gb"]["ChatGLM-6B"]["8192"]


def test_perplexity_by_length(checkpoint, tmp_path):
    text = "人工智能正在改变世界。Hello, world. " * 20
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    words = [checkpoint, "--data", tmp_path / "text.txt", "--output", tmp_path / "out", "--lengths"]
    done = script("perplexity.py", *words, 16, 48)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())["perplexity"]
    ids = torch.tensor(AutoTokenizer.from_pretrained(checkpoint)(text, add_special_tokens=False)["input_ids"])
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto").eval()
    for length in (16, 48):
        stretches = ids[: len(ids) // length * length].view(-1, length)
        with torch.no_grad():
            loss = model(stretches, labels=stretches).loss
        assert found[str(length)] == pytest.approx(loss.exp().item(), rel=1e-3)
    done = script("perplexity.py", *words, 10_000)
    assert done.returncode == 2 and "tokens, so each must be from 2 to" in done.stderr
    done = script("perplexity.py", tmp_path / "nowhere", *words[1:], 16)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"perplexity.py: error: MODEL: there is no folder {tmp_path / 'nowhere'}"


def test_the_law_is_found_in_its_own_values():
    """scaling_law.fit on a = 30, b = -0.2, L_inf = 1.5."""
    done = subprocess.run(
        [sys.executable, "-c", "from scaling_law import fit; print(*fit(*zip(*[(10.0**n, 30 * 10 ** (-0.2 * n) + 1.5) for n in range(5, 11)])))"],
        capture_output=True, text=True, check=True, cwd=SCRIPTS,
    )  # fmt: skip
    assert [float(number) for number in done.stdout.split()] == pytest.approx([30, -0.2, 1.5], rel=0.02)


def test_the_table_of_quantizations(tmp_path):
    table = tmp_path / "table.md"
    done = script(
        "quantization_table.py", "--families", "chatglm", "--steps", 1, "--methods", "chatglm-int8", "--output", table
    )
    assert done.returncode == 0, done.stderr
    floats, integers = ([cell.strip() for cell in row.split("|")[2:-1]] for row in table.read_text().splitlines()[2:])
    assert (floats[0], floats[1], integers[0], integers[1]) == ("float32", "0 of 17", "chatglm-int8", "16 of 17")
    assert integers[-1] == "identical"


def test_every_section_of_the_gpu_report_runs(tmp_path):
    done = script("gpu_report.py", "--output", tmp_path / "out", "--quick")
    assert done.returncode == 0, done.stdout
    report = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert report.count("\n## ") == report.count(": done\n") == 7
