"""`hf-cnllm info PATH`: what the package decides about a checkpoint. Reads its config.json and nothing else."""

import argparse

from transformers import AutoConfig

from ..auto import family_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", metavar="PATH", help="folder of a checkpoint, or its name on the Hub")


def run(args: argparse.Namespace) -> int:
    """Print one decision a line."""
    config = AutoConfig.from_pretrained(args.path)
    if (family := family_of(config)) is None:
        rows = {
            "family": f"{config.model_type}: not of this package, served by {type(config).__name__} of transformers"
        }
    else:
        rows = {"family": family.line_of(config)}
        rows |= {name: str(decide(config)) for name, decide in family.decisions.items()}
        rows["vocabulary"] = f"{config.vocab_size} tokens"
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))
    return 0
