"""The command line: `hf-cnllm COMMAND …` or `python -m hf_cnllm COMMAND …`.

A command is a module with `add_arguments(parser)` and `run(args) -> int`; only the module of the chosen command is
imported. What the user can mend (a bad value, a missing file, a missing package) is answered with one line and exit
code 2.
"""

import argparse
import importlib
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from .._stack import own_version

COMMANDS = {
    # name: (module, what --help says)
    "demo": ("hf_cnllm.demo", "fine-tune a tiny checkpoint, or your own, end to end"),
    "doctor": ("hf_cnllm.cli.doctor", "check that the installed libraries and this package work together"),
    "info": ("hf_cnllm.cli.info", "show what the package decides about a checkpoint"),
}

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143  # exit codes


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser, commands = _parsers()
    chosen = next((word for word in argv if not word.startswith("-")), None)
    if chosen not in COMMANDS:
        parser.parse_args(argv)  # prints the help, the version or the error, and exits
    module = importlib.import_module(COMMANDS[chosen][0])
    module.add_arguments(commands[chosen])
    args = parser.parse_args(argv)
    try:
        with _clean_up_when_terminated():
            return module.run(args)
    except KeyboardInterrupt:
        print(f"\n{commands[chosen].prog}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        if args.traceback:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"{commands[chosen].prog}: error: {message}", file=sys.stderr)
        return USER_ERROR


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole parser, and that of each command, still without the arguments of its own."""
    parser = argparse.ArgumentParser(
        prog="hf-cnllm", description="Baichuan, GLM, ChatGLM and Qwen v1 on Transformers."
    )
    parser.add_argument("--version", action="version", version=f"hf-cnllm {own_version()}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    commands = {name: subparsers.add_parser(name, help=text, description=text) for name, (_, text) in COMMANDS.items()}
    for command in commands.values():
        command.add_argument("--traceback", action="store_true", help="on an error, show where it came from")
    return parser, commands


@contextmanager
def _clean_up_when_terminated() -> Iterator[None]:
    """Turn SIGTERM into an exit that runs `finally` blocks, as Ctrl-C does, so that nothing half-written stays."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
