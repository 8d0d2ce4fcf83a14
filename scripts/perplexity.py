"""Perplexity of a text by context length, of any causal model.

    python scripts/perplexity.py MODEL --data corpus.txt --lengths 512 1024 2048 4096

The text is cut into stretches of each length, which are read by themselves: a model that makes use of a longer context has a lower
perplexity with it, and one that fails beyond its trained length a higher one. Perplexity is a token's, so it compares lengths, not
vocabularies. Writes `table.md`, `results.json` and `plot.png` to --output.
"""

import argparse
import math
from pathlib import Path

import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_cnllm  # noqa: F401  # the families' classes
from hf_cnllm.hub.places import check_is_checkpoint
from hf_cnllm.training.recipe import run_recipe
from study import markdown, mean_loss, write_study


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint, a folder or a name on the Hub")
    parser.add_argument("--data", type=Path, required=True, help="a text file, UTF-8")
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048], help="in tokens")
    parser.add_argument("--tokens", type=int, default=65_536, help="read at each length, at most")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--output", type=Path, default=Path("outputs/perplexity"), help="folder (default: %(default)s)"
    )
    args = parser.parse_args()

    check_is_checkpoint(args.model, "MODEL")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = args.data.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    if not len(ids):
        raise ValueError(f"--data {args.data} holds no text")
    if min(args.lengths) < 2 or max(args.lengths) > len(ids):
        parser.error(f"--lengths: {args.data} has {len(ids)} tokens, so each must be from 2 to {len(ids)}")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(args.device).eval()
    ids = ids[: max(args.tokens, *args.lengths)]
    perplexities = {
        length: math.exp(mean_loss(model, ids, length, len(ids), batch_tokens=length)) for length in args.lengths
    }

    rows = [[f"{n:,}", len(ids) // n, f"{perplexity:.3f}"] for n, perplexity in perplexities.items()]
    figure = Figure()
    axes = figure.add_subplot(xlabel="tokens of context", ylabel="perplexity per token", yscale="log")
    axes.set_xscale("log", base=2)
    axes.plot(perplexities.keys(), perplexities.values(), marker="o")
    table = markdown(["context, tokens", "stretches", "perplexity"], rows)
    write_study(args.output, table, {"model": args.model, "perplexity": perplexities}, figure)


if __name__ == "__main__":
    run_recipe(main)
