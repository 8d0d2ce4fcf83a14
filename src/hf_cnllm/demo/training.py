"""What the demo does with a model, each in one call of Trainer or generate: fit, measure a loss, reply."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import GenerationConfig, ProgressCallback, Trainer, TrainingArguments

from ..data.conversations import Conversation
from .tasks import Task

MAX_NEW_TOKENS = 64

Curve = list[tuple[int, float]]


class QuietProgressCallback(ProgressCallback):
    """One progress bar that shows the loss, in place of a printed line for each log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")


def fit(
    model: nn.Module, task: Task, conversations: Sequence[Conversation], scratch: Path, batch_size: int, **options: Any
) -> Curve:
    """Trains `model` in place with AdamW and a cosine schedule; returns (step, training loss) of every step.

    Args:
        scratch: a folder for Trainer.
        options: of `TrainingArguments`.
    """
    with _trainer(
        model,
        task,
        scratch,
        batch_size,
        {"train_dataset": [task.example(c) for c in conversations]},
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        adam_beta2=0.95,
        weight_decay=0.01,
        logging_steps=1,
        **options,
    ) as trainer:
        trainer.train()
    return [(log["step"], log["loss"]) for log in trainer.state.log_history if "loss" in log]


def mean_loss(
    model: nn.Module, task: Task, conversations: Sequence[Conversation], scratch: Path, batch_size: int
) -> float:
    """The model's loss on the conversations, without training."""
    examples = {"eval_dataset": [task.example(c) for c in conversations]}
    with _trainer(model, task, scratch, batch_size, examples) as trainer:
        return trainer.evaluate()["eval_loss"]


@contextmanager
def _trainer(
    model: nn.Module, task: Task, scratch: Path, batch_size: int, datasets: dict[str, Any], **options: Any
) -> Iterator[Trainer]:
    """Trainer switches `config.use_cache` off for good; a model that is saved afterwards should still generate fast."""
    on_gpu = torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(scratch),
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        bf16=on_gpu and torch.cuda.is_bf16_supported(),
        dataloader_pin_memory=on_gpu,
        save_strategy="no",
        remove_unused_columns=False,  # the task's collator decides what the model gets
        report_to="none",
        **options,
    )
    use_cache = model.config.use_cache
    trainer = Trainer(model, arguments, data_collator=task.collate, **datasets)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(QuietProgressCallback)
    try:
        yield trainer
    finally:
        model.config.use_cache = use_cache


def reply(model: Any, task: Task, conversations: Sequence[Conversation], description: str) -> list[str]:
    """Answers the last question of each conversation greedily, 16 at a time."""
    model.eval()
    greedy = GenerationConfig(
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
        eos_token_id=task.end_token_ids,
        pad_token_id=model.generation_config.pad_token_id,
        repetition_penalty=1.0,
    )
    replies: list[str] = []
    for start in tqdm(range(0, len(conversations), 16), desc=description, unit="batch"):
        prompts = task.prompts(conversations[start : start + 16], MAX_NEW_TOKENS)
        prompts = {name: tensor.to(model.device) for name, tensor in prompts.items()}
        output = model.generate(**prompts, generation_config=greedy)
        replies += task.texts(output[:, prompts["input_ids"].shape[1] :])
    return replies
