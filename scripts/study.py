"""What the studies of the papers' claims share: a text that every machine has, training of small models, and an output folder with
table, numbers and picture."""

import argparse
import json
import math
import random
import sysconfig
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch.utils.data import Dataset
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

BYTES = 256  # the vocabulary


class Bytes(Dataset):
    """Every stretch of `length` bytes of a text is a training example."""

    def __init__(self, text: torch.Tensor, length: int):
        self.text, self.length = text, length

    def __len__(self) -> int:
        return len(self.text) - self.length

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.text[index : index + self.length].long()
        return {"input_ids": ids, "labels": ids}


def read_text(path: Path | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes to train on, bytes held out): of one file its last tenth, of Python's standard library a tenth of its files."""
    if path is not None:
        content = path.read_bytes()
        parts = [content[: len(content) * 9 // 10], content[len(content) * 9 // 10 :]]
    else:
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        random.Random(0).shuffle(files)
        parts = [
            b"".join(file.read_bytes() for index, file in enumerate(files) if (index % 10 == 0) == held_out)
            for held_out in (False, True)
        ]
    return tuple(torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in parts)


def study_arguments(description: str, name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--data", type=Path, help="a text file to train and test on (default: Python's standard library)"
    )
    parser.add_argument("--output", type=Path, default=Path("outputs") / name, help="folder (default: %(default)s)")
    return parser


def train(
    model: PreTrainedModel,
    dataset: Any,
    output: Path,
    *,
    seed: int = 0,
    callbacks: Sequence[TrainerCallback] = (),
    data_collator: Any = None,
    **arguments: Any,
) -> list[tuple[int, float]]:
    """Trains with AdamW as the papers do (beta 0.9 and 0.95, weight decay 0.1, clipping at 1). Returns (step, loss)."""
    set_seed(seed)
    arguments = {
        "adam_beta2": 0.95,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "lr_scheduler_type": "cosine",
    } | arguments
    training = TrainingArguments(
        output_dir=str(output),
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        seed=seed,
        **arguments,
    )
    trainer = Trainer(model, training, train_dataset=dataset, callbacks=list(callbacks), data_collator=data_collator)
    trainer.remove_callback(PrinterCallback)  # a line a run is enough
    trainer.train()
    return [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def mean_loss(model: PreTrainedModel, text: torch.Tensor, length: int, tokens: int, batch_tokens: int = 8192) -> float:
    """Nats a prediction in stretches of `length` bytes or tokens, about `tokens` altogether and `batch_tokens` at a time."""
    stretches = text[: max(1, tokens // length) * length].long().view(-1, length)
    losses = [
        model(batch.to(model.device), labels=batch.to(model.device), use_cache=False).loss.item() * len(batch)
        for batch in stretches.split(max(1, batch_tokens // length))
    ]
    return math.fsum(losses) / len(stretches)


def markdown(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def write_study(output: Path, table: str, results: Mapping[str, Any], figure: Figure) -> None:
    """`table.md`, `results.json` and `plot.png`, and the table on the screen."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "table.md").write_text(table + "\n", encoding="utf-8")
    (output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    figure.savefig(output / "plot.png", dpi=120, bbox_inches="tight")
    print(table)
