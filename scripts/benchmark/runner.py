"""Goes through families, backends, dtypes and tasks, and tells the results."""

import argparse
import gc
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging

from ..demo.output import check_output, staged_folder
from . import report
from .machine import Machine, busy_with, measure_machine
from .measure import CLOCKS
from .start_up import measure_import, measure_load, measure_tokenizer
from .subjects import SHAPES, SUBJECTS, Shape
from .tasks import MODEL_TASKS, Bench, Row, Work

REFUSALS = (ValueError, ImportError, NotImplementedError, RuntimeError)


def run_benchmark(args: argparse.Namespace) -> int:
    """The command. The exit code is 1 if something could not be measured, which is then said."""
    if args.output is not None:
        report.require_matplotlib()
        check_output(args.output, args.overwrite)
    device = _device(args.device)
    if device.type == "cuda" and args.clock == "cpu":
        raise ValueError("--clock cpu does not see what a CUDA device does; use wall")
    shape = _shape(args, device)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print("Measuring the machine …", file=sys.stderr, flush=True)
    machine = measure_machine(device, args.dtypes, CLOCKS[args.clock])
    print("\n".join(report.heading(machine, shape, busy_with())), flush=True)

    rows: list[Row] = []
    for row in measure(args, shape, machine):
        rows.append(row)
        print(report.line(row), file=sys.stderr, flush=True)
    print("\n".join(report.table(rows)))
    print(f"\n{busy_with()} at the end")
    if args.output is not None:
        with staged_folder(args.output, args.overwrite) as folder:
            report.draw_ratios(rows, folder / "ratios.png")
            report.write_json(rows, machine, shape, vars(args), folder)
        print(f"Wrote {args.output}")
    return 1 if any(row.error for row in rows) else 0


def measure(args: argparse.Namespace, shape: Shape, machine: Machine) -> Iterator[Row]:
    """Every row that the arguments ask for, as it is measured. What is refused becomes a row that says why."""
    work = Work(**{name: getattr(args, name) for name in Work.__dataclass_fields__})
    if "import" in args.tasks:
        yield from measure_import(work)
    for name in args.families:
        subject = SUBJECTS[name]
        if "tokenizer" in args.tasks:
            yield from _or_refusal(
                measure_tokenizer(name, subject, _vocabularies(args), work), Row("tokenizer", name, "")
            )
        for dtype in args.dtypes:
            if "load" in args.tasks:
                yield from measure_load(name, subject, shape, dtype, work)
            for backend in args.backends:
                bench = Bench(name, subject, shape, backend, dtype, work, machine)
                for task in args.tasks:
                    if task in MODEL_TASKS:
                        nothing = Row(task, name, "", backend=backend, dtype=dtype)
                        yield from _or_refusal(MODEL_TASKS[task](bench), nothing)
                del bench
                gc.collect()


def _or_refusal(rows: Iterable[Row], nothing: Row) -> Iterator[Row]:
    try:
        yield from rows
    except REFUSALS as error:
        yield replace(nothing, error=" ".join(str(error).split()) or type(error).__name__)


def _device(name: str | None) -> torch.device:
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in SHAPES:
        raise ValueError(f"--device {name}: only cpu and cuda are supported")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this machine has no CUDA device")
    return device


def _shape(args: argparse.Namespace, device: torch.device) -> Shape:
    given = {name: getattr(args, name) for name in Shape.__dataclass_fields__ if getattr(args, name) is not None}
    shape = replace(SHAPES[device.type], **given)
    if shape.hidden_size % (2 * shape.heads):
        raise ValueError(f"--hidden-size {shape.hidden_size} must be a multiple of twice --heads {shape.heads}")
    if shape.vocab_size < 64:
        raise ValueError(
            f"--vocab-size {shape.vocab_size} leaves no room for text beside the control tokens; give at least 64"
        )
    return shape


def _vocabularies(args: argparse.Namespace) -> Path | None:
    folder = args.vocabularies or os.environ.get("HF_CNLLM_VOCABULARIES")
    return Path(folder) if folder else None
