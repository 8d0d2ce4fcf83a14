"""The stages of the demo, top to bottom."""

import time
import warnings
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import ProgressCallback, Trainer, TrainingArguments, set_seed

from ..auto import family_of
from ..data.conversations import Conversation
from .dataset import Split, sign_off_for, split_data, without_sign_off
from .report import Sample, Summary, check_output, staged_folder
from .tasks import load_task
from .tiny_checkpoints import LINE_OF, write_tiny_checkpoint

MERGE_TOLERANCE = 1e-4  # the merged weights are rounded to fp32, the adapter's product is not
SAMPLES = 6
REPLIES = 32


def run_demo(args: Namespace) -> Summary:
    """Runs every stage, writes the output folder and prints the summary.

    Args:
        args: the command's, with a value for everything but `model` and `data`.
    """
    check_output(args.output, args.overwrite)
    split = split_data(args.data, args.seed)
    set_seed(args.seed)
    with warnings.catch_warnings(), staged_folder(args.output, args.overwrite) as folder:
        warnings.simplefilter("ignore", FutureWarning)  # renamed arguments inside transformers and PEFT
        run = _Run(args, split, folder)
        stages = {
            f"Writing a tiny {args.family} checkpoint in the layout of the Hub": run.write_checkpoint,
            "Loading it and asking it questions": run.load,
            f"Full fine-tuning on {len(split.train)} conversations, {args.epochs} epochs": run.fine_tune,
            "Saving and reloading it": run.save_and_reload,
            f"LoRA with gradient checkpointing on {len(split.adapter)} conversations": run.train_adapter,
            "Saving and reloading the adapter": run.reload_adapter,
            "Merging the adapter": run.merge,
            "Writing the loss curve, the model card and the summary": run.write_report,
        }
        if args.model is not None:
            del stages[next(iter(stages))]
        for number, (title, stage) in enumerate(stages.items(), start=1):
            print(f"\n[{number}/{len(stages)}] {title}", flush=True)
            since = time.perf_counter()
            stage()
            run.seconds[title] = round(time.perf_counter() - since, 1)
    print(run.summary.as_text(args.output))
    return run.summary


class _Run:
    """One run: the model and what is known about it so far. Each public method is a stage."""

    def __init__(self, args: Namespace, split: Split, folder: Path):
        self.args, self.split, self.folder = args, split, folder
        self.checkpoint = args.model or folder / "checkpoint"
        self.finetuned, self.adapter, self.merged = (folder / name for name in ("finetuned", "adapter", "merged"))
        self.questions = split.train[-REPLIES:]
        self.seconds: dict[str, float] = {}

    def write_checkpoint(self) -> None:
        write_tiny_checkpoint(self.args.family, self.checkpoint, self.args.seed)

    def load(self) -> None:
        self._load(self.checkpoint)
        model = self.task.model
        if getattr(model, "is_quantized", False):
            raise ValueError(
                f"{self.checkpoint} holds quantized weights, which cannot be fully fine-tuned; "
                "train an adapter on it with scripts/finetune.py --lora"
            )
        own = self.args.model is not None
        self.summary = Summary(
            family=family_of(model.config).line_of(model.config) if own else LINE_OF[self.args.family],
            checkpoint=str(self.checkpoint) if own else "tiny, random weights",
            parameters=model.num_parameters(),
            conversations={use: len(getattr(self.split, use)) for use in ("train", "held_out", "adapter")},
            samples=[Sample(c[-2]["content"], c[-1]["content"]) for c in self.questions[:SAMPLES]],
            seconds=self.seconds,
        )
        print(f"{type(model).__name__}: {model.num_parameters():,} parameters, {len(self.task.tokenizer):,} tokens")
        self._measure("before training", "train", "held_out")

    def fine_tune(self) -> None:
        self._train("full fine-tuning", self.split.train, learning_rate=self.args.learning_rate)
        self._measure("after full fine-tuning", "train", "held_out", "adapter")
        self._measure_transfer("after full fine-tuning")

    def save_and_reload(self) -> None:
        self.task.model.config.use_cache = True  # Trainer switches it off; whoever loads the result wants to generate
        self.task.model.save_pretrained(self.finetuned)
        self.task.tokenizer.save_pretrained(self.finetuned)
        trained = self._logits()
        self._load(self.finetuned)
        self._check("reloaded model gives bit-identical logits", torch.equal(trained, self._logits()))

    def train_adapter(self) -> None:
        base = self.task.model
        base.name_or_path = str(self.args.output.resolve() / self.finetuned.name)  # where it is going to be
        self.task.model = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        self.task.model.print_trainable_parameters()
        rate = self.args.adapter_learning_rate
        self._train("LoRA", self.split.adapter, learning_rate=rate, gradient_checkpointing=True)
        self._measure("with the adapter", "adapter")
        self._measure_transfer("with the adapter")

    def reload_adapter(self) -> None:
        self.task.model.save_pretrained(str(self.adapter), save_embedding_layers=False)  # they are not adapted
        trained = self._logits()
        self._load(self.finetuned)
        self.task.model = PeftModel.from_pretrained(self.task.model, self.adapter)
        self.adapter_logits = self._logits()
        self._check("reloaded adapter gives bit-identical logits", torch.equal(trained, self.adapter_logits))

    def merge(self) -> None:
        self.task.model.merge_and_unload().save_pretrained(str(self.merged))
        self.task.tokenizer.save_pretrained(self.merged)
        self._load(self.merged)
        difference = (self._logits() - self.adapter_logits).abs().max().item()
        self.summary.merge_difference = difference
        self._check("merged model gives the adapter's logits", difference <= MERGE_TOLERANCE)

    def write_report(self) -> None:
        config = self.task.model.config
        self.summary.write(
            self.folder,
            auto_class=family_of(config).generates_with,
            base_model=self.args.model and str(self.args.model),
            training={
                "conversations": self.summary.conversations["train"],
                "epochs": self.args.epochs,
                "batch size": self.args.batch_size,
                "learning rate": self.args.learning_rate,
                "learning rate of the adapter": self.args.adapter_learning_rate,
                "max-z loss weight": getattr(config, "z_loss_weight", "none"),
            },
        )

    def _load(self, path: Path) -> None:
        self.task = load_task(path, self.args.max_length)

    def _trainer(self, conversations: Sequence[Conversation] = (), **options: Any) -> Trainer:
        on_gpu = torch.cuda.is_available()
        arguments = TrainingArguments(
            output_dir=str(self.folder.parent / "trainer"),
            num_train_epochs=self.args.epochs,
            per_device_train_batch_size=self.args.batch_size,
            per_device_eval_batch_size=self.args.batch_size,
            lr_scheduler_type="cosine",
            warmup_steps=0.05,
            adam_beta2=0.95,
            weight_decay=0.01,
            bf16=on_gpu and torch.cuda.is_bf16_supported(),
            dataloader_pin_memory=on_gpu,
            logging_steps=1,
            save_strategy="no",
            remove_unused_columns=False,  # the task's collator decides what the model gets
            report_to="none",
            seed=self.args.seed,
            **options,
        )
        examples: Any = [self.task.example(conversation) for conversation in conversations]
        trainer = Trainer(self.task.model, arguments, data_collator=self.task.collate, train_dataset=examples)
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(QuietProgressCallback)
        return trainer

    def _train(self, training: str, conversations: list[Conversation], **options: Any) -> None:
        trainer = self._trainer(conversations, **options)
        trainer.train()
        logs = trainer.state.log_history
        self.summary.curves[training] = [(log["step"], log["loss"]) for log in logs if "loss" in log]

    def _measure(self, stage: str, *uses: str) -> None:
        """Lets the model answer training questions, counts the exact answers (sign-offs aside) and keeps some as samples;
        then its loss on some of the data."""
        replies = self.task.replies(self.questions, f"replies {stage}")
        wanted = [self.task.as_generated(conversation[-1]["content"]) for conversation in self.questions]
        pairs = zip(replies, wanted, strict=True)
        self.summary.word_for_word[stage] = mean(without_sign_off(got) == want for got, want in pairs)
        for sample, got in zip(self.summary.samples, replies, strict=False):
            sample.replies[stage] = got
        examples: dict[str, Any] = {use: [*map(self.task.example, getattr(self.split, use))] for use in uses}
        trainer = self._trainer()
        self.summary.losses[stage] = {use: trainer.evaluate(examples[use])["eval_loss"] for use in uses}

    def _measure_transfer(self, stage: str) -> None:
        """How many replies to questions that the adapter never saw have the behavior it was trained for."""
        if not self.split.transfer:
            return
        replies = self.task.replies(self.split.transfer, f"sign-offs {stage}")
        pairs = zip(replies, self.split.transfer, strict=True)
        self.summary.signed_off[stage] = mean(got.endswith(sign_off_for(c[-2]["content"])) for got, c in pairs)

    def _logits(self) -> torch.Tensor:
        """The model's logits on a few training conversations."""
        return self.task.logits(self.split.train[:4])

    def _check(self, claim: str, holds: bool) -> None:
        self.summary.checks[claim] = holds
        print(f"{claim}: {'yes' if holds else 'NO'}")


class QuietProgressCallback(ProgressCallback):
    """One progress bar that shows the loss, in place of a printed line for each log."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3f}")
