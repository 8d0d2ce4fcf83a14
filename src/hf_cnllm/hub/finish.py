"""The last touch on a saved folder. Copies of this package have a file of their own in this one's place (`remote_code.py`)."""

from pathlib import Path
from typing import Any

from .model_card import write_card, write_tokenizer_card
from .remote_code import check_copyable as check_copyable
from .remote_code import write_model_code, write_tokenizer_code


def finish_model(model: Any, folder: Path, repo_id: str | None) -> None:
    """Puts the code beside a model, if it `writes_code`, and completes the model card."""
    if model.writes_code:
        write_model_code(model, folder)
    write_card(folder, model, repo_id)


def finish_tokenizer(tokenizer: Any, folder: Path, repo_id: str | None) -> None:
    """Puts the code beside a tokenizer, if it `writes_code`, and completes the card that goes up with it."""
    if tokenizer.writes_code:
        write_tokenizer_code(tokenizer, folder)
    if repo_id is not None:
        write_tokenizer_card(folder, tokenizer, repo_id)
