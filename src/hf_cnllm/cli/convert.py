"""`hf-cnllm convert glm130b SHARDS OUT`: the files of model-parallel ranks as a checkpoint that `from_pretrained` loads."""

import argparse
import math
from pathlib import Path

from . import bar_of_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("family", choices=("glm130b",), help="what SHARDS holds")
    parser.add_argument(
        "shards",
        metavar="SHARDS",
        type=Path,
        help="folder with `latest` and the ranks' files, in a folder of its own or not",
    )
    parser.add_argument("output", metavar="OUT", type=Path, help="folder to write; must not exist")
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        type=Path,
        help="ice_text.model, or a folder with it (default: the one in SHARDS, if there is one)",
    )
    parser.add_argument(
        "--keep-integers",
        action="store_true",
        help="keep INT8 or INT4 weights as they are (default: in half precision)",
    )
    parser.add_argument(
        "--max-file-size", metavar="GB", type=float, default=5.0, help="of each weight file (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    """Convert; an interrupted run goes on where it was."""
    from ..conversion.glm130b.release import convert

    if not 0 < args.max_file_size < math.inf:
        raise ValueError(f"--max-file-size must be a number above 0, got {args.max_file_size}")
    if args.tokenizer is not None and not args.tokenizer.exists():
        raise FileNotFoundError(f"--tokenizer: there is no {args.tokenizer}")
    with bar_of_bytes("written") as bar:
        config = convert(
            args.shards,
            args.output,
            args.tokenizer,
            args.keep_integers,
            int(args.max_file_size * 1e9),
            lambda _, size: bar.update(size),
        )
    kept = f", {config.quantization_bit}-bit weights" if config.quantization_bit else ""
    print(f"{args.output}: GLM-130B of {config.num_layers} layers{kept}")
    if not (args.output / "ice_text.model").is_file():
        print("no tokenizer: pass --tokenizer ice_text.model (of the package icetk) to put it beside the weights")
    return 0
