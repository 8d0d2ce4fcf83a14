"""ChatGLM's INT8 and INT4 linear layers beside the plain one of their shape: time of a call and bytes of the weights.

    python scripts/benchmark_int4.py --device cuda --dtype bfloat16

One token is a decoding step, where the weights are read once: the ratio says what unpacking costs. All forms run in turns;
times are medians over the rounds.
"""

import argparse
from functools import partial

import torch
from torch import nn

from benchmark.measure import MIB, take_turns
from hf_cnllm.models.chatglm.quantized_linear import QuantizedLinear

BITS = (8, 4)


def size(module: nn.Module) -> float:
    """MiB of its weights."""
    return sum(tensor.numel() * tensor.element_size() for tensor in module.state_dict().values()) / MIB


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--in-features", type=int, default=4096)
    parser.add_argument("--out-features", type=int, default=13696)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 8, 512])
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.float32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20)
    args = parser.parse_args()
    torch.manual_seed(0)
    plain = nn.Linear(args.in_features, args.out_features, bias=False).to(args.device, args.dtype)
    layers = {"plain": plain}
    for bits in BITS:
        layers[f"INT{bits}"] = QuantizedLinear.like(plain, bits).to(args.device)
        layers[f"INT{bits}"].quantize_from(plain)
    sizes = ", ".join(f"{name} {size(layer):.1f} MiB" for name, layer in layers.items())
    print(f"{args.in_features} x {args.out_features}, {args.dtype}, {args.device}: {sizes}")
    print("| tokens | plain ms | " + " | ".join(f"INT{bits} / plain (quartiles)" for bits in BITS) + " |")
    print("|---|---|---|---|")
    for tokens in args.tokens:
        inputs = torch.randn(tokens, args.in_features).to(args.device, args.dtype)
        runs = {name: partial(layer, inputs) for name, layer in layers.items()}
        times = take_turns(runs, args.rounds, torch.device(args.device))
        ratios = ["{1:.2f} ({0:.2f}-{2:.2f})".format(*times.ratio(f"INT{bits}", "plain")) for bits in BITS]
        print(f"| {tokens} | {1e3 * times.median('plain'):.3f} | {' | '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
