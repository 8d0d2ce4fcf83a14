"""Recipes on several processes: the same losses and weights as on one, and as exact after one of them was killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers

from hf_cnllm.recipes import sft
from hf_cnllm.training.recipe import run_recipe
from sft_models import CHATS, ROWS, loaded, write_checkpoint

WORKER = Path(__file__).parents[1] / "recipe_worker.py"
COMMON = (
    "--use_cpu --report_to none --logging_steps 1 --disable_tqdm true --max_length 128 --per_device_train_batch_size 1"
)
SHARED = "--max_steps 3 --optim sgd --learning_rate 1e-2 --lr_scheduler_type constant --save_strategy no"
KILLED = "--max_steps 5 --save_steps 2"  # AdamW: a checkpoint holds more than the model
TIMEOUT = 900  # DeepSpeed compiles first
WAYS = {
    "ddp": 2,
    "fsdp2": 2,
    "tp": 1,
}  # accelerate configuration -> by how much a step's batch is larger than a process's
SEARCH_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])  # of DeepSpeed's ninja
CHANGES = {"chatglm": {"num_attention_heads": 4}}  # two processes have whole heads


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")

    def write(row):
        name, changes, template = ROWS[row]
        folder = root / row.replace(" ", "-")
        if not folder.exists():
            original = write_checkpoint(name, root / f"{name}-original")
            for part in loaded(original, changes | CHANGES.get(name, {}), template):
                part.save_pretrained(folder)
        return folder

    return write


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Conversations of different lengths: the processes learn different numbers of tokens, and pad differently."""
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("\n".join(json.dumps({"messages": chat}) for chat in CHATS))
    return path


def words(folder, data, output, *options):
    options = " ".join([COMMON, *options]).split()
    return [*map(str, ["--model", folder, "--data", data, "--output", output]), *options]


def start(way, runs, folder, **environment):
    """One process, or two as a configuration of accelerate says."""
    folder.mkdir(exist_ok=True)
    (folder / "runs.json").write_text(json.dumps(runs))
    command = [sys.executable]
    if way is not None:
        command += ["-m", "hf_cnllm", "run", "accelerate", "launch", "--config_file", f"{way}.yaml"]
        command += ["--num_processes", "2", "--main_process_port", "0"]
    with open(folder / "log.txt", "a") as log:
        return subprocess.Popen(
            [*command, str(WORKER), str(folder / "runs.json")],
            env=os.environ | {"DS_ACCELERATOR": "cpu", "PATH": SEARCH_PATH} | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def run(way, runs, folder):
    if way is None:
        for one in runs:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sys, "argv", ["sft", *one])
                sft.main()
        return
    process = start(way, runs, folder)
    try:
        assert process.wait(TIMEOUT) == 0, (folder / "log.txt").read_text()[-3000:]
    finally:
        process.kill()


def losses(output):
    summary = json.loads((output / "summary.json").read_text())
    return torch.tensor([summary["first_loss"], summary["last_loss"]])


def assert_same_training(output, expected):
    torch.testing.assert_close(losses(output), losses(expected), atol=1e-5, rtol=0)
    kind = transformers.AutoModelForSeq2SeqLM if output.name == "glm" else transformers.AutoModelForCausalLM
    models = [kind.from_pretrained(folder).eval() for folder in (output, expected)]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    for name, weight in states[0].items():
        torch.testing.assert_close(
            weight, states[1][name], atol=1e-5, rtol=1e-5, msg=lambda said, name=name: f"{name}: {said}"
        )
    config = models[0].config
    question = {"glm": "gmask_token_id", "chatglm": "gmask_token_id"}.get(output.name)
    start = {"glm": "sop_token_id", "chatglm": "bos_token_id"}.get(output.name)
    ids = [9, 8, *(getattr(config, name) for name in (question, start) if name), 7, 6]
    with torch.no_grad():
        logits = [model(input_ids=torch.tensor([ids])).logits for model in models]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def options_of(row):
    return "--z_loss_weight 0.01" if "alibi" in row else ""


@pytest.fixture(scope="module")
def alone(checkpoint, data, tmp_path_factory):
    """The output of a row's training in one process."""
    root = tmp_path_factory.mktemp("alone")

    def output(row):
        folder = root / row.replace(" ", "-")
        if not folder.exists():
            size = "--per_device_train_batch_size 2"
            run(None, [words(checkpoint(row), data, folder, SHARED, options_of(row), size)], root)
        return folder

    return output


def shared(way, rows, checkpoint, data, tmp_path):
    size = f"--per_device_train_batch_size {2 // WAYS[way]}"
    runs = [words(checkpoint(row), data, tmp_path / row, SHARED, options_of(row), size) for row in rows]
    run(way, runs, tmp_path / "run")


@pytest.mark.slow
def test_two_processes_learn_what_one_learns(checkpoint, data, alone, tmp_path):
    """With max-z, and answers of which one process has more tokens than the other."""
    shared("ddp", ["baichuan alibi"], checkpoint, data, tmp_path)
    assert_same_training(tmp_path / "baichuan alibi", alone("baichuan alibi"))


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_every_family_on_two_processes(way, checkpoint, data, alone, tmp_path):
    if way.startswith("zero"):
        pytest.importorskip("deepspeed")
    rows = [row for row in ROWS if (way, row) != ("tp", "bloom")]  # for which transformers has no plan
    shared(way, rows, checkpoint, data, tmp_path)
    for row in rows:
        assert_same_training(tmp_path / row, alone(row))


def history(output):
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    return [
        entry["loss"]
        for entry in json.loads((last / "trainer_state.json").read_text())["log_history"]
        if "loss" in entry
    ]


def kill_at(moment, rank, way, runs, folder):
    """Runs until a process is where `recipe_worker.MOMENTS` says, and kills it there with a signal nobody can handle."""
    note = folder / "halted"
    process = start(way, runs, folder, HALT_AT=moment, HALT_RANK=str(rank), HALT_FILE=str(note))
    try:
        end = time.monotonic() + TIMEOUT
        while not note.exists():
            assert process.poll() is None and time.monotonic() < end, (folder / "log.txt").read_text()[-3000:]
            time.sleep(0.1)
        os.kill(int(note.read_text()), signal.SIGKILL)
        assert process.wait(TIMEOUT) != 0
    finally:
        process.kill()


@pytest.fixture(scope="module")
def uninterrupted(checkpoint, data, tmp_path_factory):
    """The output of a run that nobody killed, of one process or of two."""
    root = tmp_path_factory.mktemp("uninterrupted")

    def output(way):
        if not (root / f"{way}").exists():
            run(way, [words(checkpoint("baichuan alibi"), data, root / f"{way}", KILLED)], root / f"{way}-run")
        return root / f"{way}"

    return output


def assert_resumes(moment, rank, way, uninterrupted, checkpoint, data, tmp_path):
    output = tmp_path / "out"
    runs = [words(checkpoint("baichuan alibi"), data, output, KILLED)]
    kill_at(moment, rank, way, runs, tmp_path / "run")
    assert not (output / "config.json").exists()  # what is there does not load
    run(way, [[*runs[0], "--resume"]], tmp_path / "run")
    resumed_from = json.loads((output / "summary.json").read_text())["resumed_from"]
    assert resumed_from == f"checkpoint-{RESUMED_FROM[moment]}"
    assert history(output) == history(uninterrupted(way))
    assert (output / "model.safetensors").read_bytes() == (uninterrupted(way) / "model.safetensors").read_bytes()
    assert not list(output.glob("*.final*"))


# The last complete checkpoint at each of the worker's moments; Trainer writes one at the end, too.
RESUMED_FROM = {
    "before a write": 2,
    "inside a write": 2,
    "written, unmarked": 2,
    "after a write": 4,
    "in the last save": 5,
    "half moved": 5,
}


@pytest.mark.slow
@pytest.mark.parametrize("way", [None, "ddp", "fsdp2"])
@pytest.mark.parametrize("moment", RESUMED_FROM)
def test_a_process_killed_at_any_moment_resumes_exactly(moment, way, uninterrupted, checkpoint, data, tmp_path):
    """Of two, the second before a write and inside one, else the first, which writes alone."""
    rank = int(way is not None and moment in ("before a write", "inside a write"))
    assert_resumes(moment, rank, way, uninterrupted, checkpoint, data, tmp_path)


@pytest.mark.parametrize("room", ["for nothing", "for the weights alone"])
def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(
    room, uninterrupted, checkpoint, data, tmp_path, monkeypatch, capsys
):
    resource = pytest.importorskip("resource")
    folder, output, save = checkpoint("baichuan alibi"), tmp_path / "out", sft.SFTTrainer._save_checkpoint
    arguments = words(folder, data, output, KILLED)
    size = 1000 if room == "for nothing" else (folder / "model.safetensors").stat().st_size + 10_000

    def saving(trainer, *args):
        if trainer.state.global_step == 4:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, unlimited[1]))
        save(trainer, *args)

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(sys, "argv", ["sft", *arguments])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
        patch.setattr(sft.SFTTrainer, "_save_checkpoint", saving)
        try:
            run_recipe(sft.main)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line.lower()]
    assert stopped.value.code == 2 and line.startswith(
        f"sft: error: writing into {output} failed, is the disk full? ("
    )
    assert line.endswith("add --resume to go on from checkpoint-2")
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    run(None, [[*arguments, "--resume"]], tmp_path)
    assert history(output) == history(uninterrupted(None))
