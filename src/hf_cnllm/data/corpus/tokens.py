"""The corpus as token ids in rows of one length, for pre-training.

Each file `tokens/NNNNN.parquet` has two columns:

- `input_ids`, list<int32>: the documents one after another, each ended by the tokenizer's eos token, cut into rows of
  `sequence_length`; the last row of a file is shorter.
- `seq_lengths`, list<int32>: how many tokens of each document are in the row, in order, as TRL's packing names them. They add up
  to the row's length.

    load_dataset("parquet", data_files="DIR/tokens/*.parquet", split="train", streaming=True)
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.utils.batching import batched
from transformers import AutoTokenizer

from ...hub.places import check_is_checkpoint
from ..packing import pack

if TYPE_CHECKING:
    from .pipeline import Job

SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("seq_lengths", pa.list_(pa.int32()))])
TOKENS = "tokens"
BATCH = 64
ROWS = 256  # written at a time


class PackTokens(PipelineStep):
    """Writes a task's documents as packed rows; see the module."""

    type, name = "🔢 - TOKENS", "packed rows"

    def __init__(self, tokenizer: str, output: str, sequence_length: int) -> None:
        super().__init__()
        self.tokenizer, self.output, self.sequence_length = tokenizer, output, sequence_length

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        Path(self.output).mkdir(parents=True, exist_ok=True)
        with pq.ParquetWriter(Path(self.output, f"{rank:05d}.parquet"), SCHEMA) as writer:
            for rows in batched(pack(self._encode(data), self.sequence_length), ROWS):
                table = {name: [row[name] for row in rows] for name in SCHEMA.names}
                self.stat_update("rows", value=len(rows))
                self.stat_update("tokens", value=sum(map(len, table["input_ids"])))
                writer.write_table(pa.table(table, schema=SCHEMA))

    def _encode(self, data: Iterable[Document]) -> Iterator[list[int]]:
        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer)
        for batch in batched(data, BATCH):
            texts = [document.text for document in batch]
            for ids in tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)[
                "input_ids"
            ]:
                yield [*ids, tokenizer.eos_token_id]


def pack_tokens(job: "Job") -> None:
    """Adds the pass that packs what is left. The documents' text is text: no special token comes of it.

    Raises:
        ValueError: the tokenizer has no eos token.
    """
    settings = job.settings
    check_is_checkpoint(settings.tokenizer, "--tokenizer", tokenizer_alone=True)
    if AutoTokenizer.from_pretrained(settings.tokenizer).eos_token_id is None:
        raise ValueError(f"--tokenizer {settings.tokenizer} has no eos token to put between documents")
    job.add_pass([job.documents(), PackTokens(settings.tokenizer, str(job.work / TOKENS), settings.sequence_length)])
