"""Duplicates: exact, of sentences and paragraphs, and near ones by MinHash, with datatrove's steps and one check of our own.

MinHash alone trades recall for precision: the chance that two documents of similarity s become a pair is 1 − (1 − s^r)^b for b
buckets of r hashes. datatrove's example (14 × 8) finds 92 % of the pairs at s = 0.8, and 5 % of those at 0.5. Here 24 buckets of
5 find 99.99 % at 0.8 and 98.8 % at 0.7, and every pair that they suggest is then compared by its true Jaccard similarity, so
that short signatures cost no precision.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
    SentDedupConfig,
    SentenceDedupFilter,
    SentenceDedupSignature,
    SentenceFindDedups,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.text import TextNormConfig

from .texts import ScriptTokenizer

if TYPE_CHECKING:
    from .pipeline import Job

# datatrove's, but for numbers: to it "w17 w4" and "w9 w32" are the same text.
NORMALIZED = TextNormConfig(norm_numbers=False)
MINHASH = MinhashConfig(n_grams=5, num_buckets=24, hashes_per_bucket=5, norm_config=NORMALIZED)
BUFFERED = 1000  # signatures read at a time
MAX_SPANS = 2**16  # datatrove numbers the sentences of a document with 16 bits
MAX_COMPARED = 100


def text_of(document: Document) -> str:  # datatrove reads the annotation
    return document.text


def exact_duplicates(job: "Job") -> list[PipelineStep]:
    """All but one of the documents with the very same text go."""
    config = ExactDedupConfig(content_getter=text_of)
    signatures, duplicates = job.folder("signatures"), job.folder("duplicates")
    job.add_pass([job.documents(), ExactDedupSignature(signatures, config)])
    job.add_pass([ExactFindDedups(signatures, duplicates, config, lines_to_buffer=BUFFERED)], tasks=1)
    return [ExactDedupFilter(duplicates, config)]


class SpanSignature(SentenceDedupSignature):
    """datatrove's, but that spans of fewer than `min_words` words never count as repeated."""

    def __init__(self, *args: Any, min_words: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.min_words = min_words

    def get_hashes(self, doc: Document, doc_idx: int) -> list[tuple[int, int, int]]:
        found = [each for each in super().get_hashes(doc, doc_idx) if each[2] < MAX_SPANS]
        if self.config.split_sentences:
            return found
        lines = doc.text.splitlines()
        return [each for each in found if len(self.tokenizer.word_tokenize(lines[each[2]])) >= self.min_words]


def repeated_spans(job: "Job", config: SentDedupConfig) -> list[PipelineStep]:
    signatures, duplicates = job.folder("signatures"), job.folder("duplicates")
    words = ScriptTokenizer()
    min_words = job.settings.min_paragraph_words
    signature = SpanSignature(signatures, config=config, language=words, min_words=min_words)
    job.add_pass([job.documents(), signature])
    job.add_pass([SentenceFindDedups(signatures, duplicates, config=config, lines_to_buffer=BUFFERED)], tasks=1)
    return [SentenceDedupFilter(duplicates, config, language=words)]


def repeated_sentences(job: "Job") -> list[PipelineStep]:
    """C4: all but one of the spans of three sentences that occur more than once go."""
    config = SentDedupConfig(n_sentences=3, min_doc_words=0, min_num_sentences=0, norm_config=NORMALIZED)
    return repeated_spans(job, config)


def repeated_paragraphs(job: "Job") -> list[PipelineStep]:
    """CCNet: all but one of the lines that occur more than once go."""
    config = SentDedupConfig(
        n_sentences=1, split_sentences=False, min_doc_words=0, min_num_sentences=0, norm_config=NORMALIZED
    )
    return repeated_spans(job, config)


def near_duplicates(job: "Job") -> list[PipelineStep]:
    """All but one document of every cluster of pairs with a Jaccard similarity of 5-grams of at least `jaccard` go."""
    folders = ("signatures", "buckets", "shingles", "verified", "remove")
    signatures, buckets, shingles, verified, remove = map(job.folder, folders)
    signature = MinhashDedupSignature(signatures, MINHASH, language=ScriptTokenizer())
    job.add_pass([job.documents(), signature])
    find = MinhashDedupBuckets(signatures, buckets, config=MINHASH, lines_to_buffer=BUFFERED)
    job.add_pass([find], tasks=MINHASH.num_buckets)
    job.add_pass([job.documents(), ShinglesOfCandidates(buckets, shingles, signature)])
    job.add_pass([VerifyCandidates(buckets, shingles, verified, job.settings.jaccard)], tasks=MINHASH.num_buckets)
    job.add_pass([MinhashDedupCluster(verified, remove, config=MINHASH, lines_to_buffer=BUFFERED)], tasks=1)
    return [MinhashDedupFilter(remove)]


def read_pairs(path: Path) -> np.ndarray:
    """Rows of (file, document, file, document), as datatrove writes them."""
    return np.fromfile(path, dtype="<u4").reshape(-1, 4)


class ShinglesOfCandidates(PipelineStep):
    """Writes the hashed n-grams of the documents that some bucket suggests: `NNNNN.documents.npy`, their numbers, ascending;
    `NNNNN.shingles.npy`, the sorted hashes of all; `NNNNN.ends.npy`, where those of each document end."""

    type, name = "🫂 - DEDUP", "shingles of candidates"

    def __init__(self, buckets: str, output: str, signature: MinhashDedupSignature) -> None:
        super().__init__()
        self.buckets, self.output, self.signature = buckets, output, signature

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        wanted: set[int] = set()
        for path in Path(self.buckets).glob("*.dups"):
            ends = read_pairs(path).reshape(-1, 2)
            wanted.update(ends[ends[:, 0] == rank, 1].tolist())
        documents, shingles = [], [np.empty(0, dtype=np.uint64)]
        for number, document in enumerate(data):
            if number in wanted:
                documents.append(number)
                shingles.append(np.unique(self.signature.get_shingles(document.text)))
        Path(self.output).mkdir(parents=True, exist_ok=True)
        for name, values in {
            "documents": np.array(documents, dtype=np.int64),
            "shingles": np.concatenate(shingles),
            "ends": np.cumsum([len(each) for each in shingles]),
        }.items():
            np.save(Path(self.output, f"{rank:05d}.{name}.npy"), values)


class VerifyCandidates(PipelineStep):
    """Keeps of a bucket's pairs those that are similar enough. Documents of one signature are compared with those before them
    that were like none (the last hundred of them), so one stranger among them separates no true duplicates."""

    type, name = "🫂 - DEDUP", "Jaccard similarity of candidates"

    def __init__(self, buckets: str, shingles: str, output: str, threshold: float) -> None:
        super().__init__()
        self.buckets, self.shingles, self.output, self.threshold = buckets, shingles, output, threshold

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> None:
        files: dict[int, tuple[np.ndarray, ...]] = {}

        def shingles_of(node: tuple[int, int]) -> np.ndarray:
            file, number = node
            if file not in files:
                names = ("documents", "shingles", "ends")
                paths = (Path(self.shingles, f"{file:05d}.{name}.npy") for name in names)
                files[file] = tuple(
                    np.load(path, mmap_mode="r" if "shingles." in path.name else None) for path in paths
                )
            documents, shingles, ends = files[file]
            at = int(np.searchsorted(documents, number))
            return np.asarray(shingles[ends[at] : ends[at + 1]])

        Path(self.output).mkdir(parents=True, exist_ok=True)
        for path in sorted(Path(self.buckets).glob(f"{rank:05d}_*.dups")):
            kept = []
            for group in _chains(read_pairs(path)):
                strangers: list[tuple[tuple[int, int], np.ndarray]] = []
                for node in group:
                    own = shingles_of(node)
                    like = next((other for other, theirs in strangers if jaccard(own, theirs) >= self.threshold), None)
                    if like is None:
                        strangers = [*strangers[1 - MAX_COMPARED :], (node, own)]
                    else:
                        kept.append((*like, *node))
                    self.stat_update("unlike" if like is None else "alike")
            np.array(kept, dtype="<u4").tofile(Path(self.output, path.name))


def jaccard(first: np.ndarray, second: np.ndarray) -> float:
    """The Jaccard similarity of two sorted sets, the first of which is not empty."""
    at = np.searchsorted(first, second)
    at[at == len(first)] = 0  # greater than all, so not equal to that one either
    shared = np.count_nonzero(first[at] == second)
    return shared / (len(first) + len(second) - shared)


def _chains(pairs: np.ndarray) -> Iterator[list[tuple[int, int]]]:
    """Documents of one signature: datatrove writes them as (a, b), (b, c), …"""
    chain: list[tuple[int, int]] = []
    for a, b, c, d in pairs.tolist():
        if not chain or chain[-1] != (a, b):
            if chain:
                yield chain
            chain = [(a, b)]
        chain.append((c, d))
    if chain:
        yield chain
