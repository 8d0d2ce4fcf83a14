"""Perplexity past the trained length: learned and sinusoidal positions, RoPE, dynamic NTK, LogN, windows, ALiBi.

    python scripts/length_extrapolation.py                       # a quarter of an hour of one core
    python scripts/length_extrapolation.py --data corpus.txt --hidden-size 256 --steps 4000

Trains four small models of bytes on sequences of --length bytes, then reads unseen text of up to 16 times that length: with the
positions they were trained with, and the RoPE model also with each of Qwen's techniques, which need no training. The studies of the
ALiBi paper (arXiv 2108.12409, figure 1) and of the Qwen report (arXiv 2309.16609, table 3), in small. Learned and sinusoidal positions are
transformers' GPT-2's. Writes the models, `table.md`, `results.json` and `plot.png` to --output.
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from benchmark.measure import peak_growth
from hf_cnllm import BaichuanConfig, BaichuanForCausalLM, QWenConfig, QWenLMHeadModel
from study import BYTES, Bytes, markdown, mean_loss, read_text, study_arguments, train, write_study

LAYERS = 4
LONGEST = 16  # times the trained length


def gpt2(args: argparse.Namespace) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=BYTES, n_embd=args.hidden_size, n_layer=LAYERS, n_head=4, n_positions=LONGEST * args.length,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def sinusoidal(args: argparse.Namespace) -> GPT2LMHeadModel:
    """GPT-2 with the positions of Vaswani et al. (section 3.5), which are not trained."""
    model = gpt2(args)
    table = model.transformer.wpe.weight
    angles = torch.arange(len(table))[:, None] * 10_000.0 ** (-torch.arange(0, args.hidden_size, 2) / args.hidden_size)
    with torch.no_grad():
        table.copy_(torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1) * model.config.initializer_range)
    table.requires_grad_(False)
    return model


def rope(args: argparse.Namespace) -> QWenLMHeadModel:
    config = QWenConfig(
        vocab_size=BYTES, hidden_size=args.hidden_size, intermediate_size=2 * (args.hidden_size * 8 // 3),
        num_hidden_layers=LAYERS, num_attention_heads=4, seq_length=args.length,
        max_position_embeddings=LONGEST * args.length,
    )  # fmt: skip
    return QWenLMHeadModel(config)


def alibi(args: argparse.Namespace) -> BaichuanForCausalLM:
    config = BaichuanConfig(
        vocab_size=BYTES, hidden_size=args.hidden_size, intermediate_size=args.hidden_size * 8 // 3,
        num_hidden_layers=LAYERS, num_attention_heads=4, position_embedding="alibi",
        model_max_length=LONGEST * args.length,
    )  # fmt: skip
    return BaichuanForCausalLM(config)


class Row(NamedTuple):
    trained: str
    """Name of the model that it reads with."""
    overrides: dict = {}
    """Changes of its configuration."""


MODELS: dict[str, Callable[[argparse.Namespace], PreTrainedModel]] = {
    "learned": gpt2,
    "sinusoidal": sinusoidal,
    "RoPE": rope,
    "ALiBi": alibi,
}


def rows(length: int) -> dict[str, Row]:
    """The lines of the table. Windows get longer from layer to layer, the last one sees all."""
    windows = [length * 2**layer for layer in range(LAYERS - 1)] + [None]
    plain = {"use_dynamic_ntk": False, "use_logn_attn": False, "window_sizes": None}
    ntk = plain | {"use_dynamic_ntk": True}
    return {
        "learned": Row("learned"),
        "sinusoidal": Row("sinusoidal"),
        "RoPE": Row("RoPE", plain),
        "RoPE + dynamic NTK": Row("RoPE", ntk),
        "RoPE + dynamic NTK + LogN": Row("RoPE", ntk | {"use_logn_attn": True}),
        "RoPE + dynamic NTK + LogN + windows": Row("RoPE", ntk | {"use_logn_attn": True, "window_sizes": windows}),
        "ALiBi": Row("ALiBi"),
    }


@torch.no_grad()
def cost(model: PreTrainedModel, text: torch.Tensor, length: int) -> tuple[float, float | None]:
    """(milliseconds, MiB) of one forward pass over `length` bytes with its loss, the best of three."""
    ids = text[:length].long()[None]

    def read() -> None:
        model(ids, labels=ids, use_cache=False)

    seconds = []
    for _ in range(3):
        started = time.process_time()
        read()
        seconds.append(time.process_time() - started)
    return 1e3 * min(seconds), peak_growth(read, model.device)


def main() -> None:
    parser = study_arguments(__doc__, "length_extrapolation")
    parser.add_argument("--length", type=int, default=256, help="trained length in bytes")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--eval-tokens", type=int, default=32_768, help="bytes read per length and technique")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    text, held_out = read_text(args.data)
    longest = LONGEST * args.length
    if len(held_out) < longest or len(text) <= args.length:
        parser.error(f"--data is too short: the held-out tenth must be at least {longest} bytes (16 * --length)")
    classes = {}
    for name, make in MODELS.items():
        torch.manual_seed(args.seed)
        model = make(args)
        losses = train(
            model, Bytes(text, args.length), args.output, seed=args.seed, max_steps=args.steps, learning_rate=4e-3,
            warmup_steps=args.steps // 20, per_device_train_batch_size=max(1, 2048 // args.length), logging_steps=50,
        )  # fmt: skip
        print(f"{name}: loss {losses[-1][1] if losses else math.nan:.3f}", flush=True)
        model.save_pretrained(args.output / name)
        classes[name] = type(model)

    lengths = [args.length * 2**doubling // 2 for doubling in range(6)]
    results: dict[str, dict] = {}
    for name, row in rows(args.length).items():
        model = classes[row.trained].from_pretrained(args.output / row.trained, **row.overrides).eval()
        perplexities = {n: math.exp(mean_loss(model, held_out, n, args.eval_tokens)) for n in lengths}
        milliseconds, mebibytes = cost(model, held_out, longest)
        results[name] = {"perplexity": perplexities, "milliseconds": milliseconds, "mebibytes": mebibytes}

    multiples = [length / args.length for length in lengths]
    head = ["S/2" if multiple < 1 else "S" if multiple == 1 else f"{multiple:.0f}S" for multiple in multiples]
    lines = [
        [name, *(f"{value:.2f}" for value in row["perplexity"].values()), f"{row['milliseconds']:.0f}",
         "" if row["mebibytes"] is None else f"{row['mebibytes']:.0f}"]
        for name, row in results.items()
    ]  # fmt: skip
    table = markdown([f"S = {args.length} bytes", *head, f"ms at {LONGEST}S", "MiB"], lines)
    figure = Figure()
    axes = figure.add_subplot(xlabel="length in bytes", ylabel="perplexity per byte", yscale="log")
    axes.set_xscale("log", base=2)
    for name, row in results.items():
        axes.plot(lengths, row["perplexity"].values(), marker="o", label=name)
    axes.axvline(args.length, color="gray", linestyle=":", label="trained length")
    axes.legend()
    write_study(args.output, table, results, figure)


if __name__ == "__main__":
    main()
