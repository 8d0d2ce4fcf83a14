"""The chat templates: the families' own, which their tokenizers bring, and `FORMS`, those that base models are tuned with."""

from importlib import resources

FORMS = ("alpaca", "bloom", "llama2", "vicuna")


def read_template(name: str) -> str:
    """A chat template by its name."""
    return (resources.files(__package__) / f"{name}.jinja").read_text(encoding="utf-8")
