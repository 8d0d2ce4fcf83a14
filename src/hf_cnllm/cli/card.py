"""`hf-cnllm card PATH`: the model card of a saved model or adapter, as README.md beside it."""

import argparse
from pathlib import Path

from ..hub.model_card import create_model_card
from ..hub.places import CONFIGS
from ..hub.saving import write_whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "path", metavar="PATH", type=Path, help="folder of a saved model, adapter or Trainer checkpoint"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the README.md that is there")
    parser.add_argument("--title", help="heading (default: the name of the repository)")
    parser.add_argument("--repo", metavar="OWNER/NAME", default=".", help="where it will be on the Hub")
    parser.add_argument("--base-model", metavar="OWNER/NAME", help="checkpoint on the Hub that it comes from")
    parser.add_argument("--language", action="append", metavar="CODE", help="default: zh and en; repeat for more")
    parser.add_argument("--dataset", action="append", metavar="OWNER/NAME", help="training data; repeat for more")
    parser.add_argument(
        "--training", action="append", metavar="NAME=VALUE", type=_pair, help="how it was trained; repeat"
    )
    parser.add_argument(
        "--result", action="append", metavar="NAME=VALUE", type=_pair, help="what was measured; repeat"
    )
    parser.add_argument("--evaluated-on", metavar="OWNER/NAME", help="data that the results were measured on")
    parser.add_argument("--loss-curve", metavar="FILE", help="picture of the loss, relative to PATH")


def run(args: argparse.Namespace) -> int:
    """Write the card and say where it is."""
    card_file = args.path / "README.md"
    if not args.path.is_dir():
        raise NotADirectoryError(f"{args.path} is not a folder; save the model first")
    if not any((args.path / name).is_file() for name in CONFIGS):
        raise FileNotFoundError(f"{args.path} is no checkpoint: it has neither {' nor '.join(CONFIGS)}")
    if args.loss_curve and not (args.path / args.loss_curve).is_file():
        raise FileNotFoundError(f"--loss-curve: there is no file {args.path / args.loss_curve}; put the picture there")
    if card_file.exists() and not args.overwrite:
        raise FileExistsError(f"{card_file} exists; add --overwrite to replace it")
    card = create_model_card(
        args.path,
        title=args.title,
        model_path=args.repo,
        base_model=args.base_model,
        languages=args.language or ("zh", "en"),
        datasets=args.dataset or (),
        training=dict(args.training) if args.training else None,
        results=dict(args.result) if args.result else None,
        evaluated_on=args.evaluated_on,
        loss_curve=args.loss_curve,
    )
    write_whole(card_file, str(card))
    print(card_file)
    return 0


def _pair(text: str) -> tuple[str, object]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    try:
        return name, float(value)
    except ValueError:
        return name, value
