"""Training scripts to run as they are, `python -m hf_cnllm.recipes.NAME`, or to copy and change."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any


class SettingsParser(argparse.ArgumentParser):
    """A parser whose arguments are fields of a dataclass: their types and defaults are what it says."""

    def __init__(self, description: str, settings: type) -> None:
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.defaults: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(settings)}

    def add(self, name: str, text: str, **options: Any) -> None:
        known = self.defaults.get(name.replace("-", "_"))
        shown = "" if known in (None, dataclasses.MISSING, ()) or "default" in options else f" (default: {known})"
        options = {"type": type(known) if isinstance(known, int | float) else None, "default": known} | options
        if options["default"] is dataclasses.MISSING:
            options["default"] = []
        self.add_argument(f"--{name}", help=text + shown, **options)


def config_file(name: str, folder: str = "") -> str:
    """The path of a YAML file; one that is not there is looked for among those of this package, `configs/` and below."""
    ours = Path(__file__).with_name("configs") / folder / name
    return str(ours) if not Path(name).exists() and ours.is_file() else name
