"""Steps of datatrove's pipelines that read, write, count and mix documents."""

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.writers.disk_base import DiskWriter

from ..records import MAX_LINE_BYTES, Shard, read_piece

RECORD = "record"  # the key in a document's metadata of the record that it comes from


class RecordReader(PipelineStep):
    """Gives the records of a task's shard as documents. What is no record is counted under its reason, `skipped_…`; of a file
    of gzip that is cut short or damaged, what comes before is read.

    Args:
        shards: one for each task; paths that do not exist hold nothing where `missing_ok`.
        max_line_bytes: longer lines are skipped.
    """

    type, name = "📖 - READER", "records"

    def __init__(
        self, shards: Sequence[Shard], max_line_bytes: int = MAX_LINE_BYTES, missing_ok: bool = False
    ) -> None:
        super().__init__()
        self.shards = shards
        self.max_line_bytes = max_line_bytes
        self.missing_ok = missing_ok

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        for piece in self.shards[rank].pieces:
            if self.missing_ok and not Path(piece.path).exists():
                continue
            for found in read_piece(piece, self.max_line_bytes):
                if isinstance(found, str):
                    self.stat_update(found)
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
