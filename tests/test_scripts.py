"""scripts/finetune.py and scripts/chat.py, run as a user runs them, on a tiny checkpoint."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_cnllm.data.conversations import load_instructions
from hf_cnllm.demo.dataset import SIGN_OFFS
from hf_cnllm.demo.families import write_tiny_checkpoint

SCRIPTS = Path(__file__).parents[1] / "scripts"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts") / "checkpoint"
    texts = [message["content"] for c in load_instructions() for message in c] + list(SIGN_OFFS.values())
    write_tiny_checkpoint("baichuan", folder, texts)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("scripts") / "data.jsonl"
    path.write_text("\n".join(json.dumps({"messages": c}) for c in load_instructions()[:8]))
    return path


def script(name, *options, **kwargs):
    command = [sys.executable, str(SCRIPTS / name), *map(str, options)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, **kwargs)


@pytest.mark.parametrize(
    ("options", "written"),
    [
        (["--z-loss-weight", "2e-4"], "model.safetensors"),
        (["--lora", "--gradient-checkpointing"], "adapter_model.safetensors"),
    ],
    ids=["full", "lora"],
)
def test_finetune_then_chat(options, written, checkpoint, data, tmp_path):
    output = tmp_path / "out"
    done = script("finetune.py", "--model", checkpoint, "--data", data, "--output", output, "--epochs", 1, *options)
    assert done.returncode == 0, done.stderr
    assert (output / written).is_file() and (output / "tokenizer.model").is_file()
    source = ["--model", checkpoint, "--adapter", output] if "--lora" in options else ["--model", output]
    done = script("chat.py", *source, "--greedy", "--max-new-tokens", 8, input="你好\n/new\nHello\n\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("> ") == 4


def test_bad_data_is_one_line(checkpoint, tmp_path):
    (tmp_path / "data.jsonl").write_text("{}")
    done = script(
        "finetune.py", "--model", checkpoint, "--data", tmp_path / "data.jsonl", "--output", tmp_path / "out"
    )
    assert done.returncode == 1 and "line 1: needs the field 'messages'" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()
