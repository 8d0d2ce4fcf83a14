"""Training scripts to run as they are, `python -m hf_cnllm.recipes.NAME`, or to copy and change."""

import argparse
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def needs_extra(name: str) -> Iterator[None]:
    """Says which of this package's extras brings a module that is missing."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise ImportError(f'{error}: pip install "hf-cnllm[{name}]"') from error


class SettingsParser(argparse.ArgumentParser):
    """A parser whose arguments are fields of a dataclass: their types and defaults are what it says."""

    def __init__(self, description: str, settings: type) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.defaults: dict[str, Any] = {}
        for field in dataclasses.fields(settings):
            default = () if field.default is dataclasses.MISSING else field.default
            self.defaults[field.name] = list(default) if isinstance(default, tuple) else default

    def add(self, name: str, text: str, **options: Any) -> None:
        known = self.defaults.get(name.replace("-", "_"))
        told = " ".join(known) if isinstance(known, list) else known
        shown = "" if told in (None, "") or "default" in options else f" (default: {told})"
        options = {"type": type(known) if isinstance(known, int | float) else None, "default": known} | options
        self.add_argument(f"--{name}", help=text + shown, **options)


def config_file(name: str, folder: str = "") -> str:
    """The path of a YAML file; one that is not there is looked for among those of this package, `configs/` and below."""
    ours = Path(__file__).with_name("configs") / folder / name
    return str(ours) if not Path(name).exists() and ours.is_file() else name
