"""Prefix-LM attention by two plain calls against SDPA with a dense mask: time and memory of one layer.

    python scripts/benchmark_prefix_lm.py --lengths 1024 2048 4096 --prefix 0.1 0.25 0.5 0.75

Both sides are what a model's layer runs: `prefix_lm_attention("sdpa")` with the mask that `create_prefix_lm_mask` makes,
and the same function with the dense mask, which transformers' mask functions make. The mask is made once a forward pass
and its time is in its own column. Both sides run in turns; times are medians over the rounds, and so is the gain, of a
round's own times. Memory is what a fresh process grows by, at its
peak, during mask, forward and backward pass (on CUDA: what torch allocates).
"""

import argparse
import multiprocessing

import torch
from transformers import LlamaConfig
from transformers.masking_utils import create_causal_mask

from benchmark.measure import peak_growth, take_turns
from hf_cnllm.attention.prefix_lm import create_prefix_lm_mask, prefix_lm_attention

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
    return create_causal_mask(
        config, embeds, None, None, or_mask_function=lambda batch, head, query, key: prefix[batch, key]
    )


def runs_of(args, form, length, share):
    """Name -> function: the mask, the forward pass alone, and forward and backward."""
    inputs = make_inputs(args, length)
    attend = prefix_lm_attention("sdpa")
    module = torch.nn.Module()
    mask = make_mask(args, form, length, share)

    def forward():
        return attend(module, *inputs, mask, scaling=args.head_dim**-0.5)[0]

    def both():
        forward().float().pow(2).sum().backward()

    return {
        "mask": lambda: make_mask(args, form, length, share),
        "forward": torch.no_grad()(forward),
        "both": both,
    }


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
    parser.add_argument("--rounds", type=int, default=5)
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
            runs = {form: runs_of(args, form, length, share) for form in FORMS}
            cells = [f"{length}", f"{share:.0%}"]
            for part, digits in (("mask", 1), ("forward", 0), ("both", 0)):
                turns = {form: runs[form][part] for form in FORMS}
                times = take_turns(turns, args.rounds, torch.device(args.device))
                cells.append(" -> ".join(f"{1e3 * times.median(form):.{digits}f}" for form in FORMS))
                if part != "mask":
                    cells.append("{1:.1f}x".format(*times.ratio(*FORMS)))
            cells.append(" -> ".join(f"{size:.0f}" for size in memory))
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
