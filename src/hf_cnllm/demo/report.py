"""How a run is told: on the terminal, as JSON, as a loss curve and as the model card."""

import importlib.util
import json
from pathlib import Path

from ..hub.model_card import fine_tuned_model_card
from .output import SUMMARY_FILE
from .summary import Curve, Summary

LOSS_CURVE_FILE = "loss.png"
CARD_FILE = "README.md"


def require_matplotlib() -> None:
    """Say early what will be needed late.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('the loss curve needs matplotlib: pip install "hf-cnllm[train]"')


def write_report(
    summary: Summary,
    folder: Path,
    *,
    auto_class: str,
    tokenizer_class: str,
    base_model: str | None,
    training: dict,
) -> None:
    """Write the loss curve, the model card and, last, the summary into `folder`."""
    draw_curves(summary.curves, folder / LOSS_CURVE_FILE)
    card = fine_tuned_model_card(
        f"{summary.family}, fine-tuned",
        summary.family,
        base_model=base_model,
        auto_class=auto_class,
        tokenizer_class=tokenizer_class,
        model_path="finetuned",
        training=training,
        results=summary.results(),
        samples=[
            {"question": s.question} | {stage: _shortened(reply) for stage, reply in s.replies.items()}
            for s in summary.samples
        ],
        loss_curve=LOSS_CURVE_FILE,
    )
    card.save(folder / CARD_FILE)
    text = json.dumps(summary.as_json(), ensure_ascii=False, indent=2)
    (folder / SUMMARY_FILE).write_text(text + "\n", encoding="utf-8")


def draw_curves(curves: dict[str, Curve], path: Path) -> None:
    """Draw each training's loss by step, side by side, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(curves), 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, curve) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        axes.plot([step for step, _ in curve], [loss for _, loss in curve])
        axes.set(title=name, xlabel="step", ylabel="training loss (nats)", ylim=(0, None))
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def as_text(summary: Summary, output: Path) -> str:
    """The summary as lines for the terminal."""
    lines = ["", "Samples"]
    for sample in summary.samples:
        lines.append(f"  {sample.question}")
        lines += [f"    {stage + ':':<24} {_shortened(reply)}" for stage, reply in sample.replies.items()]
    lines += ["", "What was measured"]
    results = summary.results()
    width = max(map(len, results))
    lines += [f"  {name:<{width}}  {value}" for name, value in results.items()]
    lines += ["", f"Took {sum(summary.seconds.values()):.0f} s. Everything is in {output}"]
    return "\n".join(lines)


def _shortened(reply: str, length: int = 72) -> str:
    """One line of a reply; untrained models do not stop by themselves."""
    reply = " ".join(reply.split())
    return reply if len(reply) <= length else reply[: length - 1] + "…"
