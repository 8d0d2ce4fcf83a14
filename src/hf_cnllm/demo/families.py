"""The family-dependent part of the demo, as a table: how a tiny checkpoint's vocabulary is made, and how it is trained.

`checkpoints/<family>/` holds the JSON files of the checkpoint, as on the Hub but for the sizes.
"""

import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.resources import as_file, files
from pathlib import Path
from typing import NamedTuple

from . import vocabularies


class Training(NamedTuple):
    """Passes over the data, conversations a step, learning rates of full fine-tuning and of the adapter."""

    epochs: int = 24
    batch_size: int = 16
    learning_rate: float = 1.5e-3
    adapter_learning_rate: float = 1e-2


@dataclass(frozen=True)
class TinyFamily:
    """One row of the table.

    Attributes:
        write_vocabulary: trains the vocabulary on the texts, writes it into the folder and returns its size.
        vocabulary_size: what it must return for the embedded instruction set; the JSON files' ids rest on it.
        origin: the family as model cards name it.
        training: what makes two million random weights learn the set by heart.
    """

    write_vocabulary: Callable[[Path, Iterable[str]], int]
    vocabulary_size: int
    origin: str
    training: Training = field(default_factory=Training)


TINY_FAMILIES = {
    "baichuan": TinyFamily(vocabularies.write_baichuan2, 2400, "baichuan2"),
    "qwen": TinyFamily(vocabularies.write_qwen, 2408, "qwen"),
    "chatglm": TinyFamily(vocabularies.write_chatglm, 2088, "chatglm", Training(learning_rate=3e-3)),
    "chatglm2": TinyFamily(vocabularies.write_chatglm2, 2200, "chatglm2"),
    "chatglm3": TinyFamily(vocabularies.write_chatglm2, 2200, "chatglm3"),
    "glm": TinyFamily(
        vocabularies.write_glm_chinese, 2010, "glm", Training(epochs=36, batch_size=8, learning_rate=1e-3)
    ),
}


def write_tiny_checkpoint(family: str, folder: Path, texts: Iterable[str], seed: int = 0) -> None:
    """Write a checkpoint of random weights into `folder`, in the family's layout on the Hub.

    Args:
        family: a key of `TINY_FAMILIES`.
        folder: created; must not exist.
        texts: what the vocabulary is trained on.
        seed: of the random weights.
    """
    from transformers import AutoConfig, set_seed

    from .tasks import task_class_for

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
    model = task_class_for(config).auto_class.from_config(config)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)  # the weights alone are wanted: config.json stays as on the Hub
        shutil.move(Path(scratch) / "model.safetensors", folder)
