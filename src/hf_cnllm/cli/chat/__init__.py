"""`hf-cnllm chat MODEL`: talk to a checkpoint, in the terminal or, with `--web`, on a page in the browser."""

import argparse
import importlib.util
from collections.abc import Callable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder of a checkpoint or of an adapter (PEFT), or its name on the Hub")
    add("--adapter", metavar="PATH", help="adapter on top of MODEL, in place of the base model that it names itself")
    add("--system", metavar="TEXT", default="", help="system message")
    add("--raw", action="store_true", help="go on with each text as it is, for base models: no template, no history")
    add(
        "--tools-demo",
        action="store_true",
        help="a calculator and a clock as tools (ChatGLM3); each call is confirmed",
    )
    sampling = parser.add_argument_group(
        "generation", "as in transformers' generate; left out, what the checkpoint or its authors' own chat says"
    )
    add = sampling.add_argument
    add("--greedy", action="store_true", help="the likeliest answer instead of a sampled one")
    add("--temperature", type=_number("above 0", lambda value: value > 0), metavar="T")
    add("--top-p", type=_number("above 0 and at most 1", lambda value: 0 < value <= 1), metavar="P")
    add("--top-k", type=_number("0 (off) or more", lambda value: value >= 0, int), metavar="K")
    add("--repetition-penalty", type=_number("above 0", lambda value: value > 0), metavar="R")
    add("--max-new-tokens", type=_number("above 0", lambda value: value > 0, int), metavar="N")
    add("--seed", type=int, metavar="N", help="with the same seed the same questions get the same answers")
    loading = parser.add_argument_group("loading")
    loading.add_argument(
        "--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto", help="default: as stored"
    )
    web = parser.add_argument_group("page in the browser")
    web.add_argument("--web", action="store_true", help='needs Gradio: pip install "hf-cnllm[web]"')
    web.add_argument("--host", default="127.0.0.1", help="address to serve on (default: this machine only)")
    web.add_argument("--port", type=_number("from 1 to 65535", lambda value: 0 < value < 65536, int), default=7860)


def run(args: argparse.Namespace) -> int:
    """Talk until the user ends it.

    Raises:
        ValueError: the checkpoint is of no family of this package, or options do not go together.
        ImportError: `--web` without Gradio.
        OSError: the checkpoint is not there, or the port is in use.
    """
    if args.greedy and (sampled := [name for name in ("temperature", "top_p", "top_k") if getattr(args, name)]):
        raise ValueError(
            f"--greedy chooses the likeliest token: --{sampled[0].replace('_', '-')} has no meaning with it"
        )
    if args.raw and (args.system or args.tools_demo):
        raise ValueError("--raw goes on with a text as it is: there is no place for --system or --tools-demo")
    if args.web and args.tools_demo:
        raise ValueError("--tools-demo asks before each call, which the page cannot: use it in the terminal")
    if args.web and importlib.util.find_spec("gradio") is None:
        raise ImportError('--web needs Gradio: pip install "hf-cnllm[web]"')
    from . import terminal, web
    from .model import ChatModel

    if args.web:
        web.check_address(args.host, args.port)  # before the weights are loaded, which takes long
    return (web if args.web else terminal).talk(ChatModel.load(args), args)


def _number(what: str, is_valid: Callable, kind: type = float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not is_valid(value):
            raise argparse.ArgumentTypeError(f"must be a {'whole ' if kind is int else ''}number {what}, got {text!r}")
        return value

    return read
