"""`hf-cnllm info PATH`: what the package decides about a checkpoint. Reads its config.json and nothing else."""

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", metavar="PATH", help="folder of a checkpoint, or its name on the Hub")


def run(args: argparse.Namespace) -> int:
    """Print one decision a line."""
    from transformers import AutoConfig

    rows = describe(AutoConfig.from_pretrained(args.path))
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))
    return 0


def describe(config: Any) -> dict[str, str]:
    """What was decided about a checkpoint, name and value, from its loaded configuration."""
    from ..auto import family_of

    if (family := family_of(config)) is None:
        served_by = f"served by {type(config).__name__} of transformers"
        return {"family": f"{config.model_type}: not of this package, {served_by}"}
    decided = {name: str(decide(config)) for name, decide in family.decisions.items()}
    return {"family": family.line_of(config), **decided, "vocabulary": f"{config.vocab_size} tokens"}
