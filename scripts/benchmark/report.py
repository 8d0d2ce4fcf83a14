"""How a run is told: a table on the terminal, JSON with every round, and the ratios as a picture."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hf_cnllm.families import Shape

from .machine import Machine
from .tasks import Row

COLUMNS = (
    # heading, what stands in it
    ("task", lambda row: row.task),
    ("family", lambda row: row.family),
    ("backend, dtype", lambda row: ", ".join(filter(None, (row.backend, row.dtype)))),
    ("setting", lambda row: row.setting),
    ("here", lambda row: _number(row.value, row.unit)),
    ("beside", lambda row: row.reference and f"{row.reference} {_number(row.reference_value, row.unit)}"),
    ("ratio", lambda row: row.ratio and f"{row.ratio:.2f}"),
    ("quartiles", lambda row: row.quartiles and "{:.2f}-{:.2f}".format(*row.quartiles)),
    ("per FLOP", lambda row: row.ratio_per_flop and f"{row.ratio_per_flop:.2f}"),
    ("of FLOP/s", lambda row: row.flop_share and f"{row.flop_share:.0%}"),
    ("of bandwidth", lambda row: row.bandwidth_share and f"{row.bandwidth_share:.0%}"),
    ("peak MiB, beside, ratio", lambda row: _peaks(row)),
)


def heading(machine: Machine, shape: Shape, busy: str) -> list[str]:
    """What was measured on, a line each."""
    rates = ", ".join(f"{dtype} {rate / 1e9:,.0f} GFLOP/s" for dtype, rate in machine.flops.items())
    lines = [
        f"{machine.name} ({machine.device}, {machine.threads} threads), torch {machine.torch}; {busy}",
        f"matmul {rates}; copy {machine.bandwidth / 1e9:,.0f} GB/s",
        "models: " + ", ".join(f"{name} {value}" for name, value in shape._asdict().items()),
    ]
    if machine.peak_flops:
        lines.append(f"shares are of the data sheet's {machine.peak_flops / 1e12:.0f} TFLOP/s (half precision), ")
        lines[-1] += f"{machine.peak_bandwidth / 1e12:.2f} TB/s"
    return lines


def table(rows: Sequence[Row]) -> list[str]:
    """Lines of a Markdown table, aligned for the terminal. Times and ratios are medians over the rounds."""
    cells = [
        [head for head, _ in COLUMNS],
        *([cell(row) or "" for _, cell in COLUMNS] for row in rows if not row.error),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    used = [i for i, column in enumerate(zip(*cells[1:], strict=True)) if any(column)] if len(cells) > 1 else []
    lines = ["| " + " | ".join(row[i].ljust(widths[i]) for i in used) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (widths[i] + 2) for i in used) + "|")
    return ["", *lines, *(f"not measured: {line(row)}" for row in rows if row.error)]


def line(row: Row) -> str:
    """One row for the progress on the terminal."""
    where = " ".join(filter(None, (row.task, row.family, row.backend, row.dtype, row.setting)))
    if row.error:
        return f"{where}: {row.error}"
    ratio = f", {row.ratio:.2f} of {row.reference}" if row.ratio else ""
    return f"{where}: {_number(row.value, row.unit)}{ratio}"


def write_json(rows: Sequence[Row], machine: Machine, arguments: dict[str, Any], path: Path) -> None:
    content = {
        "machine": asdict(machine),
        "arguments": arguments | {"shape": arguments["shape"]._asdict()},
        "rows": [asdict(row) for row in rows],
    }
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2, default=str) + "\n", encoding="utf-8")


def draw_ratios(rows: Sequence[Row], path: Path) -> None:
    """Bars of the median ratios with their quartiles, one panel per task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels: dict[str, list[Row]] = {}
    for row in rows:
        if row.ratio and not row.error:
            panels.setdefault(row.task, []).append(row)
    heights = [len(panel) for panel in panels.values()] or [1]
    figure = Figure(figsize=(9, 1.2 * len(heights) + 0.28 * sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axis, (task, panel) in zip(axes, panels.items(), strict=False):
        names = [" · ".join(filter(None, (r.family, r.setting, r.backend, r.dtype, r.reference))) for r in panel]
        low, high = zip(*((r.ratio - r.quartiles[0], r.quartiles[1] - r.ratio) for r in panel), strict=True)
        positions = range(len(panel))
        axis.barh(positions, [r.ratio for r in panel], xerr=(low, high), color="#4477aa", ecolor="#222222", height=0.7)
        axis.axvline(1, color="#cc3311", linewidth=1)
        axis.set_yticks(positions, names, fontsize=7)
        axis.invert_yaxis()
        axis.set_title(f"{task}: time by that of the reference", fontsize=9)
        axis.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit.startswith("s") and unit != "slope" and value < 1:
        return f"{value * 1e3:.3g} m{unit}"
    return f"{value:.3g} {unit}"


def _peaks(row: Row) -> str:
    if row.peak_mib is None:
        return ""
    if not row.reference_peak_mib or row.reference_peak_mib <= 0:
        return f"{row.peak_mib:.0f}"
    return f"{row.peak_mib:.0f}, {row.reference_peak_mib:.0f}, {row.peak_mib / row.reference_peak_mib:.2f}"
