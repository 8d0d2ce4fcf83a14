"""`hf-cnllm run COMMAND …`: any tool of the Hugging Face stack, in a process that has imported this package.

`hf-cnllm run trl sft …` runs a console script of an installed package, `hf-cnllm run -m lm_eval …` a module and
`hf-cnllm run train.py …` a file, each in this process and as if started without us: `sys.argv`, exit codes, signals and
errors are the tool's own. Launchers that start further processes are told to start them through here too, lm-eval finds this
package's tasks, and the models of `transformers serve` stop where a reply of a chat ends.
"""

import argparse
import os
import runpy
import shutil
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Any

from transformers import AutoTokenizer, PreTrainedModel

from .._compat import name_in_transformers
from ..data.conversations import reply_end_ids
from ..evaluation import TASKS
from ..families import FAMILIES
from ..recipes import config_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("-m", dest="is_module", action="store_true", help="COMMAND is a module, as in `python -m`")
    parser.add_argument(
        "words", metavar="COMMAND", nargs=argparse.PARSER, help="a console script, module or file, and what it gets"
    )


def run(args: argparse.Namespace) -> Callable[[], Any]:
    """Find the tool; calling the result runs it and gives its exit code.

    Raises:
        ValueError: there is no such tool.
    """
    name, *arguments = args.words
    is_file = name.endswith(".py") or os.sep in name
    find = _module if args.is_module else _file if is_file else _console_script
    tool, path = find(name)

    def start() -> Any:
        sys.argv = [path, *LAUNCHERS.get(name, list)(arguments)]
        return tool()

    return start


# --- what there is to run: a function without arguments, and its `sys.argv[0]` ----------------------------------------


def _module(name: str) -> tuple[Callable, str]:
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{name}.__main__")
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise ValueError(f"there is no module {name} that can be run: is its package installed?")
    return partial(_execute, runpy.run_module, name, alter_sys=True), str(spec.origin)


def _file(path: str) -> tuple[Callable, str]:
    if not os.path.isfile(path):
        raise ValueError(f"there is no file {path}")
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))  # as `python FILE` does
    return partial(_execute, runpy.run_path, path), path


def _console_script(name: str) -> tuple[Callable, str]:
    found = next(iter(entry_points(group="console_scripts", name=name)), None)
    if found is None:
        raise ValueError(
            f"no installed package has a command {name}. Install the package that has it; a module is run by "
            f"`hf-cnllm run -m {name}`, a file by a path that has a / or ends in .py."
        )
    return lambda: found.load()(), shutil.which(name) or name


def _execute(run_code: Callable, name: str, **options: Any) -> None:
    run_code(name, run_name="__main__", **options)  # and drops the globals it returns


# --- launchers --------------------------------------------------------------------------------------------------------

OURS = ("hf_cnllm", "run")  # what the processes they start are to run as a module, the script behind it


def _trl(arguments: list[str]) -> list[str]:
    """TRL hands what its own parser does not know to accelerate's launcher, in front of the script."""
    commands = import_module("trl.cli.commands")
    training = (
        command.name for command in commands.get_commands() if isinstance(command, commands.training.TrainingCommand)
    )
    return [*arguments, "--module", *OURS] if arguments[:1] and arguments[0] in training else arguments


def _accelerate(arguments: list[str]) -> list[str]:
    return ["launch", *_accelerate_launch(arguments[1:])] if arguments[:1] == ["launch"] else arguments


def _accelerate_launch(arguments: list[str]) -> list[str]:
    return _before_the_script(import_module("accelerate.commands.launch").launch_command_parser(), arguments)


def _torchrun(arguments: list[str]) -> list[str]:
    return _before_the_script(import_module("torch.distributed.run").get_args_parser(), arguments)


def _before_the_script(parser: argparse.ArgumentParser, arguments: list[str]) -> list[str]:
    parsed = parser.parse_args(arguments)  # or says what is wrong, as the launcher would
    if parsed.no_python:
        return arguments
    rest = parsed.training_script_args
    script = len(arguments) - len(rest) - 1
    script -= arguments[script] == "--"  # these parsers drop one behind the script
    is_module = ["-m"] if parsed.module else []
    # Accelerate's configurations of this package are known by their names, as in `--config_file fsdp2.yaml`.
    options = _with_path(arguments[:script], "--config_file", lambda name: config_file(name, "accelerate"))
    return ["--module", *options, *OURS, *is_module, parsed.training_script, *rest]


def _with_path(options: list[str], option: str, path_of: Callable[[str], str]) -> list[str]:
    """With `path_of` the value of an option, as in `--option value` or `--option=value`."""
    words = []
    for before, word in zip(["", *options], options, strict=False):
        flag, equals, value = word.rpartition("=")
        is_value = before == option or flag == option
        words.append(flag + equals + path_of(value) if is_value else word)
    return words


# --- lm-eval ----------------------------------------------------------------------------------------------------------


def _lm_eval(arguments: list[str]) -> list[str]:
    """`--include_path hf_cnllm` is the folder of this package's tasks."""
    return _with_path(arguments, "--include_path", lambda name: str(TASKS) if name == "hf_cnllm" else name)


# --- transformers serve -----------------------------------------------------------------------------------------------


class ForChats:
    """Stands for a model class where a server of chats loads it: its models stop where the chat template ends a reply, which
    the files of Qwen-Chat and ChatGLM3 on the Hub do not say. GLM, which has no chats, is refused by its tokenizer."""

    def __init__(self, model_class: type[PreTrainedModel]):
        self.model_class, self.__name__ = model_class, model_class.__name__

    def from_pretrained(self, name: str, **options: Any) -> PreTrainedModel:
        model = self.model_class.from_pretrained(name, **options)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=options.get("revision"))
        model.generation_config.eos_token_id = reply_end_ids(tokenizer, model.generation_config)
        return model


def _transformers(arguments: list[str]) -> list[str]:
    if arguments[:1] == ["serve"]:
        for family in FAMILIES:
            model_class = family.models[family.generates_with]
            name_in_transformers(ForChats(model_class), in_place_of=model_class)
    return arguments


LAUNCHERS: dict[str, Callable[[list[str]], list[str]]] = {  # what is done first, and the arguments that come of it
    "accelerate": _accelerate,
    "accelerate-launch": _accelerate_launch,
    "accelerate.commands.launch": _accelerate_launch,
    "lm-eval": _lm_eval,
    "lm_eval": _lm_eval,
    "torch.distributed.run": _torchrun,
    "torchrun": _torchrun,
    "transformers": _transformers,
    "trl": _trl,
}
