"""The files of C-Eval, CMMLU, MMLU and GSM8K, as their authors publish them, for the tasks of lm-evaluation-harness in `tasks/`.

Its option `--metadata '{"data": "FOLDER"}'` gives the folder, in which each has one of its own:

    ceval/{dev,val}/SUBJECT_{dev,val}.csv      id, question, A, B, C, D, answer, and in dev explanation
    cmmlu/{dev,test}/SUBJECT.csv               a number, Question, A, B, C, D, Answer
    mmlu/{dev,test}/SUBJECT_{dev,test}.csv     question, A, B, C, D, answer, without a line that says so
    gsm8k/{train,test}.jsonl                   {"question": …, "answer": …}
"""

import csv
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict

from ..data.formats import NOT_UTF8

CHOICES = ("A", "B", "C", "D")
COLUMNS = ("question", *CHOICES, "answer")

Row = dict[str, str]


def read_ceval(data: str | None = None, *, subject: str, title: str, **_: Any) -> DatasetDict:
    """One subject of C-Eval with its splits dev and val; see `read_subject`."""
    return read_subject(data, "ceval", {split: f"{split}/{subject}_{split}.csv" for split in ("dev", "val")}, title)


def read_cmmlu(data: str | None = None, *, subject: str, title: str, **_: Any) -> DatasetDict:
    """One subject of CMMLU with its splits dev and test; see `read_subject`."""
    return read_subject(data, "cmmlu", {split: f"{split}/{subject}.csv" for split in ("dev", "test")}, title)


def read_mmlu(data: str | None = None, *, subject: str, **_: Any) -> DatasetDict:
    """One subject of MMLU with its splits dev and test; see `read_subject`."""
    files = {split: f"{split}/{subject}_{split}.csv" for split in ("dev", "test")}
    return read_subject(data, "mmlu", files, subject.replace("_", " "), header=COLUMNS)


def read_gsm8k(data: str | None = None, **_: Any) -> DatasetDict:
    """GSM8K with its splits train and test.

    Raises:
        ValueError: the folder or a file is missing or empty, or a line is no question.
    """
    return read_splits(data, "gsm8k", {split: f"{split}.jsonl" for split in ("train", "test")}, read_json_lines)


def read_subject(
    data: str | None, benchmark: str, files: Mapping[str, str], title: str, header: Sequence[str] | None = None
) -> DatasetDict:
    """Multiple-choice questions as `question`, `A` to `D`, `answer` (one of these letters) and `title`.

    Args:
        data: the folder with a folder for each benchmark.
        files: by split, below the benchmark's.
        title: of the subject, for the prompt.
        header: names of the columns of files whose first line is a question.

    Raises:
        ValueError: the folder or a file is missing or empty, or a line is no question.
    """
    return read_splits(
        data, benchmark, files, lambda path: ({**row, "title": title} for row in read_csv(path, header))
    )


def read_splits(
    data: str | None, benchmark: str, files: Mapping[str, str], read: Callable[[Path], Iterable[Row]]
) -> DatasetDict:
    """The splits of one task, each from its file."""
    if not isinstance(data, str) or not data:
        raise ValueError(
            f"""where is the data? Pass --metadata '{{"data": "FOLDER"}}', the folder that {benchmark}/ lies in"""
        )
    splits = {}
    for split, name in files.items():
        path = Path(data).expanduser() / benchmark / name
        if not path.is_file():
            raise ValueError(
                f"{path} is missing: `data` must be the folder that {benchmark}/ with all its files lies in"
            )
        try:
            rows = list(read(path))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}: {NOT_UTF8} ({error})") from error
        if not rows:
            raise ValueError(f"{path} holds no question")
        splits[split] = Dataset.from_list(rows)
    return DatasetDict(splits)


def read_csv(path: Path, header: Sequence[str] | None = None) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = csv.reader(file)
        try:
            names = [name.lower() if len(name) > 1 else name for name in header or next(lines, [])]
            for cells in filter(None, lines):
                place = f"{path}, line {lines.line_num}"
                if any(cells[len(names) :]):
                    raise ValueError(f"{place} has more cells than there are columns: is a comma without quotes?")
                yield question_of(dict(zip(names, cells, strict=False)), place)
        except csv.Error as error:
            raise ValueError(f"{path}, line {lines.line_num}: {error}") from error


def question_of(cells: Row, place: str) -> Row:
    """A choice may be an empty text, and nothing else."""
    missing = [name for name in COLUMNS if cells.get(name) is None]
    row = {name: cells.get(name, "").strip() for name in COLUMNS}
    if missing or not row["question"]:
        raise ValueError(f"{place} has no {', '.join(missing) or 'question'}")
    if row["answer"] not in CHOICES:
        raise ValueError(f"{place} has the answer {row['answer']!r}, which is none of {', '.join(CHOICES)}")
    return row


def read_json_lines(path: Path) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            try:
                row = json.loads(line)
                if not all(isinstance(row[name], str) for name in ("question", "answer")):
                    raise TypeError("no text")
                yield {name: row[name] for name in ("question", "answer")}
            except (ValueError, KeyError, TypeError) as error:
                message = f'{path}, line {number}: expected {{"question": …, "answer": …}}'
                raise ValueError(message) from error
