"""What every recipe in `scripts/` is as a command: arguments from a YAML file and from flags, what they may be, and one line
for what a user can mend.

    arguments, training, model = parse_arguments(__doc__, RecipeArguments, SFTConfig, ModelConfig)
    with open_run(arguments, training, model) as run:  # see run.py
        trainer = …
        run.train(trainer)
        run.finish(trainer, tokenizer)
"""

import dataclasses
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from yaml import YAMLError

from ..cli import one_line
from ..data.conversations import Row, read_rows
from ..recipes import config_file

USER_ERROR, INTERRUPTED = 2, 130  # exit codes
ADAPTER_FLAG = re.compile(r"--(lora[_-]|use[_-](dora|rslora)\b)")


@dataclass
class RecipeArguments:
    """What every recipe is told."""

    model: str = field(metadata={"help": "checkpoint to start from: a folder, or its name on the Hub"})
    data: list[str] = field(metadata={"help": "files of examples, or the name of a dataset"})
    output: str = field(metadata={"help": "folder for the result: new, or empty"})
    resume: bool = field(default=False, metadata={"help": "go on from the last complete checkpoint in --output"})

    takes_classifiers: ClassVar[bool] = False  # whether --model may be one

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):  # a YAML file may give one text for a list of one
            if str(one.type).startswith("list[str]") and isinstance(value := getattr(self, one.name), str):
                setattr(self, one.name, [value])


@dataclass
class DataArguments(RecipeArguments):
    """What recipes are told whose data are texts or conversations."""

    eval_data: list[str] | None = field(
        default=None, metadata={"help": "the same, to evaluate on (with --eval_strategy)"}
    )
    split: str = field(default="train", metadata={"help": "split of data sets that are named"})


@dataclass
class ChatArguments(DataArguments):
    """What recipes are told whose data are conversations, in one of the formats that are read."""

    ignore_fields: list[str] | None = field(default=None, metadata={"help": "fields of the data to leave out"})
    template: str | None = field(
        default=None,
        metadata={"help": "chat template: alpaca, bloom, llama2, vicuna or a file; default: the tokenizer's"},
    )

    def read(self, read: Callable[..., Row]) -> tuple[list[Row], list[Row]]:
        """What `read` makes of the rows of --data and of --eval_data, by [`read_rows`]."""
        read = partial(read, ignore=self.ignore_fields or ())
        rows, eval_rows = (read_rows(names or (), read, self.split) for names in (self.data, self.eval_data))
        return rows, eval_rows


def parse_arguments(description: str, *dataclasses_of_arguments: type) -> tuple[Any, ...]:
    """Reads `--config FILE.yaml` and flags, which override it, into one object a class. A file that is not there is looked for
    among those of this package, `hf_cnllm/recipes/configs`."""
    from trl import TrlParser

    parser = TrlParser(
        list(dataclasses_of_arguments),  # type: ignore[arg-type]
        description=description,
        usage="%(prog)s [--config FILE.yaml] --model MODEL --data FILE… --output DIR [options]; --help lists them",
    )
    # TRL takes bf16 for granted, and stops where there is none.
    parser.set_defaults(bf16=torch.cuda.is_available() and torch.cuda.is_bf16_supported())
    words = [
        part for word in sys.argv[1:] for part in (word.split("=", 1) if word.startswith("--config=") else [word])
    ]
    if words[-1:] == ["--config"]:
        raise ValueError("--config is given without a file")
    if "--config" in words:
        place = words.index("--config") + 1
        words[place] = config_file(words[place])
    try:
        with warnings.catch_warnings():  # of a default of TRL's own
            warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
            parsed = parser.parse_args_and_config(words)
    except (YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config {words[place]} is no YAML: {error}") from error
    has_adapter = any(getattr(one, "use_peft", False) for one in parsed)
    if not has_adapter and (flag := next(filter(ADAPTER_FLAG.match, words), None)):
        raise ValueError(f"{flag} is a setting of an adapter: add --use_peft, without which all weights are trained")
    return tuple(parsed)


def check_counts(options: Any, *names: str) -> None:
    """Raises ValueError for an option that is below 1."""
    for name in names:
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, got {getattr(options, name)}")


def tell_left_out(kept: int, total: int, what: str, option: str, limit: int | None) -> None:
    """Says how many of the rows were longer than an option allows; raises ValueError if all were."""
    if not kept:
        raise ValueError(f"all of the {total} {what} are longer than --{option} {limit}: raise it")
    if kept < total:
        print(f"{total - kept} of {total} {what} are longer than --{option} and left out")


def check_sampling(options: Any) -> None:
    """Raises ValueError for a `temperature` or `top_p` that nothing can be sampled with."""
    if options.temperature <= 0 or not 0 < options.top_p <= 1:
        raise ValueError(
            f"--temperature {options.temperature} must be above 0, and --top_p {options.top_p} above 0 and at most 1"
        )


def run_recipe(main: Callable[[], None]) -> None:
    """Runs a recipe as a command: what the user can mend is one line and exit code 2."""
    try:
        main()
    except KeyboardInterrupt as interrupt:
        print(f"\ninterrupted{interrupt}", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except (ValueError, OSError, ImportError, FloatingPointError, RuntimeError) as error:
        message = one_line(error)
        if isinstance(error, FileNotFoundError) and error.filename is not None and error.filename2 is None:
            message = f"{_as_told(str(error.filename))}: there is no such file or folder"
        if isinstance(error, RuntimeError):
            if "ignore_mismatched_sizes" not in message:
                raise
            message = "the checkpoint has weights of other shapes than its config.json says, see above: mend that file"
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
        sys.exit(USER_ERROR)


def _as_told(value: str) -> str:
    """A value with the option in front that gave it, if a flag did."""
    option = ""
    for word in sys.argv[1:]:
        name, is_joined, rest = word.partition("=")
        option = name if word.startswith("--") else option
        if value == word or (is_joined and word.startswith("--") and value == rest):
            return f"{option} {value}".strip()
    return value
