"""Seed tasks, as in Self-Instruct's `seed_tasks.jsonl`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..conversations import read_each, rows_of_file
from ..formats import ConversationError, read_text
from ..languages import language_of
from .heuristics import Instance


@dataclass(frozen=True)
class Task:
    """An instruction, its (input, output), and whether its outputs are labels known beforehand, if that is known."""

    instruction: str
    instances: tuple[Instance, ...] = ()
    is_classification: bool | None = None

    @property
    def language(self) -> str:
        return language_of(self.instruction)


def own_seeds() -> Path:
    """The Chinese and English tasks that come with the package."""
    return Path(__file__).with_name("seed_tasks.jsonl")


def read_seeds(path: Path, languages: Sequence[str]) -> list[Task]:
    """The tasks of a file, one JSON object a line or one list: `{"instruction", "instances": [{"input", "output"}],
    "is_classification"}`; other fields are passed over.

    Raises:
        ConversationError: a row is no such task, a language has none, or one of its kinds; file, line and field are named.
        OSError: the file cannot be read.
    """
    tasks = list(read_each(path, rows_of_file(path), _read_task))
    for language in languages:
        kinds = {task.is_classification for task in tasks if task.language == language}
        for kind, name in ((True, "that is a classification"), (False, "that is no classification")):
            if kind not in kinds:
                raise ConversationError(f"{path}: there is no seed task in the language {language} {name}")
    return [task for task in tasks if task.language in languages]


def _read_task(row: Any) -> Task:
    if not isinstance(row, Mapping):
        raise ConversationError(f"expected an object, got {type(row).__name__}")
    instances = row.get("instances")
    if not isinstance(instances, list) or not instances or not all(isinstance(one, Mapping) for one in instances):
        raise ConversationError("field 'instances' must be a list of objects with input and output, and not empty")
    if not isinstance(row.get("is_classification"), bool):
        raise ConversationError("field 'is_classification' must be true or false")
    pairs = []
    for index, one in enumerate(instances):
        place = f"instances[{index}]."
        given = read_text(one, "input", place, may_be_blank=True) if one.get("input") is not None else ""
        pairs.append((given.strip(), read_text(one, "output", place).strip()))
    return Task(read_text(row, "instruction").strip(), tuple(pairs), row["is_classification"])
