"""ALiBi on SDPA: time and memory of the folded form beside plain causal attention and the dense bias.

    python scripts/benchmark_alibi.py                       # the table for 1k ... 16k tokens
    python scripts/benchmark_alibi.py --heads 12 --head-dim 128 --dtype bfloat16

Every length runs the three forms in turns, so that a slow moment of the machine hits all of them; times are medians over
the rounds, and so is the ratio of a round's own times. Memory is the growth of the process's peak (CPU) or of the allocator's (CUDA) over one forward pass, measured
in a fresh process per cell on the CPU. The dense bias stops where it would pass --dense-limit GiB.
"""

import argparse
import math
import subprocess
import sys

import torch
from torch import nn

from benchmark.measure import peak_growth, take_turns
from hf_cnllm import BaichuanConfig
from hf_cnllm.attention.alibi import alibi_sdpa_attention, alibi_slopes, create_alibi_mask


def make(form: str, heads: int, head_dim: int, length: int, dtype: torch.dtype, device: str):
    """A function that runs one forward pass of the form, mask included."""
    generator = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, heads, length, head_dim, generator=generator, device=device, dtype=dtype) for _ in range(3)
    )
    scaling = head_dim**-0.5
    sdpa = nn.functional.scaled_dot_product_attention
    if form == "plain":
        return lambda: sdpa(query, key, value, is_causal=True, scale=scaling)
    if form == "dense":

        def dense():
            positions = torch.arange(length, device=device)
            distances = positions[None, :] - positions[:, None]
            bias = (alibi_slopes(heads).to(device)[:, None, None] * distances).masked_fill(distances > 0, -math.inf)
            return sdpa(query, key, value, attn_mask=bias.to(dtype)[None], scale=scaling)

        return dense
    config = BaichuanConfig(hidden_size=heads * head_dim, num_attention_heads=heads, position_embedding="alibi")
    config._attn_implementation = "sdpa"
    layer = nn.Module()

    def folded():
        mask = create_alibi_mask(config, query.new_empty(1, length, 0), None, None)
        return alibi_sdpa_attention(layer, query, key, value, mask, scaling)[0]

    return folded


growth_without_gradients = torch.no_grad()(peak_growth)


def peak_in_fresh_process(form: str, length: int, args: argparse.Namespace) -> float:
    if args.device == "cuda":
        run = make(form, args.heads, args.head_dim, length, args.dtype, args.device)
        return growth_without_gradients(run, torch.device(args.device))
    shape = ["--heads", args.heads, "--head-dim", args.head_dim, "--dtype", str(args.dtype).removeprefix("torch.")]
    command = [sys.executable, __file__, "--cell", form, "--lengths", length, *shape]
    return float(subprocess.run([*map(str, command)], check=True, capture_output=True, text=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, default=10)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 16384])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dense-limit", type=float, default=4.0, help="GiB that the dense bias may take")
    parser.add_argument("--cell", choices=["plain", "folded", "dense"], help=argparse.SUPPRESS)
    args = parser.parse_args()

    if args.cell:
        # The first call of a kernel loads libraries: a short one goes ahead and does not count.
        with torch.no_grad():
            make(args.cell, args.heads, args.head_dim, 64, args.dtype, args.device)()
            run = make(args.cell, args.heads, args.head_dim, args.lengths[0], args.dtype, args.device)
        print(growth_without_gradients(run, torch.device("cpu")))
        return

    print(f"{args.heads} heads of {args.head_dim}, {args.dtype}, {args.device}, {torch.get_num_threads()} threads")
    print(
        "| tokens | plain s | folded s | dense s | folded / plain (quartiles) | plain MiB | folded MiB | dense MiB |"
    )
    print("|---|---|---|---|---|---|---|---|")
    growth = []
    for length in args.lengths:
        forms = ["plain", "folded"]
        if args.heads * length**2 * 4 * 2 < args.dense_limit * 2**30:
            forms.append("dense")
        runs = {form: make(form, args.heads, args.head_dim, length, args.dtype, args.device) for form in forms}
        with torch.no_grad():
            times = take_turns(runs, args.rounds, torch.device(args.device))
        del runs
        memory = {form: peak_in_fresh_process(form, length, args) for form in forms}
        growth.append((length, memory["folded"]))
        cells = [f"{times.median(form):.3f}" if form in forms else "" for form in ("plain", "folded", "dense")]
        sizes = [f"{memory[form]:.0f}" if form in memory else "" for form in ("plain", "folded", "dense")]
        ratio = "{1:.2f} ({0:.2f}-{2:.2f})".format(*times.ratio("folded", "plain"))
        print(f"| {length} | {' | '.join(cells)} | {ratio} | {' | '.join(sizes)} |", flush=True)
    if len(growth) > 1:
        (short, small), (long, large) = growth[0], growth[-1]
        print(f"log-log slope of the folded form's memory: {math.log(large / small) / math.log(long / short):.2f}")


if __name__ == "__main__":
    main()
