"""Who owns an output folder, where a resumed run begins, what stops a training and what it leaves behind."""

import errno
import json

import pytest
import torch
from datasets import Dataset
from filelock import FileLock
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from hf_cnllm.data.owned_folder import LOCK_FILE
from hf_cnllm.recipes.reward import RewardArguments
from hf_cnllm.recipes.sft import SFTArguments
from hf_cnllm.training.recipe import RecipeArguments
from hf_cnllm.training.run import COMPLETE_FILE, SUMMARY_FILE, StopAtNonFiniteLoss, last_complete_checkpoint, open_run


class LineConfig(PreTrainedConfig):
    model_type = "line"


class Line(PreTrainedModel):
    """y = w x, with the loss (w x)²."""

    config_class = LineConfig

    def __init__(self, config):
        super().__init__(config)
        self.weight = nn.Parameter(torch.ones(1))
        self.post_init()

    def forward(self, x, labels=None):
        return {"loss": (self.weight * x).square().mean()}


class LineTrainer(StopAtNonFiniteLoss, Trainer):
    pass


def arguments(folder, **changes):
    LineConfig().save_pretrained(folder / "line")
    return RecipeArguments(**{"model": str(folder / "line"), "data": ["x"], "output": str(folder / "out"), **changes})


def options(**changes):
    settings = {"max_steps": 6, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2}
    return TrainingArguments(**{"use_cpu": True, "report_to": [], "disable_tqdm": True, **settings, **changes})


def trainer(training, values=(1.0,) * 16):
    rows = Dataset.from_dict({"x": [[value * (1 + i / 16)] for i, value in enumerate(values)]})
    return LineTrainer(Line(LineConfig()), training, train_dataset=rows)


def train(folder, values=(1.0,) * 16, finish=True, resume=False, **changes):
    training = options(**changes)
    with open_run(arguments(folder, resume=resume), training) as run:
        one = trainer(training, values)
        run.train(one)
        if finish:
            run.finish(one, curves=("loss", "grad_norm"), tokens=12)
    return [entry["loss"] for entry in one.state.log_history if "loss" in entry]


def test_a_run_leaves_a_model_a_summary_and_curves(tmp_path):
    losses = train(tmp_path)
    output = tmp_path / "out"
    assert Line.from_pretrained(output).weight.item() < 1
    summary = json.loads((output / SUMMARY_FILE).read_text())
    assert (summary["first_loss"], summary["last_loss"]) == (losses[0], losses[-1])
    assert summary["steps"] == 6 and summary["metrics"] == {"tokens": 12} and summary["versions"]["transformers"]
    assert (output / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert not list(output.glob(".final*"))


@pytest.mark.parametrize("logging_steps", [4, 50])
def test_the_last_step_is_logged(logging_steps, tmp_path):
    each = train(tmp_path / "each")
    parts = [each[:logging_steps], each[logging_steps:]]
    means = [sum(part) / len(part) for part in parts if part]
    assert train(tmp_path, logging_steps=logging_steps) == pytest.approx(means, abs=1e-4)
    summary = json.loads((tmp_path / "out" / SUMMARY_FILE).read_text())
    assert (summary["first_loss"], summary["last_loss"]) == pytest.approx((means[0], means[-1]), abs=1e-4)
    assert train(tmp_path / "none", logging_strategy="no") == []


def test_a_full_disk_says_how_to_go_on(tmp_path):
    train(tmp_path, finish=False)
    said = r"writing into .*out failed, is the disk full\? .* Make room and add --resume to go on from checkpoint-6"
    with (
        pytest.raises(OSError, match=said),
        open_run(arguments(tmp_path, resume=True), options()) as run,
        run.saving(),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_resumed_run_has_the_losses_of_one_that_was_not_interrupted(tmp_path):
    whole = train(tmp_path / "whole")
    train(tmp_path / "cut", finish=False)
    (tmp_path / "cut/out/checkpoint-6" / COMPLETE_FILE).unlink()  # killed while it wrote the last one
    assert last_complete_checkpoint(tmp_path / "cut/out").name == "checkpoint-4"
    assert train(tmp_path / "cut", resume=True) == whole
    assert json.loads((tmp_path / "cut/out" / SUMMARY_FILE).read_text())["resumed_from"] == "checkpoint-4"


def refuse(folder, message, error=ValueError, resume=False, model=None, **changes):
    told = {"resume": resume} | ({} if model is None else {"model": model})
    with pytest.raises(error, match=message), open_run(arguments(folder, **told), options(**changes)):
        raise AssertionError


def test_a_folder_belongs_to_one_run(tmp_path):
    refuse(tmp_path, "no run to resume", resume=True)
    assert not (tmp_path / "out").exists()
    train(tmp_path, finish=False)
    refuse(tmp_path, "not empty", FileExistsError)
    refuse(tmp_path, "another run: learning_rate was 5e-05 and is 0.1", resume=True, learning_rate=0.1)
    with FileLock(tmp_path / "out" / LOCK_FILE):
        refuse(tmp_path, "in use", resume=True)
    train(tmp_path, resume=True, logging_steps=3)  # does not change what is computed
    (tmp_path / "out" / "..final-killed").mkdir()
    refuse(tmp_path, "is complete", resume=True)
    assert not (tmp_path / "out" / "..final-killed").exists()


def test_the_last_checkpoint_stays_until_the_next_is_complete(tmp_path):
    refuse(tmp_path, "save_total_limit must be at least 2", save_total_limit=1)


def test_a_run_that_did_nothing_leaves_nothing(tmp_path):
    with pytest.raises(OSError), open_run(arguments(tmp_path), options()):
        (tmp_path / "out" / "README.md").touch()
        raise OSError("no such data")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_training_with_its_batch(value, tmp_path):
    with pytest.raises(FloatingPointError, match=r"step \d.*non-finite-loss-step-\d-process-0\.pt"):
        train(tmp_path, values=[1.0] * 15 + [value])
    (saved,) = (tmp_path / "out").glob("non-finite-loss-*.pt")
    assert not torch.load(saved, weights_only=True)["x"].isfinite().all()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"model": "./nowhere"}, "--model: there is no folder ./nowhere"),
        ({"model": "empty"}, "--model: empty is no checkpoint: it has neither config.json nor adapter_config.json"),
        ({"model": "nobody/nothing"}, "--model: there is no folder nobody/nothing, and a checkpoint of that name"),
        ({"model": "one.jsonl"}, "--model: one.jsonl is a file: give the folder of the checkpoint"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_named_with_its_option(changes, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "one.jsonl").touch()
    with pytest.raises(FileNotFoundError) as refused, open_run(arguments(tmp_path, **changes), options()):
        pass
    assert str(refused.value).startswith(expected) and not (tmp_path / "out").exists()


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    refuse(tmp_path, "--model: .*adapter is an adapter: merge it into its base model", model=str(tmp_path / "adapter"))
    with (
        pytest.raises(ValueError, match=r"--adapter: .*line is a model and no adapter"),
        open_run(SFTArguments(**vars(arguments(tmp_path)) | {"adapter": str(tmp_path / "line")}), options()),
    ):
        raise AssertionError
    assert not (tmp_path / "out").exists()


def test_a_reward_model_is_no_language_model(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForSequenceClassification(LlamaConfig(vocab_size=8, num_labels=1, **sizes)).save_pretrained(
        tmp_path / "judge"
    )
    refuse(tmp_path, r"--model: .*judge is a LlamaForSequenceClassification, as", model=str(tmp_path / "judge"))
    with open_run(RewardArguments(**vars(arguments(tmp_path, model=str(tmp_path / "judge")))), options()):
        pass
