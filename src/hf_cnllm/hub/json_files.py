"""The settings that lie beside a checkpoint's weights."""

import json
from pathlib import Path
from typing import Any


def read_object(file: Path) -> dict[str, Any]:
    """The keys of a JSON file.

    Raises:
        ValueError: the file is damaged, or no object.
        OSError: it cannot be read.
    """
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}). Download it again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged: it is no object with keys. Download it again.")
    return content
