"""Training scripts to run as they are, `python -m hf_cnllm.recipes.NAME`, or to copy and change."""

from importlib.resources import files
from pathlib import Path


def config_file(name: str, folder: str = "") -> str:
    """The path of a YAML file; one that is not there is looked for among those of this package, `configs/` and below."""
    ours = files(__name__) / "configs" / folder / name
    return str(ours) if not Path(name).exists() and ours.is_file() else name
