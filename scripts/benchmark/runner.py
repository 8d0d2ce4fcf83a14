"""Goes through families, backends, dtypes and tasks, and tells the results."""

import argparse
import gc
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from transformers.utils import logging

from hf_cnllm.cli import one_line

from . import report
from .arguments import parse_arguments
from .machine import Machine, busy_with, measure_machine
from .measure import CLOCKS
from .start_up import measure_import, measure_load, measure_tokenizer
from .subjects import SUBJECTS
from .tasks import MODEL_TASKS, Bench, Row

REFUSALS = (ValueError, ImportError, NotImplementedError, RuntimeError)


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the files. The exit code is 1 if something could not be measured, which is said."""
    args = parse_arguments(words)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print("Measuring the machine …", file=sys.stderr, flush=True)
    machine = measure_machine(args.device, args.dtypes, CLOCKS[args.clock])
    print("\n".join(report.heading(machine, args.shape, busy_with())), flush=True)

    rows: list[Row] = []
    for row in measure(args, machine):
        rows.append(row)
        print(report.line(row), file=sys.stderr, flush=True)
    print("\n".join(report.table(rows)))
    print(f"\n{busy_with()} at the end")
    if args.output is not None:
        args.output.mkdir(parents=True, exist_ok=True)
        report.draw_ratios(rows, args.output / "ratios.png")
        report.write_json(rows, machine, vars(args), args.output / "summary.json")
        print(f"Wrote {args.output}")
    return 1 if any(row.error for row in rows) else 0


def measure(args: argparse.Namespace, machine: Machine) -> Iterator[Row]:
    """Every row that the arguments ask for, as it is measured. What is refused becomes a row that says why."""
    if "import" in args.tasks:
        yield from measure_import(args)
    for name in args.families:
        subject = SUBJECTS[name]
        if "tokenizer" in args.tasks:
            yield from _or_refusal(measure_tokenizer(name, subject, args), Row("tokenizer", name, ""))
        for dtype in args.dtypes:
            if "load" in args.tasks:
                yield from measure_load(name, subject, dtype, args)
            for backend in args.backends:
                bench = Bench(name, subject, backend, dtype, args, machine)
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
        yield replace(nothing, error=one_line(error))
