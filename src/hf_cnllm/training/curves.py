"""Curves of a training as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path

WIDTH, HEIGHT = 5, 3.5  # of a panel, in inches


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

    count = max(len(panels), 1)
    figure = Figure(figsize=(WIDTH * count, HEIGHT))
    # Margins in inches: matplotlib's own layout draws everything twice to find them, which takes as long again.
    figure.subplots_adjust(
        left=0.8 / (WIDTH * count),
        right=1 - 0.15 / (WIDTH * count),
        bottom=0.5 / HEIGHT,
        top=1 - 0.35 / HEIGHT,
        wspace=0.25,
    )
    all_axes = figure.subplots(1, count, squeeze=False)[0]
    for axes, (title, points) in zip(all_axes, panels.items(), strict=False):
        axes.plot(*zip(*points, strict=True))
        axes.set(title=title, xlabel="step", ylabel=y_label)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
