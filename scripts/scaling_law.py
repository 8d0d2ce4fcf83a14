"""A scaling law in small: fitted on all sizes but the largest, whose loss it predicts (Baichuan 2, section 2.7 and figure 4).

    python scripts/scaling_law.py                                   # fifteen minutes of one core
    python scripts/scaling_law.py --widths 32 64 96 128 192 256 --tokens-per-parameter 20

L(C) = a * C^b + L_inf, of the compute C = 6 * parameters * tokens, with as many tokens a parameter for all sizes. The paper fits
10 million to 3 billion parameters and meets the losses of its 7B and 13B. Writes `table.md`, `results.json` and `plot.png`.
"""

import math
from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from hf_cnllm import BaichuanConfig, BaichuanForCausalLM
from study import BYTES, Bytes, markdown, mean_loss, read_text, study_arguments, train, write_study

GRID = 2000  # values of L_inf that are tried


def fit(compute: Sequence[float], losses: Sequence[float]) -> tuple[float, float, float]:
    """(a, b, L_inf) with the least squares of log(L - L_inf): a line in log C for every L_inf of a grid below all losses."""
    x = torch.tensor(compute, dtype=torch.double).log()
    y = torch.tensor(losses, dtype=torch.double)
    floors = torch.linspace(0, 1, GRID + 1, dtype=torch.double)[:-1] * y.min()
    logs = (y[None, :] - floors[:, None]).log()
    design = torch.stack([torch.ones_like(x), x], dim=1)
    lines = torch.linalg.lstsq(design.expand(GRID, -1, -1), logs[..., None]).solution[..., 0]
    predicted = (lines @ design.T).exp() + floors[:, None]
    best = int((predicted - y).pow(2).sum(1).argmin())
    return math.exp(lines[best, 0]), float(lines[best, 1]), float(floors[best])


def main() -> None:
    parser = study_arguments(__doc__, "scaling_law")
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[16, 24, 32, 48, 64, 96], help="at least five, rising"
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens-per-parameter", type=float, default=10)
    parser.add_argument("--length", type=int, default=64, help="bytes of a sequence")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--eval-tokens", type=int, default=65_536)
    args = parser.parse_args()
    if len(args.widths) < 4 or args.widths != sorted(set(args.widths)):
        parser.error("--widths: three parameters are fitted to all but the largest, so give at least four, rising")
    text, held_out = read_text(args.data)
    results: list[dict] = []
    for width in args.widths:
        torch.manual_seed(0)
        config = BaichuanConfig(
            vocab_size=BYTES, hidden_size=width, intermediate_size=width * 8 // 3, num_hidden_layers=args.layers,
            num_attention_heads=4,
        )  # fmt: skip
        model = BaichuanForCausalLM(config)
        parameters = sum(weight.numel() for weight in model.model.layers.parameters())
        steps = max(1, round(args.tokens_per_parameter * parameters / (args.batch * args.length)))
        train(
            model, Bytes(text, args.length), args.output, max_steps=steps, per_device_train_batch_size=args.batch,
            learning_rate=1e-2 * (16 / width) ** 0.5, warmup_steps=max(1, steps // 20), logging_steps=steps,
        )  # fmt: skip
        tokens = steps * args.batch * args.length
        loss = mean_loss(model.eval(), held_out, args.length, args.eval_tokens)
        results.append(
            {
                "width": width,
                "parameters": parameters,
                "tokens": tokens,
                "compute": 6.0 * parameters * tokens,
                "loss": loss,
            }
        )
        print(f"width {width}: {parameters} parameters, {tokens} bytes, held-out loss {loss:.4f}", flush=True)

    compute, losses = [one["compute"] for one in results], [one["loss"] for one in results]
    a, b, floor = fit(compute[:-1], losses[:-1])
    law = [a * c**b + floor for c in compute]
    rows = [
        [one["width"], f"{one['parameters']:,}", f"{one['tokens']:,}", f"{one['compute']:.2e}", f"{one['loss']:.4f}", f"{value:.4f}",
         f"{value / one['loss'] - 1:+.2%}" + (" (predicted)" if one is results[-1] else "")]
        for one, value in zip(results, law, strict=True)
    ]  # fmt: skip
    table = markdown(["width", "parameters", "bytes", "FLOPs", "loss", "law", "error"], rows)
    table += f"\n\nL(C) = {a:.3g} * C^{b:.3g} + {floor:.3g}"
    figure = Figure(layout="constrained")
    axes = figure.subplots()
    axes.plot(compute, law, color="gray", label="law, fitted without the largest")
    axes.scatter(compute[:-1], losses[:-1], label="fitted")
    axes.scatter(compute[-1:], losses[-1:], marker="*", s=150, label="the largest")
    axes.set(xscale="log", xlabel="FLOPs", ylabel="held-out loss, nats a byte")
    axes.legend()
    write_study(args.output, table, {"sizes": results, "a": a, "b": b, "floor": floor}, figure)


if __name__ == "__main__":
    main()
