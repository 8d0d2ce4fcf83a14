"""The stages of the demo, top to bottom."""

import math
import time
import warnings
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import ProgressCallback, Trainer, TrainingArguments, set_seed

from ..data.formats import Conversation
from ..families import family_of
from ..hub.saving import staged_folder
from .dataset import Split, sign_off_for, split_data, without_sign_off
from .report import Sample, Summary, check_output
from .tasks import load_task
from .tiny_checkpoints import LINE_OF, write_tiny_checkpoint

MERGE_TOLERANCE = 1e-4  # the merged weights are rounded to fp32, the adapter's product is not
STAGES = 8
SAMPLES = 6
REPLIES = 32


def run_demo(args: Namespace) -> Summary:
    """Runs every stage, writes the output folder and prints the summary.

    Args:
        args: the command's, with a value for everything but `model` and `data`.
    """
    check = partial(check_output, overwrite=args.overwrite)
    check(args.output)
    split = split_data(args.data, args.seed)
    set_seed(args.seed)
    threads = nullcontext() if args.model is not None else one_thread()
    with warnings.catch_warnings(), threads, staged_folder(args.output, check) as folder:
        warnings.simplefilter("ignore", FutureWarning)  # renamed arguments inside transformers and PEFT
        run = _Run(args, split, folder)
        run.all_stages()
    print(run.summary.as_text(args.output))
    return run.summary


@contextmanager
def one_thread() -> Iterator[None]:
    """For models so small that threads wait for each other longer than they work: on two busy cores two of them took several
    times as long as one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Run:
    """One run: the model and what is known about it so far."""

    def __init__(self, args: Namespace, split: Split, folder: Path):
        self.args, self.split, self.folder = args, split, folder
        self.questions = split.train[-REPLIES:]
        self.summary = Summary(
            checkpoint="tiny, random weights" if args.model is None else str(args.model),
            conversations={use: len(getattr(split, use)) for use in ("train", "held_out", "adapter")},
            samples=[Sample(c[-2]["content"], c[-1]["content"]) for c in self.questions[:SAMPLES]],
        )

    def all_stages(self) -> None:
        args, split, summary = self.args, self.split, self.summary
        checkpoint = args.model or self.folder / "checkpoint"
        finetuned, adapter, merged = (self.folder / name for name in ("finetuned", "adapter", "merged"))

        if args.model is None:
            with self._stage(f"Writing a tiny {args.family} checkpoint in the layout of the Hub"):
                write_tiny_checkpoint(args.family, checkpoint, args.seed)

        with self._stage("Loading it and asking it questions"):
            model, tokenizer = self._load(checkpoint)
            if getattr(model, "is_quantized", False):
                raise ValueError(
                    f"{checkpoint} holds quantized weights, which cannot be fully fine-tuned; "
                    "train an adapter on it with python -m hf_cnllm.recipes.sft --use_peft"
                )
            family = family_of(model.config)
            line = LINE_OF.get(args.family) if args.model is None else None  # a variant has no line of its own
            summary.family = line or family.line_of(model.config)
            summary.parameters = model.num_parameters()
            print(f"{type(model).__name__}: {summary.parameters:,} parameters, {len(tokenizer):,} tokens")
            since = time.perf_counter()
            self._measure("before training", "train", "held_out")
            self._print_estimate(time.perf_counter() - since)

        with self._stage(f"Full fine-tuning on {len(split.train)} conversations, {args.epochs} epochs"):
            self._train("full fine-tuning", split.train, learning_rate=args.learning_rate)
            self._measure("after full fine-tuning", "train", "held_out", "adapter")
            self._measure_transfer("after full fine-tuning")

        with self._stage("Saving and reloading it"):
            model.config.use_cache = True  # Trainer switches it off; whoever loads the result wants to generate
            model.save_pretrained(finetuned)
            tokenizer.save_pretrained(finetuned)
            trained = self._logits()
            model, tokenizer = self._load(finetuned)
            self._check("reloaded model gives bit-identical logits", torch.equal(trained, self._logits()))

        with self._stage(f"LoRA with gradient checkpointing on {len(split.adapter)} conversations"):
            model.name_or_path = str(args.output.resolve() / finetuned.name)  # where it is going to be
            model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
            model.print_trainable_parameters()
            self.task.model = model
            self._train("LoRA", split.adapter, learning_rate=args.adapter_learning_rate, gradient_checkpointing=True)
            self._measure("with the adapter", "adapter")
            self._measure_transfer("with the adapter")

        with self._stage("Saving and reloading the adapter"):
            model.save_pretrained(str(adapter), save_embedding_layers=False)  # they are not adapted
            trained = self._logits()
            model, tokenizer = self._load(finetuned)
            self.task.model = model = PeftModel.from_pretrained(model, adapter)
            adapted = self._logits()
            self._check("reloaded adapter gives bit-identical logits", torch.equal(trained, adapted))

        with self._stage("Merging the adapter"):
            model.merge_and_unload().save_pretrained(str(merged))
            tokenizer.save_pretrained(merged)
            model, tokenizer = self._load(merged)
            summary.merge_difference = (self._logits() - adapted).abs().max().item()
            self._check("merged model gives the adapter's logits", summary.merge_difference <= MERGE_TOLERANCE)

        with self._stage("Writing the loss curve, the model card and the summary"):
            summary.write(
                self.folder,
                auto_class=family.generates_with,
                base_model=args.model and str(args.model),
                training={
                    "conversations": summary.conversations["train"],
                    "epochs": args.epochs,
                    "batch size": args.batch_size,
                    "learning rate": args.learning_rate,
                    "learning rate of the adapter": args.adapter_learning_rate,
                    "max-z loss weight": getattr(model.config, "z_loss_weight", "none"),
                },
            )

    def _print_estimate(self, measuring: float) -> None:
        """How long the rest will take, from a training step and from the seconds that the first measurement took, whose replies
        are as long as allowed; there are three more, and two of replies to the `transfer` questions."""
        batch = self.task.collate([self.task.example(c) for c in self.split.train[: self.args.batch_size]])
        for _ in range(2):  # the first is slower than the others
            since = time.perf_counter()
            self.task.model.train()(**batch.to(self.task.model.device)).loss.backward()
            step = time.perf_counter() - since
        self.task.model.zero_grad()
        steps = sum(math.ceil(len(use) / self.args.batch_size) for use in (self.split.train, self.split.adapter))
        measurements = 3 + 2 * len(self.split.transfer) / len(self.questions)
        seconds = step * steps * self.args.epochs + measuring * measurements
        print(f"At the machine's speed of now the rest takes at most about {math.ceil(seconds / 60)} min", flush=True)

    @contextmanager
    def _stage(self, title: str) -> Iterator[None]:
        seconds = self.summary.seconds
        print(f"\n[{len(seconds) + 1}/{STAGES - (self.args.model is not None)}] {title}", flush=True)
        since = time.perf_counter()
        yield
        seconds[title] = round(time.perf_counter() - since, 1)

    def _load(self, path: Path) -> tuple[Any, Any]:
        self.task = load_task(path, self.args.max_length)
        return self.task.model, self.task.tokenizer

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
