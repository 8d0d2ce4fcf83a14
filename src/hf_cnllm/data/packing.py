"""Documents of token ids as rows of one length."""

from collections.abc import Iterable, Iterator
from typing import Any

Row = dict[str, Any]


def pack(documents: Iterable[list[int]], length: int) -> Iterator[Row]:
    """Rows of `length` tokens, filled with one document after the other: `input_ids`, `seq_lengths` of what each document has in
    the row, and how many tokens of the last are left. They go on in the next row, without what was before. The last row may be
    shorter."""
    row: Row = {"input_ids": [], "seq_lengths": [], "left": 0}
    for document in documents:
        used = 0
        while used < len(document):
            part = document[used : used + length - len(row["input_ids"])]
            used += len(part)
            row["input_ids"] += part
            row["seq_lengths"].append(len(part))
            if len(row["input_ids"]) == length:
                yield {**row, "left": len(document) - used}
                row = {"input_ids": [], "seq_lengths": [], "left": 0}
    if row["input_ids"]:
        yield row


def pieces(documents: Iterable[list[int]], length: int, least: int = 2) -> Iterator[Row]:
    """Rows of `least` to `length` tokens, each of one document: for models that cannot tell packed documents apart."""
    for document in documents:
        for start in range(0, len(document), length):
            part = document[start : start + length]
            if len(part) >= least:
                yield {"input_ids": part, "seq_lengths": [len(part)], "left": len(document) - start - len(part)}
