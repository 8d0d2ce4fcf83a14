"""Prefix-LM attention by two plain calls against SDPA with a dense mask: time and memory of one layer.

    python scripts/benchmark_prefix_lm.py --lengths 1024 2048 4096 --prefix 0.1 0.25 0.5 0.75

Both sides are what a model's layer runs: `prefix_lm_attention("sdpa")` with the mask that `create_prefix_lm_mask` makes,
and the same function with the dense mask, which transformers' mask functions make. The mask is made once a forward pass
and its time is in its own column. Times are the best of `--repeats`. Memory is what a fresh process grows by, at its
peak, during mask, forward and backward pass (on CUDA: what torch allocates).
"""

import argparse
import multiprocessing
import time

import torch
from hf_cnllm.benchmark.measure import peak_growth
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask

from hf_cnllm.attention.prefix_lm import create_prefix_lm_mask, prefix_lm_attention, prefix_mask_function

FORMS = ("dense", "two calls")


def make_inputs(args, length):
    torch.manual_seed(0)
    shape = (args.batch, args.heads, length, args.head_dim)
    return [torch.randn(shape, dtype=args.dtype, device=args.device, requires_grad=True) for _ in range(3)]


def make_mask(args, form, length, share):
    config = LlamaConfig(attn_implementation="sdpa")
    embeds = torch.empty(args.batch, length, 0, dtype=args.dtype, device=args.device)
    prefix = (torch.arange(length, device=args.device) < round(share * length)).expand(args.batch, -1)
    if form == "two calls":
        return create_prefix_lm_mask(config, embeds, None, None, prefix)
    return create_causal_mask(config, embeds, None, None, or_mask_function=prefix_mask_function(prefix))


def timed(function, args):
    best = float("inf")
    for _ in range(args.repeats):
        if args.device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        result = function()
        if args.device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best, result


def measure_time(args, form, length, share):
    """Seconds for the mask, for the forward pass alone, and for forward and backward."""
    inputs = make_inputs(args, length)
    attend = prefix_lm_attention("sdpa")
    module = torch.nn.Module()
    mask_time, mask = timed(lambda: make_mask(args, form, length, share), args)

    def forward():
        return attend(module, *inputs, mask, scaling=args.head_dim**-0.5)[0]

    def forward_and_backward():
        forward().float().pow(2).sum().backward()

    with torch.no_grad():
        forward_time, _ = timed(forward, args)
    return mask_time, forward_time, timed(forward_and_backward, args)[0]


def measure_memory(args, form, length, share):
    """MiB that mask, forward and backward pass need beyond the inputs and their gradients."""
    inputs = make_inputs(args, length)
    for tensor in inputs:
        tensor.grad = torch.zeros_like(tensor)
    module = torch.nn.Module()

    def step():
        mask = make_mask(args, form, length, share)
        output, _ = prefix_lm_attention("sdpa")(module, *inputs, mask, scaling=args.head_dim**-0.5)
        output.float().pow(2).sum().backward()

    return peak_growth(step, torch.device(args.device))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    parser.add_argument("--prefix", type=float, nargs="+", default=[0.1, 0.25, 0.5, 0.75], help="shares of the length")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()

    print(
        f"{args.device}, {torch.get_num_threads()} threads, {args.dtype}, torch {torch.__version__}: "
        f"batch {args.batch}, {args.heads} heads of {args.head_dim}; milliseconds and MiB, dense mask -> two calls"
    )
    print("| length | prefix | mask | forward | | forward + backward | | memory |")
    print("|---|---|---|---|---|---|---|---|")
    spawn = multiprocessing.get_context("spawn")
    for length in args.lengths:
        for share in args.prefix:
            with spawn.Pool(1, maxtasksperchild=1) as pool:
                memory = [pool.apply(measure_memory, (args, form, length, share)) for form in FORMS]
            dense, ours = (measure_time(args, form, length, share) for form in FORMS)
            mask, forward, both = ((1e3 * a, 1e3 * b) for a, b in zip(dense, ours, strict=True))
            print(
                f"| {length} | {share:.0%} | {mask[0]:.1f} -> {mask[1]:.1f} "
                f"| {forward[0]:.0f} -> {forward[1]:.0f} | {forward[0] / forward[1]:.1f}x "
                f"| {both[0]:.0f} -> {both[1]:.0f} | {both[0] / both[1]:.1f}x "
                f"| {memory[0]:.0f} -> {memory[1]:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
