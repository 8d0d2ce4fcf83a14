"""The command line: `hf-cnllm COMMAND …` or `python -m hf_cnllm COMMAND …`.

A command is a module with `add_arguments(parser)` and `run(args) -> int`; only the module of the chosen command is
imported. What the user can mend (a bad value, a missing file, a missing package) is answered with one line and exit
code 2. Where `run` returns a function instead, that one gives the exit code, and errors and signals are its own.
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
    "card": ("hf_cnllm.cli.card", "write the model card of a saved model or adapter"),
    "demo": ("hf_cnllm.demo", "fine-tune a tiny checkpoint, or your own, end to end"),
    "doctor": ("hf_cnllm.cli.doctor", "check that the installed libraries and this package work together"),
    "info": ("hf_cnllm.cli.info", "show what the package decides about a checkpoint"),
    "run": (
        "hf_cnllm.cli.run",
        "run another tool (trl, transformers, lm_eval, a script) with these families registered",
    ),
}

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143  # exit codes


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="hf-cnllm", description="Baichuan, GLM, ChatGLM and Qwen v1 on Transformers."
    )
    parser.add_argument("--version", action="version", version=f"hf-cnllm {own_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (module_name, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--traceback", action="store_true", help="on an error, show where it came from")
        if name == chosen:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
    args = parser.parse_args(argv)  # or prints the help, the version or the error, and exits
    try:
        with _clean_up_when_terminated():
            result = module.run(args)
    except KeyboardInterrupt:
        print(f"\nhf-cnllm {chosen}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, ImportError) as error:
        if args.traceback:
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"hf-cnllm {chosen}: error: {message}", file=sys.stderr)
        return USER_ERROR
    return result() if callable(result) else result


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
