"""The demo: fine-tune a checkpoint end to end and say what was measured.

Without `--model` it writes a tiny checkpoint in the layout that the family has on the Hub, vocabulary included; from
there on it uses nothing but the public interfaces of transformers and PEFT.
"""

import argparse
from pathlib import Path

from .families import TINY_FAMILIES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "--family", choices=sorted(TINY_FAMILIES), default="baichuan", help="which tiny checkpoint to write"
    )
    parser.add_argument("--model", metavar="PATH", type=Path, help="your own checkpoint, instead of a tiny one")
    parser.add_argument(
        "--data", metavar="FILE.jsonl", type=Path, help="your own conversations, one JSON object a line"
    )
    parser.add_argument("--output", metavar="DIR", type=Path, help="folder to write (default: outputs/demo-FAMILY)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder of an earlier run")
    parser.add_argument("--epochs", type=int, help="passes over the data (default: 24 on a tiny checkpoint, else 3)")
    parser.add_argument(
        "--batch-size", type=int, help="conversations a step (default: 16 on a tiny checkpoint, else 4)"
    )
    parser.add_argument(
        "--learning-rate", type=float, help="of full fine-tuning (default: 1.5e-3 on a tiny checkpoint, else 1e-5)"
    )
    parser.add_argument(
        "--max-length", type=int, default=1024, help="tokens kept of a conversation (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Run the demo; the exit code is 0 if every check held, else 1."""
    from .pipeline import DemoOptions, run_demo

    values = {name: value for name, value in vars(args).items() if name in DemoOptions.__dataclass_fields__}
    return 0 if run_demo(DemoOptions(**values)).passed else 1
