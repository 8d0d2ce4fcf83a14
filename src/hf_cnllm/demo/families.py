"""Tiny checkpoints of random weights: how the vocabulary of each is made and how it is trained.

`checkpoints/<name>/` holds the JSON files of a checkpoint, as on the Hub but for the sizes.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable
from importlib.resources import as_file, files
from pathlib import Path
from typing import NamedTuple

from ..auto import LINES
from . import vocabularies


class Recipe(NamedTuple):
    """How a checkpoint is trained: passes over the data, conversations a step, and the learning rates of full
    fine-tuning and of the adapter."""

    epochs: int = 24
    batch_size: int = 16
    learning_rate: float = 1.5e-3
    adapter_learning_rate: float = 1e-2


class TinyCheckpoint(NamedTuple):
    """One row of the table.

    Attributes:
        write_vocabulary: trains the vocabulary on the texts, writes it into the folder and returns its size.
        vocabulary_size: what it must return for the embedded instruction set; the JSON files' ids rest on it.
        recipe: what makes two million random weights learn the set by heart.
    """

    write_vocabulary: Callable[[Path, Iterable[str]], int]
    vocabulary_size: int
    recipe: Recipe = Recipe()


TINY_FAMILIES = {
    "baichuan": TinyCheckpoint(vocabularies.write_baichuan2, 2400),
    "qwen": TinyCheckpoint(vocabularies.write_qwen, 2408),
    "chatglm": TinyCheckpoint(vocabularies.write_chatglm, 2088, Recipe(learning_rate=3e-3)),
    "chatglm2": TinyCheckpoint(vocabularies.write_chatglm2, 2200),
    "chatglm3": TinyCheckpoint(vocabularies.write_chatglm2, 2200),
    "glm": TinyCheckpoint(vocabularies.write_glm_chinese, 2010, Recipe(epochs=36, batch_size=8, learning_rate=1e-3)),
}
OWN_RECIPE = Recipe(epochs=3, batch_size=4, learning_rate=1e-5, adapter_learning_rate=1e-4)  # for trained weights

# The name of a tiny checkpoint -> the published line that it is laid out as.
LINE_OF = {line.demo: name for name, line in LINES.items() if line.demo is not None}


def write_tiny_checkpoint(family: str, folder: Path, texts: Iterable[str], seed: int = 0) -> None:
    """Writes a checkpoint of random weights into `folder`, in the family's layout on the Hub.

    Args:
        family: a key of `TINY_FAMILIES`.
        folder: created; must not exist.
        texts: what the vocabulary is trained on.
        seed: of the random weights.
    """
    from transformers import AutoConfig, set_seed

    from .tasks import task_for

    row = TINY_FAMILIES[family]
    with as_file(files("hf_cnllm.demo") / "checkpoints" / family) as originals:
        shutil.copytree(originals, folder)
    size = row.write_vocabulary(folder, texts)
    if size != row.vocabulary_size:
        raise RuntimeError(
            f"the vocabulary of {family} has {size} entries, its config.json was written for {row.vocabulary_size}"
        )
    set_seed(seed)
    config = AutoConfig.from_pretrained(folder)
    model = task_for(config).auto_class.from_config(config)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)  # the weights alone are wanted: config.json stays as on the Hub
        shutil.move(Path(scratch) / "model.safetensors", folder)
