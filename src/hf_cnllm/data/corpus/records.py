"""Reading and writing the corpus: what is a record, what is skipped and counted, and how the input becomes shards.

A shard is a list of pieces, a piece a file or a range of its bytes that whole lines begin in. The shards depend on the input
alone, not on the number of workers, so that neither does the output.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers.disk_base import DiskWriter

SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".txt.gz")
SHARD_BYTES = 64 << 20
MAX_LINE_BYTES = 16 << 20
RECORD = "record"  # the key in a document's metadata of the record that it comes from


class Piece(NamedTuple):
    """The lines of a file that begin in `[start, end)`; all of it where `end` is None."""

    path: str
    name: str  # for ids of records that have none
    start: int = 0
    end: int | None = None


class Shard(NamedTuple):
    """What one task reads."""

    source: int  # which of the inputs that were named
    pieces: tuple[Piece, ...]


def find_files(place: Path) -> list[tuple[Path, str]]:
    """The files of records at a place, and their names in it.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: a file of another kind, or a folder without files of records.
    """
    if place.is_file():
        if not place.name.endswith(SUFFIXES):
            raise ValueError(f"--input {place}: expected a file that ends in {', '.join(SUFFIXES)}")
        return [(place, place.name)]
    if not place.is_dir():
        raise FileNotFoundError(f"--input {place}: there is no such file or folder")
    files = [path for path in sorted(place.rglob("*")) if path.is_file() and path.name.endswith(SUFFIXES)]
    if not files:
        raise ValueError(f"--input {place}: no file in this folder ends in {', '.join(SUFFIXES)}")
    return [(path, path.relative_to(place).as_posix()) for path in files]


def plan_shards(inputs: Sequence[Path], shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Cuts large files at every `shard_bytes` (gzip cannot be cut) and puts small ones together, by input.

    Raises:
        FileNotFoundError, ValueError: as `find_files`; or a file is named twice.
    """
    shards: list[Shard] = []
    seen: set[Path] = set()
    for source, place in enumerate(inputs):
        pieces: list[Piece] = []
        room = shard_bytes
        for path, name in find_files(place):
            if (resolved := path.resolve()) in seen:
                raise ValueError(f"--input {place}: {path} is named twice")
            seen.add(resolved)
            size = path.stat().st_size
            is_packed = path.name.endswith(".gz")
            for start in range(0, max(size, 1), max(size, 1) if is_packed else shard_bytes):
                end = None if is_packed else min(start + shard_bytes, size)
                length = size if end is None else end - start
                if pieces and length > room:
                    shards.append(Shard(source, tuple(pieces)))
                    pieces, room = [], shard_bytes
                pieces.append(Piece(str(resolved), name, start, end))
                room -= length
        shards.append(Shard(source, tuple(pieces)))
    return shards


def read_lines(stream: IO[bytes], start: int, end: int | None, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """(offset, line) of the lines that begin in `[start, end)`; None for one of more than `limit` bytes, which is passed over
    a megabyte at a time, so that no line needs more memory than `limit`."""
    position = start
    if start > 0:  # the line that began before belongs to the piece before
        stream.seek(start - 1)
        position = start - 1
        while (part := stream.readline(1 << 20)) and (end is None or position < end):
            position += len(part)
            if part.endswith(b"\n"):
                break
    while end is None or position < end:
        line = stream.readline(limit + 1)
        if not line:
            return
        offset, position = position, position + len(line)
        if len(line) <= limit or line.endswith(b"\n"):
            yield offset, line
            continue
        while part := stream.readline(1 << 20):
            position += len(part)
            if part.endswith(b"\n"):
                break
        yield offset, None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def parse_record(line: bytes, name: str, offset: int) -> dict[str, Any] | str:
    """The record of a line (`{"id", "text", …}`; of a text file's, its text), or why it is skipped. A record without an id is
    named by file and offset."""
    try:
        text = line.decode("utf-8-sig" if offset == 0 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        return "undecodable"
    record: Any = {"id": f"{name}:{offset}", "text": text}
    if name.removesuffix(".gz").endswith(".jsonl"):
        if not text.strip():
            return "blank"
        try:
            record = json.loads(text, parse_constant=_refuse_constant)
            if not isinstance(record, dict):
                return "not_an_object"
            if "\\u" in text:  # half a surrogate pair can be written as an escape, but not as UTF-8
                json.dumps(record, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return "undecodable"
        except (ValueError, RecursionError):
            return "not_json"
        if record.get("id") is None:
            record = {"id": f"{name}:{offset}", **{key: value for key, value in record.items() if key != "id"}}
    if not isinstance(record.get("text"), str):
        return "without_text"
    return record if record["text"].strip() else "blank"


class RecordReader(PipelineStep):
    """Gives the records of a task's shard as documents. What is no record is counted under its reason, `skipped_…`; of a file
    of gzip that is cut short or damaged, what comes before is read.

    Args:
        shards: one for each task; paths that do not exist hold nothing where `missing_ok`.
        max_line_bytes: longer lines are skipped.
    """

    type, name = "📖 - READER", "records"

    def __init__(self, shards: Sequence[Shard], max_line_bytes: int = MAX_LINE_BYTES, missing_ok: bool = False) -> None:
        super().__init__()
        self.shards = shards
        self.max_line_bytes = max_line_bytes
        self.missing_ok = missing_ok

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for piece in self.shards[rank].pieces:
            if self.missing_ok and not Path(piece.path).exists():
                continue
            try:
                yield from self._read(piece)
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                self.stat_update(f"{'cut_short' if isinstance(error, EOFError) else 'damaged'}:{piece.name}")

    def _read(self, piece: Piece) -> Iterator[Document]:
        opened: IO[bytes] = gzip.open(piece.path) if piece.path.endswith(".gz") else open(piece.path, "rb")  # type: ignore
        with opened as stream:
            for offset, line in read_lines(stream, piece.start, piece.end, self.max_line_bytes):
                with self.track_time():
                    found = "too_long" if line is None else parse_record(line, piece.name, offset)
                if isinstance(found, str):
                    self.stat_update(f"skipped_{found}")
                else:
                    yield Document(text=found["text"], id=found["id"], metadata={RECORD: found})


class RecordWriter(DiskWriter):
    """Writes a task's documents as `<task>.jsonl`, each as the record that it comes from, with its present text."""

    default_output_filename = "${rank}.jsonl"
    name = "records"

    def __init__(self, output_folder: str) -> None:
        super().__init__(output_folder, compression=None, mode="wb")

    def _default_adapter(self, document: Document) -> dict[str, Any]:
        return {**document.metadata[RECORD], "text": document.text}

    def _write(self, document: dict[str, Any], file_handler: IO[bytes], filename: str) -> None:
        file_handler.write(json.dumps(document, ensure_ascii=False).encode() + b"\n")


class Measure(PipelineStep):
    """Counts what passes: documents, and bytes of their text in UTF-8."""

    type, name = "📏 - MEASURE", "what is left"

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for document in data:
            self.stat_update("documents")
            self.stat_update("bytes", value=len(document.text.encode()))
            yield document


class Mix(PipelineStep):
    """Mixing weights: of a source with weight w, every document ⌊w⌋ times and once more for a share w − ⌊w⌋ of them, chosen
    by a hash of the document's id.

    Args:
        weights: one for each task.
    """

    type, name = "⚖ - MIX", "weights"

    def __init__(self, weights: Sequence[float]) -> None:
        super().__init__()
        self.weights = weights

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        whole, share = divmod(self.weights[rank], 1)
        for document in data:
            chosen = zlib.crc32(str(document.id).encode("utf-8", "replace")) < share * 2**32
            for _ in range(int(whole) + chosen):
                yield document
