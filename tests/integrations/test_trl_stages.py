"""Save → next stage: every trainer of TRL takes a checkpoint by its path, which it looks up by the name in `architectures`,
and a model by itself, whose reference it loads from there. Folders are in the Hub's layout, and saved by this package.

GLM has no chat, and ChatGLM-6B is no causal model: they are not here.
"""

import copy
import math
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint

trl = pytest.importorskip("trl")

QUESTION = [{"role": "user", "content": "你好"}]
GOOD = [{"role": "assistant", "content": "你好，我能帮你什么？"}]
BAD = [{"role": "assistant", "content": "two"}]
PREFERENCES = [{"prompt": QUESTION, "chosen": GOOD, "rejected": BAD}] * 2


def by_length(completions, **kwargs) -> list[float]:
    return [float(len(completion[0]["content"])) for completion in completions]


class Trainer(NamedTuple):
    trainer: type
    config: type
    rows: list[dict]
    options: dict[str, Any] = {"max_length": 64}
    first_log: dict[str, float] = {}  # what must come out if the reference model is the model itself
    auto_class: type = AutoModelForCausalLM
    has_reference: bool = False


SAMPLING = {"num_generations": 2, "max_completion_length": 4, "beta": 0.1}
TRAINERS = {
    "sft": Trainer(trl.SFTTrainer, trl.SFTConfig, [{"messages": QUESTION + GOOD}] * 2),
    "dpo": Trainer(trl.DPOTrainer, trl.DPOConfig, PREFERENCES, first_log={"loss": math.log(2)}, has_reference=True),
    "kto": Trainer(
        trl.KTOTrainer,
        trl.KTOConfig,
        [
            {"prompt": QUESTION, "completion": GOOD, "label": True},
            {"prompt": QUESTION, "completion": BAD, "label": False},
        ],
        first_log={"loss": 0.5, "kl": 0.0},
        has_reference=True,
    ),
    "grpo": Trainer(
        trl.GRPOTrainer, trl.GRPOConfig, [{"prompt": QUESTION}] * 2, SAMPLING, {"kl": 0.0}, has_reference=True
    ),
    "rloo": Trainer(
        trl.RLOOTrainer, trl.RLOOConfig, [{"prompt": QUESTION}] * 2, SAMPLING, {"kl": 0.0}, has_reference=True
    ),
    "reward": Trainer(trl.RewardTrainer, trl.RewardConfig, PREFERENCES, auto_class=AutoModelForSequenceClassification),
}
CHECKPOINTS = ("baichuan", "qwen", "chatglm2", "chatglm3")
# Every trainer, and every family.
QUICK = {
    ("sft", "baichuan"), ("dpo", "chatglm3"), ("kto", "qwen"), ("grpo", "chatglm2"), ("rloo", "baichuan"), ("reward", "qwen"),
}  # fmt: skip
PAIRS = [
    pytest.param(
        trainer, family, marks=() if (trainer, family) in QUICK else pytest.mark.slow, id=f"{trainer}-{family}"
    )
    for trainer in TRAINERS
    for family in CHECKPOINTS
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(checkpoint, layout) -> its folder."""
    root = tmp_path_factory.mktemp("checkpoints")
    for name in CHECKPOINTS:
        write_tiny_checkpoint(name, root / name / "hub")
        for auto_class in (AutoModelForCausalLM, AutoTokenizer):
            auto_class.from_pretrained(root / name / "hub").save_pretrained(root / name / "saved")
    return lambda name, layout: str(root / name / layout)


def trained(row: Trainer, model, tmp_path, **kwargs):
    """A trainer after one step."""
    args = row.config(
        output_dir=str(tmp_path / "out"), use_cpu=True, bf16=False, report_to=[], per_device_train_batch_size=2, max_steps=1,
        logging_steps=1, save_strategy="no", gradient_checkpointing=False, disable_tqdm=True, learning_rate=1e-2,
        **row.options,
    )  # fmt: skip
    if row.trainer in (trl.GRPOTrainer, trl.RLOOTrainer):
        kwargs["reward_funcs"] = by_length
    trainer = row.trainer(model=model, args=args, train_dataset=Dataset.from_list(row.rows), **kwargs)
    trainer.train()
    return trainer


SOURCES = {
    "hub": lambda row, folder: folder("hub"),
    "saved": lambda row, folder: folder("saved"),
    "object": lambda row, folder: row.auto_class.from_pretrained(folder("saved"), num_labels=1),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(("name", "checkpoint"), PAIRS)
def test_a_step_from(source, name, checkpoint, folders, tmp_path):
    row = TRAINERS[name]
    model = SOURCES[source](row, lambda layout: folders(checkpoint, layout))
    trainer = trained(row, model, tmp_path)
    original = AutoModelForCausalLM.from_pretrained(folders(checkpoint, "saved"), dtype=torch.float32)
    assert type(trainer.model) is type(row.auto_class.from_pretrained(folders(checkpoint, "saved")))
    log = trainer.state.log_history[0]
    assert math.isfinite(log["loss"])
    assert {key: log[key] for key in row.first_log} == pytest.approx(row.first_log, abs=1e-3)
    assert distance(trainer.model, original) > 0
    if row.has_reference:
        assert type(trainer.ref_model) is type(original) and distance(trainer.ref_model, original) == 0
    trainer.save_model(str(tmp_path / "next"))
    assert distance(row.auto_class.from_pretrained(tmp_path / "next"), trainer.model) == 0


def distance(model, other) -> float:
    """Between the weights that both have: a reward model lacks the language model's head."""
    one, two = model.state_dict(), other.state_dict()
    shared = one.keys() & two.keys()
    assert len(shared) > 10
    return max((one[name] - two[name]).abs().max().item() for name in shared)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_a_model_made_here_with_its_reference(checkpoint, folders, tmp_path):
    """It comes from no folder: its reference is an object too."""
    folder = folders(checkpoint, "hub")
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    reference, tokenizer = copy.deepcopy(model), AutoTokenizer.from_pretrained(folder)
    trainer = trained(TRAINERS["dpo"], model, tmp_path, ref_model=reference, processing_class=tokenizer)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-3)
    assert distance(trainer.model, reference) > 0
