"""The stages of the demo, top to bottom."""

import tempfile
import time
import warnings
from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoTokenizer, set_seed

from ..auto import family_of
from ..data.conversations import load_instructions
from .dataset import SIGN_OFFS, Split, embedded_split, own_split, sign_off_for, without_sign_off
from .families import LINE_OF, write_tiny_checkpoint
from .report import Sample, Summary, check_output, staged_folder
from .tasks import task_for
from .training import fit, mean_loss, reply

Z_LOSS_WEIGHT = 2e-4  # as in the Baichuan 2 report
MERGE_TOLERANCE = 1e-4  # the merged weights are rounded to fp32, the adapter's product is not
SAMPLES = 6
REPLIES = 32


def run_demo(args: Namespace) -> Summary:
    """Runs every stage, writes the output folder and prints the summary.

    Args:
        args: the command's, with a value for everything but `model` and `data`.
    """
    check_output(args.output, args.overwrite)
    split = embedded_split(args.seed) if args.data is None else own_split(args.data, args.seed)
    set_seed(args.seed)
    with (
        warnings.catch_warnings(),
        staged_folder(args.output, args.overwrite) as folder,
        tempfile.TemporaryDirectory() as scratch,
    ):
        warnings.simplefilter("ignore", FutureWarning)  # renamed arguments inside transformers and PEFT
        run = _Run(args, split, folder, Path(scratch))
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
        if run.own:
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

    def __init__(self, args: Namespace, split: Split, folder: Path, scratch: Path):
        self.args, self.split, self.folder, self.scratch = args, split, folder, scratch
        self.own = args.model is not None
        self.checkpoint = str(args.model if self.own else folder / "checkpoint")
        self.model: Any = None  # the model of a family, or the PEFT model around it
        self.finetuned, self.adapter, self.merged = (folder / name for name in ("finetuned", "adapter", "merged"))
        self.questions = split.train[-REPLIES:]
        self.seconds: dict[str, float] = {}

    def write_checkpoint(self) -> None:
        texts = [message["content"] for c in load_instructions() for message in c] + list(SIGN_OFFS.values())
        write_tiny_checkpoint(self.args.family, Path(self.checkpoint), texts, self.args.seed)

    def load(self) -> None:
        config = AutoConfig.from_pretrained(self.checkpoint)
        self.task_class = task_for(config)
        if hasattr(config, "z_loss_weight"):
            config.z_loss_weight = Z_LOSS_WEIGHT
        self._load(self.checkpoint, config=config)
        if getattr(self.model, "is_quantized", False):
            raise ValueError(
                f"{self.checkpoint} holds quantized weights, which cannot be fully fine-tuned; "
                "train an adapter on it with scripts/finetune.py --lora"
            )
        size, tokens = self.model.num_parameters(), len(self.tokenizer)
        print(f"{type(self.model).__name__}: {size:,} parameters, {tokens:,} tokens")
        self.summary = Summary(
            family=family_of(config).line_of(config) if self.own else LINE_OF[self.args.family],
            checkpoint=self.checkpoint if self.own else "tiny, random weights",
            parameters=size,
            conversations={use: len(getattr(self.split, use)) for use in ("train", "held_out", "adapter")},
            samples=[Sample(c[-2]["content"], c[-1]["content"]) for c in self.questions[:SAMPLES]],
            seconds=self.seconds,
        )
        self._measure("before training", "train", "held_out")

    def fine_tune(self) -> None:
        self._fit("full fine-tuning", self.split.train, learning_rate=self.args.learning_rate)
        self._measure("after full fine-tuning", "train", "held_out", "adapter")
        self._measure_transfer("after full fine-tuning")

    def save_and_reload(self) -> None:
        self.model.save_pretrained(self.finetuned)
        self.tokenizer.save_pretrained(self.finetuned)
        trained = self._logits()
        self._load(self.finetuned)
        self._check("reloaded model gives bit-identical logits", torch.equal(trained, self._logits()))

    def train_adapter(self) -> None:
        self.model.name_or_path = str(self.args.output.resolve() / self.finetuned.name)  # where it is going to be
        self.model = get_peft_model(self.model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        self.model.print_trainable_parameters()
        self._fit(
            "LoRA", self.split.adapter, learning_rate=self.args.adapter_learning_rate, gradient_checkpointing=True
        )
        self._measure("with the adapter", "adapter")
        self._measure_transfer("with the adapter")

    def reload_adapter(self) -> None:
        self.model.save_pretrained(str(self.adapter), save_embedding_layers=False)  # they are not adapted
        trained = self._logits()
        self._load(self.finetuned)
        self.model = PeftModel.from_pretrained(self.model, self.adapter)
        self.adapter_logits = self._logits()
        self._check("reloaded adapter gives bit-identical logits", torch.equal(trained, self.adapter_logits))

    def merge(self) -> None:
        self.model.merge_and_unload().save_pretrained(str(self.merged))
        self.tokenizer.save_pretrained(self.merged)
        self._load(self.merged)
        difference = (self._logits() - self.adapter_logits).abs().max().item()
        self.summary.merge_difference = difference
        self._check("merged model gives the adapter's logits", difference <= MERGE_TOLERANCE)

    def write_report(self) -> None:
        self.summary.write(
            self.folder,
            auto_class=self.task_class.auto_class.__name__,
            tokenizer_class=self._tokenizer_class(self.finetuned).__name__,
            base_model=self.checkpoint if self.own else None,
            training={
                "conversations": self.summary.conversations["train"],
                "epochs": self.args.epochs,
                "batch size": self.args.batch_size,
                "learning rate": self.args.learning_rate,
                "learning rate of the adapter": self.args.adapter_learning_rate,
                "max-z loss weight": getattr(self.model.config, "z_loss_weight", "none"),
            },
        )

    def _load(self, path: str | Path, **kwargs) -> None:
        """Takes model and tokenizer from a folder, the weights in fp32: AdamW's small steps need it."""
        self.tokenizer = self._tokenizer_class(path).from_pretrained(path)
        self.model = self.task_class.auto_class.from_pretrained(path, dtype=torch.float32, **kwargs)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.task = self.task_class(self.tokenizer, self.model, self.args.max_length)
        self.model.generation_config.eos_token_id = self.task.end_token_ids

    def _tokenizer_class(self, path: str | Path) -> Any:
        if str(path) == self.checkpoint or self.task_class.reloads_with_auto_tokenizer:
            return AutoTokenizer
        return type(self.tokenizer)

    def _fit(self, training: str, conversations: list, **options: Any) -> None:
        options |= {"num_train_epochs": self.args.epochs, "seed": self.args.seed}
        self.summary.curves[training] = fit(
            self.model, self.task, conversations, self.scratch, self.args.batch_size, **options
        )

    def _measure(self, stage: str, *uses: str) -> None:
        """Lets the model answer training questions, counts the exact answers (sign-offs aside) and keeps some as samples;
        then its loss on some of the data."""
        replies = reply(self.model, self.task, self.questions, f"replies {stage}")
        wanted = [self.task.as_generated(conversation[-1]["content"]) for conversation in self.questions]
        exact = [without_sign_off(got) == want for got, want in zip(replies, wanted, strict=True)]
        self.summary.word_for_word[stage] = sum(exact) / len(exact)
        for sample, got in zip(self.summary.samples, replies, strict=False):
            sample.replies[stage] = got
        self.summary.losses[stage] = {
            use: mean_loss(self.model, self.task, getattr(self.split, use), self.scratch, self.args.batch_size)
            for use in uses
        }

    def _measure_transfer(self, stage: str) -> None:
        """How many replies to questions that the adapter never saw have the behavior it was trained for."""
        if not self.split.transfer:
            return
        replies = reply(self.model, self.task, self.split.transfer, f"sign-offs {stage}")
        signed = [
            r.endswith(sign_off_for(c[-2]["content"])) for r, c in zip(replies, self.split.transfer, strict=True)
        ]
        self.summary.signed_off[stage] = sum(signed) / len(signed)

    def _logits(self) -> torch.Tensor:
        """The model's logits on a few training conversations."""
        batch = self.task.collate([self.task.example(c) for c in self.split.train[:4]])
        batch = {name: tensor.to(self.model.device) for name, tensor in batch.items() if name != "labels"}
        self.model.eval()
        with torch.no_grad():
            return self.model(**batch).logits

    def _check(self, claim: str, holds: bool) -> None:
        self.summary.checks[claim] = holds
        print(f"{claim}: {'yes' if holds else 'NO'}")
