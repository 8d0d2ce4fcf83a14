"""From `push_to_hub` to loading by name, against a stand-in of the Hub."""

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint
from hf_cnllm.hub import remote_code
from hub_stand_in import serving

PUSHER = Path(__file__).with_name("pusher.py")
MODEL_FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
REFUSALS = {
    "wrong token": "does not know the token",
    "wrong token, existing name": "does not know the token",
    "token for reading": "may not write to me/new",
    "token for reading, existing name": "may not write to me/model",
    "somebody else's name": "may not write to you/taken",
    "somebody else's new name": "may not write to you/new",
    "no name": "'me/a b'",
    "dropped": "push to me/dropped again",
}


def start(hub, work: Path, *arguments: object) -> subprocess.Popen:
    (work / "tmp").mkdir(exist_ok=True)
    environment = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(work / "home"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_mine",
        "TMPDIR": str(work / "tmp"),
    }
    command = [sys.executable, str(PUSHER), *map(str, arguments)]
    hears = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a run in the background does not
    options = {"env": os.environ | environment, "cwd": work, "text": True, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, preexec_fn=hears, **options)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("push") / "checkpoint"
    write_tiny_checkpoint("baichuan", folder)
    return folder


@pytest.fixture(scope="module")
def week(checkpoint):
    work = checkpoint.parent
    with serving() as hub:
        hub.drop, hub.count = r"POST /api/models/me/dropped/commit", 1
        done = start(hub, work, "week", checkpoint, work / "outcomes.json")
        _, errors = done.communicate()
        assert done.returncode == 0, errors[-3000:]
        yield hub, json.loads((work / "outcomes.json").read_text())


def card(hub, name: str) -> ModelCard:
    return ModelCard(hub.repositories[name].files["README.md"].decode())


def test_what_was_pushed_loads_by_its_name(week):
    _, told = week
    assert [name for name, holds in told.items() if holds is False] == []
    assert sum(holds is True for holds in told.values()) == 5


def test_every_push_is_one_commit_of_whole_files(week):
    hub, _ = week
    files = {name: set(repository.files) for name, repository in hub.repositories.items()}
    commits = {name: len(repository.commits) - 1 for name, repository in hub.repositories.items()}
    assert files["me/merged"] == files["me/dropped"] == MODEL_FILES and files["me/model"] > MODEL_FILES
    assert {f"{remote_code.MODEL}.py", f"{remote_code.TOKENIZER}.py"} < files["me/copy"]
    assert commits["me/model"] == commits["me/copy"] == 2 and commits["me/merged"] == commits["me/dropped"] == 1


def test_cards_say_what_it_is_and_how_it_loads(week):
    hub, _ = week
    model, merged, copy = card(hub, "me/model"), card(hub, "me/merged"), card(hub, "me/copy")
    assert (model.data.library_name, model.data.pipeline_tag) == ("transformers", "text-generation")
    assert {"hf_cnllm", "baichuan", "baichuan2"} <= set(model.data.tags) and model.data.language == ["zh", "en"]
    assert (model.data.license, model.data.license_name) == ("other", "baichuan2-community-license")
    assert model.data.base_model is None and merged.data.base_model == "me/model"
    for loading in ("import hf_cnllm", 'AutoModelForCausalLM.from_pretrained("me/model")'):
        assert loading in model.text
    assert 'from_pretrained("me/copy", trust_remote_code=True)' in copy.text and "\nimport hf_cnllm" not in copy.text
    tokenizer = card(hub, "me/tokenizer")
    assert "import hf_cnllm" in tokenizer.text and "hf_cnllm" in tokenizer.data.tags


def test_the_card_of_an_adapter(week):
    hub, _ = week
    adapter = card(hub, "me/adapter")
    assert (adapter.data.library_name, adapter.data.base_model) == ("peft", "me/model")
    assert (
        'AutoPeftModelForCausalLM.from_pretrained("me/adapter")' in adapter.text and "import hf_cnllm" in adapter.text
    )


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_is_one_line_and_uploads_nothing(name, week):
    hub, told = week
    _, message = told[name]
    assert REFUSALS[name] in message and "\n" not in message
    assert "me/new" not in hub.repositories and "you/new" not in hub.repositories
    assert hub.repositories["you/taken"].files == {}


def test_a_push_that_is_interrupted_leaves_nothing(checkpoint, tmp_path):
    with serving() as hub:
        hub.hold = r"PUT /storage/"
        process = start(hub, tmp_path, "interrupted", checkpoint)
        assert hub.held.wait(60), process.stderr.read()
        process.send_signal(signal.SIGINT)
        hub.released.set()
        _, errors = process.communicate(timeout=60)
        assert process.returncode != 0 and errors.rstrip().endswith("KeyboardInterrupt")
        assert hub.repositories["me/interrupted"].files == {}
        assert list((tmp_path / "tmp").iterdir()) == []
