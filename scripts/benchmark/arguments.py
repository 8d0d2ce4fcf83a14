"""What the command line asks for, checked before anything is measured."""

import argparse
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from hf_cnllm.families import Shape

from .measure import CLOCKS
from .subjects import SHAPES, SUBJECTS
from .tasks import MODEL_TASKS

START_UP_TASKS = ("tokenizer", "load", "import")
TASKS = (*MODEL_TASKS, *START_UP_TASKS)
BACKENDS = ("sdpa", "eager", "flex_attention", "flash_attention_2")
DTYPES = ("float32", "bfloat16", "float16")


def parse_arguments(words: Sequence[str] | None) -> argparse.Namespace:
    """The arguments, with `device` and `shape` worked out of them. What cannot be is one line and exit code 2."""
    parser = _parser()
    args = parser.parse_args(words)
    try:
        args.device = _device(args.device)
        args.shape = _shape(args)
        _check(args)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="benchmark", description="Measure speed and memory of every family beside a Llama of equal shape."
    )
    for option, names, default in (
        ("--families", SUBJECTS, list(SUBJECTS)),
        ("--tasks", TASKS, list(TASKS)),
        ("--backends", BACKENDS, ["sdpa"]),
        ("--dtypes", DTYPES, ["float32"]),
    ):
        several = f"of {', '.join(names)} (default: {' '.join(default)})"
        parser.add_argument(option, nargs="+", metavar="NAME", choices=list(names), default=default, help=several)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda if there is one)")

    shape = parser.add_argument_group("shape of the models (default: small on a CPU, a 7B model's layers on CUDA)")
    for name in Shape._fields:
        shape.add_argument("--" + name.replace("_", "-"), type=_positive, metavar="N")

    work = parser.add_argument_group("work")
    for option, default, what in (
        ("--lengths", [512, 2048], "prefill, memory: tokens"),
        ("--batch-sizes", [1, 8], "decode: rows"),
        ("--prompt", 128, "decode: tokens before the first step"),
        ("--new-tokens", 24, "decode: steps per round"),
        ("--train-tokens", 1024, "train: one sequence of this length"),
        ("--train-vocab", 125_696, "train: vocabulary"),
        ("--rounds", 5, "times everything runs, after one to warm up"),
    ):
        count = {"nargs": "+"} if isinstance(default, list) else {}
        work.add_argument(
            option, type=_positive, default=default, metavar="N", help=f"{what} (default: %(default)s)", **count
        )
    work.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: count this process's processor time, on a machine that is busy with other work (best on one thread)",
    )
    work.add_argument(
        "--vocabularies",
        type=Path,
        metavar="DIR",
        default=os.environ.get("HF_CNLLM_VOCABULARIES"),
        help="tokenizer: a folder with real vocabularies, one folder each (default: $HF_CNLLM_VOCABULARIES, else tiny ones)",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="new folder for summary.json and ratios.png")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def _device(name: str | None) -> torch.device:
    device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type not in SHAPES:
        raise ValueError(f"--device {name}: only cpu and cuda are supported")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: this machine has no CUDA device")
    return device


def _shape(args: argparse.Namespace) -> Shape:
    given = {name: getattr(args, name) for name in Shape._fields if getattr(args, name) is not None}
    shape = SHAPES[args.device.type]._replace(**given)
    if shape.hidden_size % (2 * shape.heads):
        raise ValueError(f"--hidden-size {shape.hidden_size} must be a multiple of twice --heads {shape.heads}")
    if shape.vocab_size < 64:
        raise ValueError(
            f"--vocab-size {shape.vocab_size} leaves no room for text beside the control tokens; give at least 64"
        )
    return shape


def _check(args: argparse.Namespace) -> None:
    if args.device.type == "cuda" and args.clock == "cpu":
        raise ValueError("--clock cpu does not see what a CUDA device does; use wall")
    if "tokenizer" in args.tasks and args.vocabularies:
        for name in args.families:
            folder = args.vocabularies / SUBJECTS[name].vocabulary
            if not folder.is_dir():
                raise ValueError(f"--vocabularies: there is no folder {folder}")
    if args.output is None:
        return
    if args.output.exists() and not (args.output.is_dir() and not any(args.output.iterdir())):
        raise ValueError(f"--output {args.output} exists and is not an empty folder; choose another name")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('--output: the picture needs matplotlib: pip install "hf-cnllm[train]"')
