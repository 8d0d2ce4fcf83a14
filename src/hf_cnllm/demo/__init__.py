"""The demo: fine-tune a checkpoint end to end and say what was measured.

Without `--model` it writes a tiny checkpoint in the layout that the family has on the Hub, vocabulary included; from
there on it uses nothing but the public interfaces of transformers and PEFT.
"""

import argparse
import importlib.util
from pathlib import Path

from .tiny_checkpoints import OWN_RECIPE, TINY_FAMILIES, TINY_VARIANTS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add(
        "--family",
        choices=sorted(TINY_FAMILIES | TINY_VARIANTS),
        default="baichuan",
        help="which tiny checkpoint to write",
    )
    add("--model", metavar="PATH", type=Path, help="your own checkpoint, instead of a tiny one")
    add("--data", metavar="FILE.jsonl", type=Path, help="your own conversations, one JSON object a line")
    add("--output", metavar="DIR", type=Path, help="folder to write (default: outputs/demo-FAMILY)")
    add("--overwrite", action="store_true", help="replace the folder of an earlier run")
    add("--epochs", type=int, help="passes over the data (default: 24 on most tiny checkpoints, else 3)")
    add("--batch-size", type=int, help="conversations a step (default: 16 on most tiny checkpoints, else 4)")
    add("--learning-rate", type=float, help="of full fine-tuning (default: about 1e-3 on tiny checkpoints, else 1e-5)")
    add("--max-length", type=int, default=1024, help="tokens kept of a conversation (default: %(default)s)")
    add("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> int:
    """Run the demo; the exit code is 0 if every check held, else 1.

    Raises:
        ValueError: an option or the data cannot be used.
        ImportError: a package of the extra `train` is missing.
        FileExistsError: the output folder must not be replaced.
    """
    if (args.model is None) != (args.data is None):
        missing = "--data FILE.jsonl" if args.data is None else "--model PATH"
        raise ValueError(f"your own checkpoint and your own data go together: {missing} is missing")
    recipe = (TINY_FAMILIES | TINY_VARIANTS)[args.family][1] if args.model is None else OWN_RECIPE
    for name, default in recipe._asdict().items():
        if getattr(args, name, None) is None:
            setattr(args, name, default)
    for name in ("epochs", "batch_size", "learning_rate", "max_length"):
        if getattr(args, name) <= 0:
            raise ValueError(f"--{name.replace('_', '-')} must be positive, got {getattr(args, name)}")
    args.output = args.output or Path("outputs") / f"demo-{args.family if args.model is None else args.model.name}"
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError('the loss curve needs matplotlib: pip install "hf-cnllm[train]"')
    from .pipeline import run_demo

    return 0 if run_demo(args).passed else 1
