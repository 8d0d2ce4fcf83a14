"""Curves of a training as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path


def draw_curves(
    path: Path, panels: Mapping[str, Sequence[tuple[float, float]]], y_label: str = "", from_zero: bool = False
) -> None:
    """Draws curves side by side as a PNG.

    Args:
        panels: title -> points (step, value).
        from_zero: whether the axes of the values begin at zero.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError('curves need matplotlib: pip install "hf-cnllm[train]"') from error

    figure = Figure(figsize=(5 * max(len(panels), 1), 3.5), layout="constrained")
    for axes, (title, points) in zip(
        figure.subplots(1, max(len(panels), 1), squeeze=False)[0], panels.items(), strict=False
    ):
        axes.plot(*zip(*points, strict=True))
        axes.set(title=title, xlabel="step", ylabel=y_label)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
