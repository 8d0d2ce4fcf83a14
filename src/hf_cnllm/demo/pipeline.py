"""The stages of the demo, top to bottom."""

import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoTokenizer, set_seed

from ..cli.info import family_of
from ..data.conversations import load_instructions
from . import report
from .dataset import SIGN_OFFS, Split, embedded_split, own_split, sign_off_for, without_sign_off
from .families import TINY_FAMILIES, Training, write_tiny_checkpoint
from .output import check_output, staged_folder
from .summary import Sample, Summary
from .tasks import task_class_for
from .training import fit, mean_loss, reply

Z_LOSS_WEIGHT = 2e-4  # as in the Baichuan 2 report
MERGE_TOLERANCE = 1e-4  # the merged weights are rounded to fp32, the adapter's product is not
SAMPLES = 6
REPLIES = 32


# For the user's own checkpoint; what suits two million random weights (families.Training) would wreck it.
OWN_TRAINING = Training(epochs=3, batch_size=4, learning_rate=1e-5, adapter_learning_rate=1e-4)


@dataclass
class DemoOptions:
    """What the command line decides; None leaves it to whether the checkpoint is tiny or the user's own."""

    family: str = "baichuan"
    model: str | None = None
    data: Path | None = None
    output: Path | None = None
    overwrite: bool = False
    epochs: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    adapter_learning_rate: float | None = None
    max_length: int = 1024
    seed: int = 0

    def __post_init__(self):
        own = self.model is not None
        if own != (self.data is not None):
            missing = "--data FILE.jsonl" if own else "--model PATH"
            raise ValueError(f"your own checkpoint and your own data go together: {missing} is missing")
        if self.family not in TINY_FAMILIES:
            raise ValueError(f"--family must be one of {', '.join(TINY_FAMILIES)}; got {self.family!r}")
        name = Path(self.model).name if own else self.family
        self.output = self.output or Path("outputs") / f"demo-{name}"
        training = OWN_TRAINING if own else TINY_FAMILIES[self.family].training
        for field, default in training._asdict().items():
            if getattr(self, field) is None:
                setattr(self, field, default)
        for field in ("epochs", "batch_size", "learning_rate", "adapter_learning_rate", "max_length"):
            if getattr(self, field) <= 0:
                raise ValueError(f"--{field.replace('_', '-')} must be positive, got {getattr(self, field)}")


def run_demo(options: DemoOptions) -> Summary:
    """Run every stage, write the output folder and print the summary.

    Raises:
        ImportError: a package of the extra `train` is missing.
        FileExistsError: the output folder must not be replaced.
        ConversationError: a line of the user's data cannot be used.
    """
    report.require_matplotlib()
    check_output(options.output, options.overwrite)
    split = embedded_split(options.seed) if options.data is None else own_split(options.data, options.seed)
    set_seed(options.seed)
    with warnings.catch_warnings(), staged_folder(options.output, options.overwrite) as folder:
        warnings.simplefilter("ignore", FutureWarning)  # renamed arguments inside transformers and PEFT
        summary = _Run(options, split, folder).all_stages()
    print(report.as_text(summary, options.output))
    return summary


class _Run:
    """One run: the model and what is known about it so far. Each method is a stage, in the order of `all_stages`."""

    def __init__(self, options: DemoOptions, split: Split, folder: Path):
        self.options, self.split, self.folder = options, split, folder
        self.own = options.model is not None
        self.checkpoint = str(options.model if self.own else folder / "checkpoint")
        self.model: Any = None  # the model of a family, or the PEFT model around it
        self.finetuned, self.adapter, self.merged = (folder / name for name in ("finetuned", "adapter", "merged"))
        self.questions = split.train[-REPLIES:]
        self.stages = Stages(total=7 if self.own else 8)

    def all_stages(self) -> Summary:
        with tempfile.TemporaryDirectory() as scratch:
            self.scratch = Path(scratch)
            if not self.own:
                self.write_checkpoint()
            self.load()
            self.fine_tune()
            self.save_and_reload()
            self.train_adapter()
            self.reload_adapter()
            self.merge()
            self.write_report()
        return self.summary

    def write_checkpoint(self) -> None:
        self.stages.begin(f"Writing a tiny {self.options.family} checkpoint in the layout of the Hub")
        texts = [message["content"] for c in load_instructions() for message in c] + list(SIGN_OFFS.values())
        write_tiny_checkpoint(self.options.family, Path(self.checkpoint), texts, self.options.seed)

    def load(self) -> None:
        self.stages.begin("Loading it and asking it questions")
        config = AutoConfig.from_pretrained(self.checkpoint)
        self.task_class = task_class_for(config)
        if hasattr(config, "z_loss_weight"):
            config.z_loss_weight = Z_LOSS_WEIGHT
        self._load(self.checkpoint, config=config)
        if getattr(self.model, "is_quantized", False):
            raise ValueError(
                f"{self.checkpoint} holds quantised weights, which cannot be fully fine-tuned; "
                "train an adapter on it with scripts/finetune.py --lora"
            )
        size, tokens = self.model.num_parameters(), len(self.tokenizer)
        print(f"{type(self.model).__name__}: {size:,} parameters, {tokens:,} tokens")
        self.summary = Summary(
            family=family_of(config) if self.own else TINY_FAMILIES[self.options.family].origin,
            checkpoint=self.checkpoint if self.own else "tiny, random weights",
            parameters=size,
            conversations={use: len(getattr(self.split, use)) for use in ("train", "held_out", "adapter")},
            samples=[Sample(c[-2]["content"], c[-1]["content"]) for c in self.questions[:SAMPLES]],
        )
        self._ask("before training")
        self._measure_losses("before training", "train", "held_out")

    def fine_tune(self) -> None:
        self.stages.begin(f"Full fine-tuning on {len(self.split.train)} conversations, {self.options.epochs} epochs")
        self.summary.curves["full fine-tuning"] = fit(
            self.model,
            self.task,
            self.split.train,
            self.scratch,
            epochs=self.options.epochs,
            batch_size=self.options.batch_size,
            learning_rate=self.options.learning_rate,
            seed=self.options.seed,
        )
        self._ask("after full fine-tuning")
        self._measure_losses("after full fine-tuning", "train", "held_out", "adapter")
        self._measure_transfer("after full fine-tuning")

    def save_and_reload(self) -> None:
        self.stages.begin("Saving and reloading it")
        self.model.save_pretrained(self.finetuned)
        self.tokenizer.save_pretrained(self.finetuned)
        trained = self._logits()
        self._load(self.finetuned)
        self._check("reloaded model gives bit-identical logits", torch.equal(trained, self._logits()))

    def train_adapter(self) -> None:
        self.stages.begin(f"LoRA with gradient checkpointing on {len(self.split.adapter)} conversations")
        self.model.name_or_path = str(self.options.output.resolve() / self.finetuned.name)  # where it is going to be
        self.model = get_peft_model(self.model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        self.model.print_trainable_parameters()
        self.summary.curves["LoRA"] = fit(
            self.model,
            self.task,
            self.split.adapter,
            self.scratch,
            epochs=self.options.epochs,
            batch_size=self.options.batch_size,
            learning_rate=self.options.adapter_learning_rate,
            seed=self.options.seed,
            gradient_checkpointing=True,
        )
        self._ask("with the adapter")
        self._measure_losses("with the adapter", "adapter")
        self._measure_transfer("with the adapter")

    def reload_adapter(self) -> None:
        self.stages.begin("Saving and reloading the adapter")
        self.model.save_pretrained(str(self.adapter), save_embedding_layers=False)  # they are not adapted
        trained = self._logits()
        self._load(self.finetuned)
        self.model = PeftModel.from_pretrained(self.model, self.adapter)
        self.adapter_logits = self._logits()
        self._check("reloaded adapter gives bit-identical logits", torch.equal(trained, self.adapter_logits))

    def merge(self) -> None:
        self.stages.begin("Merging the adapter")
        self.model.merge_and_unload().save_pretrained(str(self.merged))
        self.tokenizer.save_pretrained(self.merged)
        self._load(self.merged)
        difference = (self._logits() - self.adapter_logits).abs().max().item()
        self.summary.merge_difference = difference
        self._check("merged model gives the adapter's logits", difference <= MERGE_TOLERANCE)

    def write_report(self) -> None:
        self.stages.begin("Writing the loss curve, the model card and the summary")
        self.summary.seconds = self.stages.seconds  # of the stages before this one
        report.write_report(
            self.summary,
            self.folder,
            auto_class=self.task_class.auto_class.__name__,
            tokenizer_class=self._tokenizer_class(self.finetuned).__name__,
            base_model=self.checkpoint if self.own else None,
            training={
                "conversations": self.summary.conversations["train"],
                "epochs": self.options.epochs,
                "batch size": self.options.batch_size,
                "learning rate": self.options.learning_rate,
                "learning rate of the adapter": self.options.adapter_learning_rate,
                "max-z loss weight": getattr(self.model.config, "z_loss_weight", "none"),
            },
        )

    def _load(self, path: str | Path, **kwargs) -> None:
        """Take model and tokenizer from a folder, the weights in fp32: AdamW's small steps need it."""
        self.tokenizer = self._tokenizer_class(path).from_pretrained(path)
        self.model = self.task_class.auto_class.from_pretrained(path, dtype=torch.float32, **kwargs)
        self.model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        self.task = self.task_class(self.tokenizer, self.model, self.options.max_length)
        self.model.generation_config.eos_token_id = self.task.end_token_ids

    def _tokenizer_class(self, path: str | Path) -> Any:
        if str(path) == self.checkpoint or self.task_class.reloads_with_auto_tokenizer:
            return AutoTokenizer
        return type(self.tokenizer)

    def _ask(self, stage: str) -> None:
        """Let the model answer training questions; count the exact answers, sign-offs aside, and keep some as samples."""
        replies = reply(self.model, self.task, self.questions, f"replies {stage}")
        wanted = [self.task.as_generated(conversation[-1]["content"]) for conversation in self.questions]
        exact = [without_sign_off(got) == want for got, want in zip(replies, wanted, strict=True)]
        self.summary.word_for_word[stage] = sum(exact) / len(exact)
        for sample, got in zip(self.summary.samples, replies, strict=False):
            sample.replies[stage] = got

    def _measure_losses(self, stage: str, *uses: str) -> None:
        self.summary.losses[stage] = {
            use: mean_loss(self.model, self.task, getattr(self.split, use), self.scratch, self.options.batch_size)
            for use in uses
        }

    def _measure_transfer(self, stage: str) -> None:
        """How many replies to questions that the adapter never saw have the behaviour it was trained for."""
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


class Stages:
    """Announces each stage and keeps how long it took."""

    def __init__(self, total: int):
        self.total = total
        self.seconds: dict[str, float] = {}
        self._current, self._since = "", 0.0

    def begin(self, title: str) -> None:
        self.end()
        self._current, self._since = title, time.perf_counter()
        print(f"\n[{len(self.seconds) + 1}/{self.total}] {title}", flush=True)

    def end(self) -> None:
        if self._current:
            self.seconds[self._current] = round(time.perf_counter() - self._since, 1)
            self._current = ""
