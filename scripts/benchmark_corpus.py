"""Near-duplicate removal measured: our stage, datatrove's own example and datasketch, on the same corpus in one run.

    pip install "hf-cnllm[data]" datasketch spacy jieba
    python scripts/benchmark_corpus.py --output benchmark --documents 4000

Half of the documents are Chinese, half English; one in four has a copy of Jaccard similarity 0.8 (5-grams), one in four a near miss
of 0.4, which is no duplicate. Speed is megabytes of text per second of processor time on one core. Writes `corpus.json`.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.utils.typeshelper import Languages

from hf_cnllm.data.corpus import Settings, run, steps
from hf_cnllm.data.corpus.duplicates import MINHASH
from hf_cnllm.data.corpus.texts import ScriptTokenizer
from hf_cnllm.data.records import plan_shards

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "data" / "corpus"))
from corpora import altered, text, words


def make_corpus(path: Path, documents: int, seed: int, similarity: float = 0.8) -> tuple[list[dict], set[str]]:
    """The records, and the ids of the pairs' originals."""
    rng = random.Random(seed)
    records, duplicated = [], set()
    for number in range(documents):
        chinese = bool(number % 2)
        tokens = words(rng, rng.randrange(100, 400), chinese)
        records.append({"id": f"d{number}", "text": text(tokens, chinese)})
        if number % 8 < 4:
            is_pair = number % 8 < 2
            copy = altered(rng, tokens, similarity if is_pair else similarity / 2, chinese)
            records.append({"id": f"d{number}-{'copy' if is_pair else 'other'}", "text": text(copy, chinese)})
            if is_pair:
                duplicated.add(f"d{number}")
    rng.shuffle(records)
    path.write_text("".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records), encoding="utf-8")
    return records, duplicated


def ours(path: Path, folder: Path) -> set[str]:
    run(Settings(input=[path], output=folder / "ours", stages=("minhash",)))
    return {json.loads(line)["id"] for line in (folder / "ours/documents/00000.jsonl").open(encoding="utf-8")}


def datatrove_minhash(path: Path, folder: Path, config: MinhashConfig, language: object) -> set[str]:
    """The four steps of datatrove's examples/minhash_deduplication.py, in this process."""
    signatures, buckets, remove = (str(folder / name) for name in ("signatures", "buckets", "remove"))
    reader = steps.RecordReader(plan_shards([path], 1 << 40))
    MinhashDedupSignature(signatures, config, language=language).run(reader.run())
    for rank in range(config.num_buckets):
        MinhashDedupBuckets(signatures, buckets, config=config).run(None, rank, config.num_buckets)
    MinhashDedupCluster(buckets, remove, config=config).run()
    return {document.id for document in MinhashDedupFilter(remove).run(reader.run())}


def datatrove_example(path: Path, folder: Path) -> set[str]:
    return datatrove_minhash(path, folder / "example", MinhashConfig(), Languages.english)


def datatrove_our_words(path: Path, folder: Path) -> set[str]:
    config = MinhashConfig(norm_config=MINHASH.norm_config)
    return datatrove_minhash(path, folder / "words", config, ScriptTokenizer())


def datasketch_lsh(path: Path, folder: Path) -> set[str]:
    """As in its documentation: 128 permutations, threshold 0.8, the 5-grams of the same words."""
    from datasketch import MinHash, MinHashLSH

    lsh, kept = MinHashLSH(threshold=0.8, num_perm=128), set()
    tokenizer = ScriptTokenizer()
    for document in steps.RecordReader(plan_shards([path], 1 << 40)).run():
        tokens = tokenizer.word_tokenize(document.text)
        minhash = MinHash(num_perm=128)
        minhash.update_batch([" ".join(tokens[i : i + 5]).encode() for i in range(len(tokens) - 4)])
        if not lsh.query(minhash):
            lsh.insert(document.id, minhash)
            kept.add(document.id)
    return kept


METHODS: dict[str, Callable[[Path, Path], set[str]]] = {
    "hf_cnllm: 24 × 5, checked": ours,
    "datatrove's example: 14 × 8, spaCy's English words": datatrove_example,
    "datatrove: 14 × 8, our words": datatrove_our_words,
    "datasketch: 128 permutations, threshold 0.8": datasketch_lsh,
}


def measure(documents: int, rounds: int) -> dict[str, dict[str, float]]:
    table: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch, "corpus.jsonl")
        records, duplicated = make_corpus(path, documents, seed=0)
        megabytes = sum(len(record["text"].encode()) for record in records) / 1e6
        print(f"{len(records):,} documents, {megabytes:.1f} MB of text, {len(duplicated)} planted pairs", flush=True)
        for name, method in METHODS.items():
            seconds = []
            for number in range(rounds):
                started = time.process_time()
                kept = method(path, Path(scratch, str(number)))
                seconds.append(time.process_time() - started)
            removed = {record["id"] for record in records} - kept
            right = sum(name.removesuffix("-copy") in duplicated for name in removed)
            found = sum(not {name, f"{name}-copy"} <= kept for name in duplicated)
            table[name] = {
                "precision": right / max(len(removed), 1),
                "recall": found / len(duplicated),
                "MB/s": megabytes / min(seconds),
            }
            row = table[name]
            print(f"| {name} | {row['precision']:.3f} | {row['recall']:.3f} | {row['MB/s']:.2f} |", flush=True)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--documents", type=int, default=4000)
    parser.add_argument("--rounds", type=int, default=2, help="the best counts")
    args = parser.parse_args()
    table = measure(args.documents, args.rounds)
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "corpus.json").write_text(json.dumps(table, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
