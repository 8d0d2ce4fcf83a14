"""The loss over a large vocabulary: time and memory of the chunked form beside the naive one and other libraries' kernels.

    python scripts/benchmark_loss.py                                     # Baichuan2's head on 1,024 tokens
    python scripts/benchmark_loss.py --head linear --z-loss-weight 0 --tokens 2048 --hidden-size 4096 --device cuda

Forward and backward of the loss alone, all forms in turns: medians over the rounds. Memory is the growth at its peak above hidden states, weight
and their gradients. `torch` is torch.nn.functional.linear_cross_entropy (torch 2.13) and `liger` Liger-Kernel's fused
linear cross entropy (CUDA): they know neither max-z nor NormHead, so they are measured without max-z, and with NormHead
on the normalized weight, whose gradient autograd then takes through the norms: exact, for two more tensors of its size.
`--clock cpu` counts processor time, for a busy machine (with OMP_NUM_THREADS=1).
"""

import argparse

import torch
from torch import nn

from benchmark.measure import CLOCKS, peak_growth, take_turns
from hf_cnllm.loss.causal_lm import chunked_causal_lm_loss, reference_causal_lm_loss
from hf_cnllm.loss.norm_head import normalize_rows


def other_libraries(hidden_states, weight, labels, normalize, device):
    """Name -> function that gives the loss without max-z, where the library is there."""

    def inputs():
        return hidden_states[0, :-1], normalize_rows(weight) if normalize else weight, labels[0, 1:]

    functions = {}
    if hasattr(nn.functional, "linear_cross_entropy"):
        options = nn.LinearCrossEntropyOptions()
        functions["torch"] = lambda: nn.functional.linear_cross_entropy(*inputs(), options=options)
    if device.type == "cuda":
        try:
            from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
        except ImportError:
            return functions

        def liger():
            hidden, matrix, targets = inputs()
            return LigerFusedLinearCrossEntropyLoss()(matrix, hidden, targets)

        functions["liger"] = liger
    return functions


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden-size", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=125_696)
    parser.add_argument("--head", choices=["linear", "norm"], default="norm")
    parser.add_argument("--z-loss-weight", type=float, default=2e-4)
    parser.add_argument("--frozen", action="store_true", help="no gradient for the weight, as under LoRA")
    parser.add_argument("--chunk-sizes", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    shape = {"dtype": args.dtype, "device": args.device}
    hidden_states = torch.randn(1, args.tokens, args.hidden_size, generator=generator).to(**shape).requires_grad_()
    weight = (
        torch.randn(args.vocab_size, args.hidden_size, generator=generator).mul(args.hidden_size**-0.5).to(**shape)
    )
    weight.requires_grad_(not args.frozen)
    labels = torch.randint(args.vocab_size, (1, args.tokens), generator=generator).to(args.device)
    options = {"normalize": args.head == "norm", "z_loss_weight": args.z_loss_weight}
    losses = {"naive": lambda: reference_causal_lm_loss(hidden_states, weight, labels, **options)}
    for size in args.chunk_sizes:
        losses[f"chunks of {size}"] = lambda size=size: chunked_causal_lm_loss(
            hidden_states, weight, labels, chunk_size=size, **options
        )
    losses |= other_libraries(hidden_states, weight, labels, options["normalize"], args.device)

    def step(loss):
        def run():
            hidden_states.grad = weight.grad = None
            loss().backward()

        return run

    runs = {name: step(loss) for name, loss in losses.items()}
    times = take_turns(runs, args.rounds, args.device, CLOCKS[args.clock])
    peaks = {name: peak_growth(run, args.device) for name, run in runs.items()}
    print(
        f"{args.device}, {torch.get_num_threads()} threads, torch {torch.__version__}, {args.dtype}: {args.tokens} tokens, "
        f"hidden size {args.hidden_size}, vocabulary {args.vocab_size}, {args.head} head, max-z {args.z_loss_weight}"
    )
    print("| form | s | of naive | quartiles | peak MiB | of naive |\n|---|---|---|---|---|---|")
    for name in runs:
        low, ratio, high = times.ratio(name, "naive")
        memory = f"{peaks[name]:.0f} | {peaks[name] / peaks['naive']:.2f}" if peaks[name] is not None else " | "
        print(f"| {name} | {times.median(name):.3f} | {ratio:.2f} | {low:.2f}-{high:.2f} | {memory} |")


if __name__ == "__main__":
    main()
