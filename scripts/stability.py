"""NormHead and max-z (Baichuan 2, section 2.4): loss and largest logit of one small model up to the rates where it diverges.

    python scripts/stability.py                                # ten minutes of one core
    python scripts/stability.py --steps 2000 --hidden-size 256 --seeds 0 1 2 3 4

The paper says that NormHead steadies training and that max-z keeps logits small. Here the same model of bytes is trained with
{plain head, NormHead} x {no max-z, 2e-4} at every learning rate and seed. A run diverges when its loss is not a number, or ends
half a nat above its own lowest point, or worse than that of all bytes alike. Writes `table.md`, `results.json` and `plot.png` to --output.
"""

import itertools
import math
import statistics

import torch
from matplotlib.figure import Figure
from transformers import TrainerCallback

from hf_cnllm import BaichuanConfig, BaichuanForCausalLM
from study import BYTES, Bytes, markdown, read_text, study_arguments, train, write_study

HEADS = {"plain head": False, "NormHead": True}
Z_WEIGHTS = {"": None, " + max-z": 2e-4}
RISE = 0.5  # nats above the lowest point


class LargestLogit(TrainerCallback):
    """max |logit| on a batch of its own, at every log."""

    def __init__(self, batch: torch.Tensor):
        self.batch, self.points = batch, []

    @torch.no_grad()
    def on_log(self, args, state, control, model=None, **kwargs):
        self.points.append((state.global_step, model(self.batch.to(model.device)).logits.abs().max().item()))


def make_model(args, norm_head: bool, z_loss_weight: float | None) -> BaichuanForCausalLM:
    config = BaichuanConfig(
        vocab_size=BYTES,
        hidden_size=args.hidden_size,
        intermediate_size=args.hidden_size * 8 // 3,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        norm_head=norm_head,
        z_loss_weight=z_loss_weight or 0.0,
    )
    return BaichuanForCausalLM(config)


def has_diverged(losses: list[float]) -> bool:
    if not all(map(math.isfinite, losses)):
        return True
    end = statistics.fmean(losses[-max(1, len(losses) // 10) :])
    return end > min(min(losses) + RISE, math.log(BYTES))


def highest_steady_rate(runs: list[dict], rates: list[float]) -> float | None:
    """The highest rate up to which no seed diverges."""
    steady = itertools.takewhile(lambda rate: not any(run["diverged"] for run in runs if run["rate"] == rate), rates)
    return max(steady, default=None)


def main() -> None:
    parser = study_arguments(__doc__, "stability")
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=64, help="bytes of a sequence")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    args = parser.parse_args()
    text, held_out = read_text(args.data)
    dataset, batch = Bytes(text, args.length), held_out[: 8 * args.length].long().view(8, args.length)
    results: dict[str, list[dict]] = {}
    for (head, norm_head), (extra, weight) in itertools.product(HEADS.items(), Z_WEIGHTS.items()):
        for rate, seed in itertools.product(args.rates, args.seeds):
            torch.manual_seed(seed)
            logits = LargestLogit(batch)
            losses = train(
                make_model(args, norm_head, weight), dataset, args.output, seed=seed, callbacks=[logits],
                max_steps=args.steps, learning_rate=rate, per_device_train_batch_size=args.batch, logging_steps=5,
            )  # fmt: skip
            run = {"rate": rate, "seed": seed, "losses": losses, "largest_logits": logits.points}
            run["diverged"] = has_diverged([loss for _, loss in losses])
            results.setdefault(head + extra, []).append(run)
            told = "diverged" if run["diverged"] else f"loss {losses[-1][1]:.3f}"
            print(
                f"{head + extra}, rate {rate:g}, seed {seed}: {told}, largest logit {logits.points[-1][1]:.1f}",
                flush=True,
            )

    def cell(runs: list[dict], rate: float) -> str:
        at_rate = [run for run in runs if run["rate"] == rate]
        diverged = sum(run["diverged"] for run in at_rate)
        if diverged:
            return f"{diverged} of {len(at_rate)} diverge"
        last, highest, logit = (
            statistics.median(find(run) for run in at_rate)
            for find in (
                lambda run: run["losses"][-1][1],
                lambda run: max(loss for _, loss in run["losses"]),
                lambda run: run["largest_logits"][-1][1],
            )
        )
        return f"{last:.2f}, {highest:.1f}, {logit:.1f}"

    head = ["last and highest loss, largest logit", *(f"rate {rate:g}" for rate in args.rates), "steady up to"]
    rows = [
        [name, *(cell(runs, rate) for rate in args.rates), highest_steady_rate(runs, args.rates)]
        for name, runs in results.items()
    ]
    figure = Figure(figsize=(4 * len(args.rates), 7), layout="constrained")
    panels = figure.subplots(2, len(args.rates), squeeze=False)
    for column, rate in enumerate(args.rates):
        for number, (name, runs) in enumerate(results.items()):
            for run in (run for run in runs if run["rate"] == rate):
                for row, key in enumerate(("losses", "largest_logits")):
                    label = name if run["seed"] == args.seeds[0] else None
                    panels[row][column].plot(*zip(*run[key], strict=True), color=f"C{number}", alpha=0.7, label=label)
        panels[0][column].set(title=f"rate {rate:g}", ylabel="loss", ylim=(1, 8))
        panels[1][column].set(ylabel="largest |logit|", yscale="log", xlabel="step")
    panels[0][0].legend()
    write_study(args.output, markdown(head, rows), results, figure)


if __name__ == "__main__":
    main()
