"""Texts as an endless stream of training rows, read while training goes, and the same again after a resume.

| data                                          | rows                                                                       |
|-----------------------------------------------|----------------------------------------------------------------------------|
| `.txt` files                                  | a text a line                                                              |
| `.jsonl`, `.json`, `.parquet` files           | `text` or `content`; or token ids: `input_ids`, with `seq_lengths` if packed |
| a folder                                      | all such files below it                                                    |
| the name of a data set of `datasets`          | as in the files, streamed                                                  |
"""

import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from ..data.conversations import IGNORE_INDEX, data_set_rows, rows_of_file
from ..data.formats import NOT_UTF8, ConversationError

Rows = Iterator[tuple[str, Any]]  # each with its place, for messages
Row = dict[str, Any]  # of training
TEXT_FIELDS = ("text", "content")


def _read_lines(path: Path) -> Rows:
    number = 0
    with open(path, encoding="utf-8-sig") as file:
        try:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield f"line {number}", {"text": line.rstrip("\n")}
        except UnicodeDecodeError:
            raise ConversationError(f"{path}, after line {number}: {NOT_UTF8}") from None


READERS: dict[str, Callable[[Path], Rows]] = {
    ".txt": _read_lines,
    ".json": rows_of_file,
    ".jsonl": rows_of_file,
    ".parquet": rows_of_file,
}


def find_sources(names: Iterable[str]) -> list[str]:
    """The files, those below folders, and the data sets.

    Raises:
        OSError: a folder has no file that is read here.
        ValueError: a file is of another kind.
    """
    sources: list[str] = []
    for name in names:
        if Path(name).is_dir():
            found = sorted(str(path) for path in Path(name).rglob("*") if path.suffix in READERS and path.is_file())
            if not found:
                raise FileNotFoundError(f"{name}: there is no {', '.join(READERS)} file in the folder")
            sources += found
        elif Path(name).is_file() and Path(name).suffix not in READERS:
            raise ValueError(f"{name}: of files {', '.join(READERS)} are read")
        else:
            sources.append(name)
    return sources


class Place(NamedTuple):
    """Of a document: the epoch, the row of the data in it, and the part of the row."""

    epoch: int = 0
    row: int = 0
    part: int = 0


@dataclass
class Documents:
    """The documents of files and data sets, as token ids.

    Args:
        sources: of `find_sources`.
        tokenizer: begins texts as it does by default; what looks like a control token in a text is text.
        is_ended: put the tokenizer's end token behind each text. Otherwise texts have no special tokens at all.
        text_field: where the text is; `text` or `content` by default.
        split: of the data sets.
        shuffle_buffer: documents among which the next is drawn; 0 keeps the order. The order of files is shuffled, too.
        seed: of the shuffling, with the number of the epoch.

    Raises:
        ConversationError: a row has no text; file and line, or data set and row, and field are named.
        OSError: there is no such file or data set.
    """

    sources: Sequence[str]
    tokenizer: Any
    is_ended: bool = True
    text_field: str | None = None
    split: str = "train"
    shuffle_buffer: int = 0
    seed: int = 0

    def epoch(self, number: int) -> Iterator[list[int]]:
        """All documents once."""
        return (document for _, document in self._epoch(number, 0))

    def forever(self, start: Place = Place()) -> Iterator[tuple[Place, list[int]]]:  # noqa: B008  a constant
        """Epoch after epoch, from a place on; what is before it is passed over, and not tokenized.

        Raises:
            ConversationError: there is no document.
        """
        for number in count(start.epoch):
            is_empty = start == Place() or number > start.epoch
            for place, document in self._epoch(number, start.row if number == start.epoch else 0):
                is_empty &= len(document) <= self.is_ended  # one token predicts nothing
                if place >= start:
                    yield place, document
            if is_empty:
                raise ConversationError(f"{', '.join(self.sources)}: there is no text")

    def _epoch(self, number: int, first: int) -> Iterator[tuple[Place, list[int]]]:
        rng, sources = random.Random(f"{self.seed}-{number}"), list(self.sources)
        if self.shuffle_buffer:
            rng.shuffle(sources)
        rows: Iterable[Any] = ((source, *row) for source in sources for row in self._rows(source))
        rows = _shuffled(rows, self.shuffle_buffer, rng) if self.shuffle_buffer else rows
        for row_number, (source, place, row) in enumerate(islice(rows, first, None), first):
            try:
                for part, document in enumerate(self._documents(row)):
                    yield Place(number, row_number, part), document
            except ConversationError as error:
                raise ConversationError(f"{source}, {place}: {error}") from None

    def _rows(self, source: str) -> Rows:
        if (reader := READERS.get(Path(source).suffix)) is not None:
            return reader(Path(source))
        return data_set_rows(source, self.split, streaming=True)

    def _documents(self, row: Any) -> Iterator[list[int]]:
        if not isinstance(row, Mapping):
            raise ConversationError(f"expected an object, got {type(row).__name__}")
        if "input_ids" in row:
            yield from self._of_ids(row)
            return
        name = self.text_field or next((name for name in TEXT_FIELDS if name in row), TEXT_FIELDS[0])
        if not isinstance(text := row.get(name), str):
            other = "" if name in row else ": name another by --text_field"
            raise ConversationError(f"field {name!r} must be a text; has {sorted(row)}{other}")
        ids = self.tokenizer(text, add_special_tokens=self.is_ended, split_special_tokens=True)["input_ids"]
        if text:
            is_closed = not self.is_ended or ids[-1:] == [self._end_id]
            yield list(ids) if is_closed else [*ids, self._end_id]

    def _of_ids(self, row: Mapping[str, Any]) -> Iterator[list[int]]:
        ids, size = row["input_ids"], len(self.tokenizer)
        if not isinstance(ids, list) or not all(isinstance(token, int) and 0 <= token < size for token in ids):
            raise ConversationError(f"field 'input_ids' must be a list of ids of the tokenizer, below {size}")
        ends = [place for place, token in enumerate(ids, start=1) if token == self._end_id]
        if (lengths := row.get("seq_lengths")) is not None:
            if not isinstance(lengths, list) or not all(isinstance(one, int) and one > 0 for one in lengths):
                raise ConversationError("field 'seq_lengths' must be a list of whole numbers above 0")
            if sum(lengths) != len(ids):
                raise ConversationError(f"field 'seq_lengths' adds up to {sum(lengths)}, but there are {len(ids)} ids")
            ends = list(accumulate(lengths))
        start = 0
        for end in dict.fromkeys([*ends, len(ids)]):
            document, start = ids[start:end], end
            if not self.is_ended and document[-1:] == [self._end_id]:
                document = document[:-1]
            if document:
                yield document

    @property
    def _end_id(self) -> int | None:
        end: int | None = self.tokenizer.eos_token_id
        return end


def _shuffled(items: Iterable[Any], size: int, rng: random.Random) -> Iterator[Any]:
    buffer: list[Any] = []
    for item in items:
        if len(buffer) < size:
            buffer.append(item)
            continue
        place = rng.randrange(size)
        item, buffer[place] = buffer[place], item
        yield item
    rng.shuffle(buffer)
    yield from buffer


class StreamState(NamedTuple):
    """How far a stream has come: rows that were made, the document of the last one, and how much of it is in rows."""

    rows: int = 0
    place: Place = Place()
    used: int = 0


class Stream(IterableDataset):  # type: ignore[type-arg]
    """The rows that `make_rows` makes of documents that never end, each with a `seed` of its own.

    Args:
        rows_per_step: of all processes; `states` has how far it was after each of the last steps.
        start: where to go on. Rows before it, which a Trainer that resumes passes over, are not made anew.
    """

    def __init__(
        self,
        documents: Documents,
        make_rows: Callable[[Iterable[list[int]]], Iterator[Row]],
        rows_per_step: int = 1,
        start: StreamState = StreamState(),  # noqa: B008  a constant
    ):
        self.documents, self.make_rows, self.rows_per_step, self.start = documents, make_rows, rows_per_step, start
        self.states: deque[StreamState] = deque(maxlen=8)  # batches are read ahead

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ValueError("the stream is read by one process: set dataloader_num_workers to 0 or 1")
        for _ in range(self.start.rows):
            yield {"input_ids": [0, 0], "seq_lengths": [2]}
        current, length = self.start.place, 0

        def documents() -> Iterator[list[int]]:
            nonlocal current, length
            for place, document in self.documents.forever(self.start.place):
                current, length = place, len(document)
                yield document[self.start.used if place == self.start.place else 0 :]

        for number, row in enumerate(self.make_rows(documents()), start=self.start.rows):
            if (number + 1) % self.rows_per_step == 0:
                self.states.append(StreamState(number + 1, current, length - row["left"]))
            yield {**row, "seed": f"{self.documents.seed}-{number}"}


@dataclass
class CollatePacked:
    """Batches of packed rows. Positions that restart say where a document begins; attention, ALiBi, NTK and LogN follow them, and
    nobody is asked to predict the first token of one. Shorter rows are filled up by a document that is not learned.

    Args:
        pad_id: fills rows up.
        is_flat: make one row of the batch, [1, batch * length], as flash attention of transformers' own models wants it.
        has_positions: False for a model that takes none: rows of one document each, padded, with an attention mask.
    """

    pad_id: int
    is_flat: bool = False
    has_positions: bool = True

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        missing = [length - len(row["input_ids"]) for row in rows]
        ids = torch.tensor([[*row["input_ids"], *[self.pad_id] * gap] for row, gap in zip(rows, missing, strict=True)])
        positions = torch.tensor([
            [place for size in (*row["seq_lengths"], gap) for place in range(size)]
            for row, gap in zip(rows, missing, strict=True)
        ])  # fmt: skip
        is_text = torch.arange(length) < length - torch.tensor(missing)[:, None]
        batch = {"input_ids": ids, "labels": ids.masked_fill((positions == 0) | ~is_text, IGNORE_INDEX)}
        batch |= {"position_ids": positions} if self.has_positions else {"attention_mask": is_text.long()}
        return {name: values.view(1, -1) for name, values in batch.items()} if self.is_flat else batch
