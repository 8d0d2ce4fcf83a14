"""The chat templates."""

from importlib import resources


def read_template(name: str) -> str:
    """A chat template by its name."""
    return (resources.files(__package__) / f"{name}.jinja").read_text(encoding="utf-8")
