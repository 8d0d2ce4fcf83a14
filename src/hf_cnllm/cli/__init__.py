"""The command line: `hf-cnllm COMMAND …` or `python -m hf_cnllm COMMAND …`.

A command is a module with `add_arguments(parser)` and `run(args) -> int`; only the module of the chosen command is
imported. Every error is one line; `--debug` shows where it came from. Where `run` returns a function instead, that one gives
the exit code, and errors and signals are its own.
"""

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .._stack import own_version

COMMANDS = {
    # name: (module, what --help says)
    "card": ("hf_cnllm.cli.card", "write the model card of a saved model or adapter"),
    "demo": ("hf_cnllm.demo", "fine-tune a tiny checkpoint, or your own, end to end"),
    "chat": ("hf_cnllm.cli.chat", "talk to a checkpoint, in the terminal or on a page in the browser"),
    "info": ("hf_cnllm.cli.info", "show what a checkpoint is, the memory it takes and what it runs with"),
    "verify": ("hf_cnllm.cli.verify", "check the files of a checkpoint: damage, mixtures, shapes, NaN, checksums"),
    "quantize": ("hf_cnllm.cli.quantize", "save a checkpoint with weights of 8 or 4 bits"),
    "export": ("hf_cnllm.cli.export", "save a checkpoint as a Llama, Qwen2 or GLM that every engine serves, and back"),
    "convert": ("hf_cnllm.cli.convert", "make a checkpoint of what the authors released in another layout"),
    "doctor": ("hf_cnllm.cli.doctor", "check that the installed libraries and this package work together"),
    "run": (
        "hf_cnllm.cli.run",
        "run another tool (trl, transformers, lm_eval, a script) with these families registered",
    ),
}

USER_ERROR, OUR_ERROR, INTERRUPTED = 2, 3, 130
ENDINGS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has no SIGHUP
EXIT_CODES = (
    "exit codes: 0 done; 1 a check did not hold; 2 something that you can mend (a value, a file, a missing package); "
    "3 a mistake of the program; 130 stopped by Ctrl-C; 143 terminated; 129 its terminal was closed"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    chosen = next((word for word in argv if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="hf-cnllm", description="Baichuan, GLM, ChatGLM and Qwen v1 on Transformers.", epilog=EXIT_CODES
    )
    parser.add_argument("--version", action="version", version=f"hf-cnllm {own_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (module_name, text) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.", epilog=EXIT_CODES)
        command.add_argument("--debug", action="store_true", help="on an error, show where it came from")
        if name == chosen:
            module = importlib.import_module(module_name)
            module.add_arguments(command)
    args = parser.parse_args(argv)  # or prints the help, the version or the error, and exits
    try:
        with _clean_up_when_terminated():
            result = module.run(args)
            sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\nhf-cnllm {chosen}: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # of `hf-cnllm … | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if args.debug:
            raise
        message = one_line(error)
        if isinstance(error, ValueError | OSError | ImportError):
            print(f"hf-cnllm {chosen}: error: {message}", file=sys.stderr)
            return USER_ERROR
        hint = "--debug shows where; please report it with what `hf-cnllm doctor` prints"
        print(f"hf-cnllm {chosen}: unexpected {type(error).__name__}: {message} ({hint})", file=sys.stderr)
        return OUR_ERROR
    return result() if callable(result) else result


def one_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def bar_of_bytes(description: str) -> Any:
    """A progress bar that counts bytes, and is gone at the end; none where nobody watches."""
    from tqdm.auto import tqdm

    return tqdm(unit="B", unit_scale=True, desc=description, leave=False, disable=None)


@contextmanager
def _clean_up_when_terminated() -> Iterator[None]:
    """Turn SIGTERM and the end of a terminal into an exit that runs `finally` blocks, as Ctrl-C does, so that nothing
    half-written stays. What is ignored, as nohup has it, stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = [number for number in ENDINGS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, lambda number, _: sys.exit(128 + number)) for number in heard}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
