"""`hf-cnllm export MODEL OUT --to llama|qwen2|glm`: a checkpoint that engines without this package serve, and back."""

import argparse
from pathlib import Path

from huggingface_hub import snapshot_download

from .._compat import logging
from ..conversion.adapters import export_adapter
from ..conversion.checkpoint import export_checkpoint, restore_checkpoint
from ..conversion.roads import TARGETS
from ..conversion.weights import Progress
from ..hub.places import find_folder
from ..hub.saving import check_new_folder
from . import bar_of_bytes
from .checkpoint import read_checkpoint

BACK = "original"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "model", metavar="MODEL", help="folder of a checkpoint, or its name on the Hub; or of an adapter"
    )
    parser.add_argument("output", metavar="OUT", type=Path, help="folder to write; must not exist")
    parser.add_argument(
        "--to",
        choices=(*TARGETS, BACK),
        required=True,
        help="llama for Baichuan with RoPE, qwen2 for Qwen, glm for ChatGLM2 and 3, and for llama.cpp: llama for these, too, "
        f"baichuan for Baichuan-13B; {BACK} goes back from any of them",
    )
    parser.add_argument(
        "--base", metavar="EXPORTED", type=Path, help="where MODEL is an adapter: folder of its exported model"
    )


def run(args: argparse.Namespace) -> int:
    """Export, and say what is lost.

    Raises:
        ValueError: there is no equivalent; the message says what serves the checkpoint instead.
        FileExistsError: OUT is there.
    """
    check_new_folder(args.output)
    logging.set_verbosity_error()
    with bar_of_bytes("written") as bar:
        note = _write(args, bar.update)
    print(f"{args.output}: written" + (f"\nnote: {note}" if note else ""))
    return 0


def _write(args: argparse.Namespace, progress: Progress) -> str | None:
    if args.to == BACK:
        if args.base is not None:
            raise ValueError("adapters do not go back: merge them into the exported model, and take that back")
        return restore_checkpoint(find_folder(args.model), args.output, progress)
    checkpoint = read_checkpoint(args.model)
    if (checkpoint.adapter is None) != (args.base is None):
        raise ValueError("--base and an adapter as MODEL go together: the adapter is for the exported model there")
    if checkpoint.adapter is None:
        folder = checkpoint.folder or Path(snapshot_download(checkpoint.name))
        return export_checkpoint(folder, args.output, args.to, progress)
    export_adapter(Path(checkpoint.adapter), checkpoint.config, args.to, args.base, args.output)
    return None
