"""Files of texts: what is a record, what is skipped and why, and how much input becomes shards.

A shard is a list of pieces, a piece a file or a range of its bytes that whole lines begin in. The shards depend on the input
alone, not on the number of workers, so that neither does the output.
"""

import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

COMPRESSED = (".gz", ".zst")  # these files cannot be cut
SUFFIXES = (*(kind + packing for kind in (".jsonl", ".txt") for packing in ("", *COMPRESSED)), ".parquet")
SHARD_BYTES = 64 << 20
MAX_LINE_BYTES = 16 << 20
ROWS_AT_ONCE = 64  # of Parquet


class Piece(NamedTuple):
    """The lines (of Parquet, the row groups) of a file that begin in `[start, end)`; all of it where `end` is None."""

    path: str
    name: str  # as it was given, for ids of records that have none
    start: int = 0
    end: int | None = None


class Shard(NamedTuple):
    """What one task reads."""

    source: int  # which of the inputs that were named
    pieces: tuple[Piece, ...]


def find_files(place: Path) -> list[Path]:
    """The files of records at a place.

    Raises:
        FileNotFoundError: there is nothing.
        ValueError: a file of another kind, or a folder without files of records.
    """
    if place.is_file():
        if not place.name.endswith(SUFFIXES):
            raise ValueError(f"{place}: expected a file that ends in {', '.join(SUFFIXES)}")
        return [place]
    if not place.is_dir():
        raise FileNotFoundError(f"{place}: there is no such file or folder")
    files = [path for path in sorted(place.rglob("*")) if path.is_file() and path.name.endswith(SUFFIXES)]
    if not files:
        raise ValueError(f"{place}: no file in this folder ends in {', '.join(SUFFIXES)}")
    return files


def plan_shards(inputs: Sequence[Path], shard_bytes: int = SHARD_BYTES) -> list[Shard]:
    """Cuts large files at every `shard_bytes` (compressed ones cannot be cut) and puts small ones together, by input.

    Raises:
        FileNotFoundError, ValueError: as `find_files`; or a file is named twice.
    """
    shards: list[Shard] = []
    seen: set[Path] = set()
    for source, place in enumerate(inputs):
        pieces: list[Piece] = []
        room = shard_bytes
        for path in find_files(place):
            resolved = path.resolve()
            if resolved in seen:
                raise ValueError(f"{place}: {path} is named twice")
            seen.add(resolved)
            size = path.stat().st_size
            step = max(size, 1) if path.name.endswith(COMPRESSED) else shard_bytes
            for start in range(0, max(size, 1), step):
                end = min(start + step, size)
                if pieces and end - start > room:
                    shards.append(Shard(source, tuple(pieces)))
                    pieces, room = [], shard_bytes
                pieces.append(Piece(str(resolved), str(path), start, None if end == size else end))
                room -= end - start
        shards.append(Shard(source, tuple(pieces)))
    return shards


def read_lines(stream: Any, start: int, end: int | None, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """(offset, line) of the lines of a binary file that begin in `[start, end)`; None for one of more than `limit` bytes, which is passed over
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


def is_utf8(text: str) -> bool:
    """Half a surrogate pair can be written as an escape of JSON, but not as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_object(text: str) -> dict[str, Any] | str:
    """The object that a line of JSON holds, or why it is skipped."""
    if not text.strip():
        return "blank"
    try:
        record = json.loads(text, parse_constant=_refuse_constant)
        if not isinstance(record, dict):
            return "not_an_object"
        if "\\u" in text and not is_utf8(json.dumps(record, ensure_ascii=False)):
            return "undecodable"
    except (ValueError, RecursionError):
        return "not_json"
    return record


def text_of(line: bytes, offset: int) -> str | None:
    """The text of a line without its end, in a file's first one also without a byte order mark; None where it is no UTF-8."""
    try:
        return line.decode("utf-8-sig" if offset == 0 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError:
        return None


def parse_record(line: bytes, name: str, offset: int) -> dict[str, Any] | str:
    """The record of a line (`{"id", "text", …}`; of a text file's, its text), or why it is skipped. A record without an id is
    named by file and offset."""
    text = text_of(line, offset)
    if text is None:
        return "undecodable"
    record: Any = {"id": f"{name}:{offset}", "text": text}
    if ".jsonl" in Path(name).suffixes[-2:]:
        record = parse_object(text)
        if isinstance(record, str):
            return record
    return _named(record, f"{name}:{offset}")


def _named(record: dict[str, Any], place: str) -> dict[str, Any] | str:
    if record.get("id") is None:
        record = {"id": place, **{key: value for key, value in record.items() if key != "id"}}
    if not isinstance(record.get("text"), str):
        return "without_text"
    return record if record["text"].strip() else "blank"


def _as_json(value: Any) -> str:
    """Dates and decimal numbers; bytes have no form in JSON."""
    if isinstance(value, bytes):
        raise TypeError("bytes are no JSON")
    return str(value)


def _records_of_lines(piece: Piece, limit: int) -> Iterator[dict[str, Any] | str]:
    with _open(piece.path) as stream:
        for offset, line in read_lines(stream, piece.start, piece.end, limit):
            yield "too_long" if line is None else parse_record(line, piece.name, offset)


def _open(path: str) -> Any:
    if path.endswith(".zst"):
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.OSFile(path), "zstd"))
    return gzip.open(path) if path.endswith(".gz") else open(path, "rb")


def _records_of_rows(piece: Piece, limit: int) -> Iterator[dict[str, Any] | str]:
    from pyarrow.parquet import ParquetFile

    with ParquetFile(piece.path) as file:
        first = 0  # row of the group
        for group in range(file.num_row_groups if file.metadata.num_columns else 0):
            about = file.metadata.row_group(group)
            column = about.column(0)
            begin = column.dictionary_page_offset or column.data_page_offset
            if piece.start <= begin and (piece.end is None or begin < piece.end):
                rows = (
                    batch.slice(number, 1)
                    for batch in file.iter_batches(ROWS_AT_ONCE, row_groups=[group])
                    for number in range(batch.num_rows)
                )
                for number, row in enumerate(rows, first):
                    yield _parse_row(row, f"{piece.name}:{number}", limit)
            first += about.num_rows


def _parse_row(row: Any, place: str, limit: int) -> dict[str, Any] | str:
    try:
        text = json.dumps(row.to_pylist()[0], default=_as_json)
    except UnicodeDecodeError:
        return "undecodable"
    except (TypeError, ValueError):
        return "not_json"
    found = _named(json.loads(text, parse_constant=lambda name: None), place)  # no number is null
    return "too_long" if not isinstance(found, str) and len(found["text"].encode()) > limit else found


def read_piece(piece: Piece, max_line_bytes: int = MAX_LINE_BYTES) -> Iterator[dict[str, Any] | str]:
    """The records of a piece, or why there is none: `skipped_…`, or `cut_short:FILE`, `damaged:FILE` where a compressed file ends
    too soon or is none; what comes before that is read."""
    read = _records_of_rows if piece.path.endswith(".parquet") else _records_of_lines
    try:
        for found in read(piece, max_line_bytes):
            yield f"skipped_{found}" if isinstance(found, str) else found
    except EOFError:
        yield f"cut_short:{piece.name}"
    except (zlib.error, gzip.BadGzipFile):
        yield f"damaged:{piece.name}"
    except (OSError, ValueError) as error:  # pyarrow's are known by what they say
        if getattr(error, "errno", None) is not None:
            raise
        yield f"{'cut_short' if 'Truncated' in str(error) else 'damaged'}:{piece.name}"


def read_texts(inputs: Sequence[Path], skipped: Counter[str] | None = None) -> Iterator[str]:
    """The texts of all records; `skipped` counts, by reason, what is none."""
    for shard in plan_shards(inputs):
        for piece in shard.pieces:
            for record in read_piece(piece):
                if not isinstance(record, str):
                    yield record["text"]
                elif skipped is not None:
                    skipped[record.removeprefix("skipped_")] += 1
