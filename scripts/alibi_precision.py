"""How exact folded ALiBi is: its error against fp64 beside that of the dense bias in the same dtype.

    python scripts/alibi_precision.py                        # fp32, bf16, fp16; 1k ... 32k; 5, 12, 40, 64 heads

For every head count the steepest and the flattest head are computed (the others lie between) for the last --rows queries
of each length, which is where the numbers are largest. `dense` is slope·(j − i) as a mask; `dense, slope·j` is the form of
the original code. Forward error of the output and error of the gradients of q, k and v, each relative to the largest
entry of the truth.
"""

import argparse
import math

import torch
from torch import nn
from torch.nn import functional as F

from hf_cnllm.attention.alibi import alibi_sdpa_attention, alibi_slopes, fold_alibi


def attend(form: str, query, key, value, slopes, scaling):
    """The last queries of `key`, on SDPA."""
    queries, keys = query.shape[2], key.shape[2]
    index = torch.arange(keys, device=query.device)
    rows = index[keys - queries :]
    hidden = index[None, :] > rows[:, None]
    if form == "folded":
        mask = torch.zeros(hidden.shape, dtype=query.dtype).masked_fill(hidden, -math.inf)[None, None]
        folded = fold_alibi(slopes, rows, index, None, scaling, query.dtype, mask)
        return alibi_sdpa_attention(nn.Module(), query, key, value, folded, scaling)[0].transpose(1, 2)
    reference = rows[:, None] if form == "dense" else 0
    bias = (slopes[:, None, None] * (index[None, :] - reference)).expand(-1, queries, -1)
    bias = bias.masked_fill(hidden, -math.inf).to(query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None], scale=scaling)


def truth(query, key, value, slopes, scaling):
    query, key, value = query.double(), key.double(), value.double()
    queries, keys = query.shape[2], key.shape[2]
    index = torch.arange(keys, dtype=torch.double, device=query.device)
    distance = index[None, :] - index[keys - queries :, None]
    scores = query @ key.transpose(-1, -2) * scaling + slopes.double()[:, None, None] * distance
    return scores.masked_fill(distance > 0, -math.inf).softmax(-1) @ value


def results(form, tensors, slopes, scaling, weights):
    """Output and gradients of one form."""
    inputs = [tensor.clone().requires_grad_() for tensor in tensors]
    function = truth if form == "truth" else lambda *args: attend(form, *args)
    output = function(*inputs, slopes, scaling)
    grads = torch.autograd.grad((output * weights.to(output.dtype)).sum(), inputs)
    return [output.detach().double(), *(grad.double() for grad in grads)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heads", type=int, nargs="+", default=[5, 12, 40, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384, 32768])
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--device", default="cpu", help="whose kernels: cpu (default) or cuda")
    args = parser.parse_args()
    forms = ("folded", "dense", "dense, slope·j")
    scaling = args.head_dim**-0.5
    print("| dtype | heads | tokens | " + " | ".join(f"{form}: out / grad" for form in forms) + " |")
    print("|---|---|---|" + "---|" * len(forms))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for heads in args.heads:
            slopes = alibi_slopes(heads)
            slopes = torch.stack([slopes.max(), slopes.min()]).to(args.device)
            for length in args.lengths:
                generator = torch.Generator().manual_seed(length)
                shapes = [(1, 2, n, args.head_dim) for n in (args.rows, length, length)]
                tensors = [torch.randn(shape, generator=generator).to(args.device, dtype) for shape in shapes]
                weights = torch.randn(shapes[0], generator=generator).to(args.device)
                exact = results("truth", tensors, slopes, scaling, weights)
                cells = []
                for form in forms:
                    errors = [
                        ((got - want).abs().max() / want.abs().max()).item()
                        for got, want in zip(results(form, tensors, slopes, scaling, weights), exact, strict=True)
                    ]
                    cells.append(f"{errors[0]:.1e} / {max(errors[1:]):.1e}")
                print(f"| {str(dtype)[6:]} | {heads} | {length} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
