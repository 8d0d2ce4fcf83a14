"""What each stage let through, from datatrove's counts of every task, and the funnel as in figure 2 of the Baichuan 2 paper."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

STATISTICS_FILE, FUNNEL_FILE = "statistics.json", "funnel.png"
DETAILS = ("dropped_", "masked_", "removed_", "contaminated_", "strings", "alike", "unlike")  # labels that are told


def count(logs: Iterable[str]) -> dict[str, Counter[str]]:
    """The counts of all tasks, added up: stage -> label -> total.

    Args:
        logs: the folders of the passes; their steps are named `stage/step`.
    """
    totals: dict[str, Counter[str]] = {}
    for folder in logs:
        for path in sorted(Path(folder, "stats").glob("*.json")):
            for step in json.loads(path.read_text(encoding="utf-8")):
                labels = totals.setdefault(step["name"].partition("/")[0], Counter())
                for label, value in step["stats"].items():
                    labels[label] += value["total"] if isinstance(value, Mapping) else value
    return totals


def summarize(totals: Mapping[str, Counter[str]], stages: Iterable[str]) -> dict[str, Any]:
    """The contents of `statistics.json`. It holds no times, so that it is the same however often a run was interrupted.

    Args:
        totals: of `count`; the stage `input` is what was read, `tokens` what was packed.
        stages: those of the run, in order.
    """
    read = before = totals["input"]
    funnel = []
    for stage in stages:
        after = totals[stage]
        funnel.append(
            {
                "stage": stage,
                "documents_before": before["documents"],
                "documents": after["documents"],
                "dropped": before["documents"] - after["documents"],
                "bytes_before": before["bytes"],
                "bytes": after["bytes"],
                "details": {label: number for label, number in sorted(after.items()) if label.startswith(DETAILS)},
            }
        )
        before = after
    packed = totals.get("tokens", Counter())
    return {
        "input": {
            "documents": read["documents"],
            "bytes": read["bytes"],
            "skipped": _after(read, "skipped_"),
            "cut_short_files": list(_after(read, "cut_short:")),
            "damaged_files": list(_after(read, "damaged:")),
        },
        "stages": funnel,
        "output": {
            "documents": before["documents"],
            "bytes": before["bytes"],
            **{name: packed[name] for name in ("tokens", "rows") if packed},
        },
    }


def _after(labels: Mapping[str, int], prefix: str) -> dict[str, int]:
    return {label.removeprefix(prefix): n for label, n in sorted(labels.items()) if label.startswith(prefix)}


def draw_funnel(statistics: Mapping[str, Any], path: Path) -> None:
    """A bar for the input and for each stage: the share of the documents and of the bytes that is left."""
    from matplotlib.figure import Figure

    bars = [("input", statistics["input"]), *((each["stage"], each) for each in statistics["stages"])]
    figure = Figure(figsize=(8, 1 + 0.6 * len(bars)), layout="constrained")
    axes = figure.subplots()
    for offset, (unit, color) in enumerate((("documents", "#2f6db5"), ("bytes", "#9fc2e8"))):
        whole = statistics["input"][unit] or 1
        shares = [100 * values[unit] / whole for _, values in bars]
        drawn = axes.barh([i + 0.4 * offset for i in range(len(bars))], shares, height=0.38, color=color, label=unit)
        axes.bar_label(
            drawn, [f"{share:.1f} %  ({values[unit]:,})" for share, (_, values) in zip(shares, bars, strict=True)]
        )
    axes.set_yticks([i + 0.2 for i in range(len(bars))], [name for name, _ in bars])
    axes.invert_yaxis()
    axes.set_xlim(0, 140)
    axes.set_xlabel("% of the input that is left")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
