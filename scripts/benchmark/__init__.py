"""The benchmark: every family beside transformers' Llama of equal shape, on this machine, in one interleaved run.

What is measured is a table (`tasks.TASKS`), and so is what it is measured on (`subjects.SUBJECTS`).
"""

import argparse
from pathlib import Path
from typing import Any

SUBJECT_NAMES = ("baichuan-rope", "baichuan-alibi", "chatglm", "chatglm2", "qwen", "glm")
TASK_NAMES = ("prefill", "memory", "decode", "train", "tokenizer", "load", "import")
BACKENDS = ("sdpa", "eager", "flex_attention", "flash_attention_2")
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    many: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
    parser.add_argument(
        "--families", **many, choices=SUBJECT_NAMES, default=SUBJECT_NAMES, help=_choices(SUBJECT_NAMES)
    )
    parser.add_argument("--tasks", **many, choices=TASK_NAMES, default=TASK_NAMES, help=_choices(TASK_NAMES))
    parser.add_argument("--backends", **many, choices=BACKENDS, default=["sdpa"], help=_choices(BACKENDS))
    parser.add_argument("--dtypes", **many, choices=DTYPES, default=["float32"], help=_choices(DTYPES))
    parser.add_argument("--device", help="cpu, cuda, cuda:1 … (default: cuda if there is one)")

    shape = parser.add_argument_group("shape of the models (default: small on a CPU, a 7B model's layers on CUDA)")
    for name in ("hidden-size", "layers", "heads", "ffn-size", "vocab-size"):
        shape.add_argument(f"--{name}", type=_positive, metavar="N")

    work = parser.add_argument_group("work")
    work.add_argument("--lengths", nargs="+", type=_positive, default=[512, 2048], metavar="N", help="prefill, memory")
    work.add_argument("--batch-sizes", nargs="+", type=_positive, default=[1, 8], metavar="N", help="decode")
    work.add_argument(
        "--prompt", type=_positive, default=128, metavar="N", help="decode: tokens before the first step"
    )
    work.add_argument("--new-tokens", type=_positive, default=24, metavar="N", help="decode: steps per round")
    work.add_argument(
        "--train-tokens", type=_positive, default=1024, metavar="N", help="train: one sequence of this length"
    )
    work.add_argument("--train-vocab", type=_positive, default=125_696, metavar="N", help="train: vocabulary")
    work.add_argument(
        "--rounds", type=_positive, default=5, metavar="N", help="times everything runs, after one to warm up"
    )
    work.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: count this process's processor time, on a machine that is busy with other work (best on one thread)",
    )
    work.add_argument(
        "--vocabularies",
        type=Path,
        metavar="DIR",
        help="tokenizer: a folder with real vocabularies, one folder each (default: $HF_CNLLM_VOCABULARIES, else tiny ones)",
    )

    parser.add_argument("--output", type=Path, metavar="DIR", help="folder for summary.json and ratios.png")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder of an earlier run")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, write the files. The exit code is 1 if something could not be measured."""
    from .runner import run_benchmark

    return run_benchmark(args)


def _choices(names: tuple[str, ...]) -> str:
    return f"of {', '.join(names)} (default: %(default)s)"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value
