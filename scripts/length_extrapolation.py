"""Perplexity past the trained length, without training: dynamic NTK, LogN and windows on a small Qwen.

    python scripts/length_extrapolation.py                       # a few minutes on a CPU
    python scripts/length_extrapolation.py --text corpus.txt --seq-length 256 --steps 4000

Trains a byte-level model of four layers on sequences of --seq-length bytes (by default of Python's standard library,
which every machine has), then reads unseen text of up to 16 times that length under each technique: the study of the
Qwen report (arXiv 2309.16609, results on long-context inference) in small. Writes the model, `table.md`, `results.json`
and `plot.png` to --output.
"""

import argparse
import json
import math
import random
import sysconfig
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments, set_seed

from hf_cnllm import QWenConfig, QWenLMHeadModel

LAYERS = 4


def techniques(seq_length: int) -> dict[str, dict]:
    """Configuration overrides per row of the table. Windows get longer from layer to layer, the last one sees all."""
    windows = [seq_length * 2**layer for layer in range(LAYERS - 1)] + [None]
    plain = {"use_dynamic_ntk": False, "use_logn_attn": False, "window_sizes": None}
    return {
        "none": plain,
        "dynamic NTK": plain | {"use_dynamic_ntk": True},
        "dynamic NTK + LogN": plain | {"use_dynamic_ntk": True, "use_logn_attn": True},
        "dynamic NTK + LogN + windows": {"use_dynamic_ntk": True, "use_logn_attn": True, "window_sizes": windows},
    }


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
    """(bytes to train on, bytes held out): of one file its last tenth, of the standard library a tenth of its files."""
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


def train(text: torch.Tensor, args: argparse.Namespace) -> None:
    config = QWenConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=2 * 344,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        seq_length=args.seq_length,
        max_position_embeddings=16 * args.seq_length,
    )
    training_args = TrainingArguments(
        output_dir=str(args.output),
        max_steps=args.steps,
        per_device_train_batch_size=max(1, 4096 // args.seq_length),
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=args.steps // 20,
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=50,
        save_strategy="no",
        report_to="none",
        seed=args.seed,
    )
    trainer = Trainer(model=QWenLMHeadModel(config), args=training_args, train_dataset=Bytes(text, args.seq_length))
    trainer.train()
    trainer.save_model()


@torch.no_grad()
def perplexity(model: QWenLMHeadModel, text: torch.Tensor, length: int, tokens: int) -> float:
    """Over all predictions in stretches of `length`, about `tokens` of them."""
    stretches = text[: max(1, tokens // length) * length].long().view(-1, length)
    losses = [
        model(batch.to(model.device), labels=batch.to(model.device), use_cache=False).loss.item() * len(batch)
        for batch in stretches.split(max(1, 8192 // length))
    ]
    return math.exp(sum(losses) / len(stretches))


def report(results: dict[str, dict[int, float]], args: argparse.Namespace) -> str:
    """Writes table, numbers and plot; returns the table."""
    lengths = list(next(iter(results.values())))
    multiples = [length / args.seq_length for length in lengths]
    head = ["S/2" if multiple < 1 else "S" if multiple == 1 else f"{multiple:.0f}S" for multiple in multiples]
    rows = [
        f"| {name} | " + " | ".join(f"{row[length]:.2f}" for length in lengths) + " |" for name, row in results.items()
    ]
    table = "\n".join(
        [f"| S = {args.seq_length} bytes | {' | '.join(head)} |", "|---" * (len(lengths) + 1) + "|", *rows]
    )
    (args.output / "table.md").write_text(table + "\n", encoding="utf-8")
    (args.output / "results.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    figure = Figure()
    axes = figure.add_subplot(xlabel="length in bytes", ylabel="perplexity per byte", yscale="log")
    axes.set_xscale("log", base=2)
    for name, row in results.items():
        axes.plot(lengths, [row[length] for length in lengths], marker="o", label=name)
    axes.axvline(args.seq_length, color="gray", linestyle=":", label="trained length")
    axes.legend()
    figure.savefig(args.output / "plot.png", dpi=120, bbox_inches="tight")
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, help="a text file to train and test on")
    parser.add_argument("--seq-length", type=int, default=128, help="trained length in bytes")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--eval-tokens", type=int, default=32_768, help="bytes read per length and technique")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/length_extrapolation"))
    args = parser.parse_args()

    set_seed(args.seed)
    training_text, held_out = read_text(args.text)
    longest = 16 * args.seq_length
    if len(held_out) < longest or len(training_text) <= args.seq_length:
        parser.error(f"--text is too short: the held-out tenth must be at least {longest} bytes (16 * --seq-length)")
    args.output.mkdir(parents=True, exist_ok=True)
    train(training_text, args)

    lengths = [args.seq_length * 2**doubling // 2 for doubling in range(6)]
    results = {}
    for name, overrides in techniques(args.seq_length).items():
        model = QWenLMHeadModel.from_pretrained(args.output, **overrides).eval()
        results[name] = {length: perplexity(model, held_out, length, args.eval_tokens) for length in lengths}
    print(report(results, args))


if __name__ == "__main__":
    main()
