"""Tokenizers beside the libraries that the originals ran on and beside transformers' own, in one run on the same documents.

    python scripts/benchmark_tokenizers.py                              # the small vocabularies of the tests
    python scripts/benchmark_tokenizers.py --vocabularies FOLDER        # FOLDER/baichuan2/tokenizer.model and so on
    python scripts/benchmark_tokenizers.py --documents texts/*.txt --rounds 9 --longest 10000000

Thousand tokens a second of processor time, one thread: the library itself (sentencepiece, tiktoken), ours
(`tokenizer(texts)`), ours with offsets, and transformers' LlamaTokenizer, T5Tokenizer or Qwen2Tokenizer on the same vocabulary.
All take turns; the best of the rounds counts, as others may use the machine. The slope is that of the time over the length, on
log-log axes, of one text of 10,000 to `--longest` characters. The documents are pieces of this repository's own pages and code
unless others are given; every round takes the same ones, so caches are warm from the second on, which `first` is without.
"""

import argparse
import os

os.environ |= {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

import json
import math
import time
from itertools import islice
from pathlib import Path

from sentencepiece import SentencePieceProcessor
from transformers import LlamaTokenizer, Qwen2Tokenizer, T5Tokenizer

from hf_cnllm.models.baichuan.tokenization_baichuan import BaichuanTokenizer
from hf_cnllm.models.chatglm.tokenization_chatglm import ChatGLMTokenizer
from hf_cnllm.models.glm.tokenization_glm import GLMChineseTokenizer
from hf_cnllm.models.qwen.tokenization_qwen import QWenTokenizer

REPOSITORY = Path(__file__).parents[1]
SMALL = REPOSITORY / "tests" / "fixtures" / "tokenizers" / "vocab"
# Name of the vocabulary -> our class and transformers' own of the same kind.
SUBJECTS = {
    "baichuan1": (BaichuanTokenizer, LlamaTokenizer),
    "baichuan2": (BaichuanTokenizer, LlamaTokenizer),
    "chatglm1": (ChatGLMTokenizer, T5Tokenizer),
    "chatglm2": (ChatGLMTokenizer, LlamaTokenizer),
    "chatglm3": (ChatGLMTokenizer, LlamaTokenizer),
    "glm_chinese": (GLMChineseTokenizer, LlamaTokenizer),
    "qwen": (QWenTokenizer, Qwen2Tokenizer),
}


def own_of_transformers(own, ours):
    """transformers' tokenizer with the vocabulary of ours."""
    model = json.loads(ours.backend_tokenizer.to_str())["model"]
    if own is T5Tokenizer:
        return own(vocab=[tuple(entry) for entry in model["vocab"]], extra_ids=0)
    return own(vocab=model["vocab"], merges=[tuple(merge) for merge in model["merges"]], unk_token=model["unk_token"])


def library_of(ours):
    """Texts -> ids, by the library itself."""
    if isinstance(ours, QWenTokenizer):
        encode = ours.tokenizer.encode_ordinary
    else:
        encode = SentencePieceProcessor(model_file=ours.vocab_file).encode
    return lambda texts: [encode(text) for text in texts]


def seconds(run, texts) -> float:
    start = time.process_time()
    run(texts)
    return time.process_time() - start


def slope(run, text: str, longest: int, rounds: int) -> float:
    """Of the logarithm of the time over that of the length, by least squares; short texts run often enough to be timed."""
    sizes = [10_000 * 10**step for step in range(int(math.log10(longest / 10_000)) + 1)]
    points = []
    for size in sizes:
        part = (text * (size // len(text) + 1))[:size]
        copies = [part] * max(1, 100_000 // size)
        best = min(seconds(run, copies) for _ in range(rounds if size < 1_000_000 else 2))
        points.append((math.log(size), math.log(best / len(copies))))
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)


def read_documents(paths: list[Path], size: int, most: int) -> list[str]:
    texts = [path.read_text(encoding="utf-8") for path in paths]
    pieces = (text[at : at + size] for text in texts for at in range(0, len(text), size))
    return list(islice(pieces, most))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabularies", type=Path, help="a folder with one folder for each vocabulary")
    parser.add_argument("--families", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--documents", nargs="+", type=Path, help="text files")
    parser.add_argument("--document-length", type=int, default=2_000, metavar="CHARACTERS")
    parser.add_argument("--most", type=int, default=400, metavar="DOCUMENTS")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--longest", type=int, default=1_000_000, metavar="CHARACTERS", help="0: no slope")
    arguments = parser.parse_args()
    paths = arguments.documents or [
        *sorted(REPOSITORY.glob("*.zh.md")),
        *sorted(REPOSITORY.glob("docs/*.md")),
        *sorted(REPOSITORY.glob("src/hf_cnllm/**/*.py")),
    ]
    texts = read_documents(paths, arguments.document_length, arguments.most)
    print(f"{len(texts)} documents, {sum(map(len, texts)):,} characters; thousand tokens a second, one thread\n")
    print(
        "| vocabulary | library | ours | by library | first | with offsets | transformers' own | ours by own | slope |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in arguments.families:
        folder = arguments.vocabularies / name if arguments.vocabularies else SMALL / f"{name}_small"
        ours_class, own_class = SUBJECTS[name]
        ours = ours_class.from_pretrained(folder)
        own = own_of_transformers(own_class, ours)
        library = library_of(ours)
        tokens = sum(map(len, library(texts)))
        runs = {
            "library": library,
            "ours": lambda texts, ours=ours: ours(texts, add_special_tokens=False),
            "offsets": lambda texts, ours=ours: ours(texts, add_special_tokens=False, return_offsets_mapping=True),
            "own": lambda texts, own=own: own(texts, add_special_tokens=False),
        }
        first = seconds(runs["ours"], texts)
        best = dict.fromkeys(runs, math.inf)
        for _ in range(arguments.rounds):
            for kind, run in runs.items():
                best[kind] = min(best[kind], seconds(run, texts))
        speed = {kind: tokens / time_ / 1_000 for kind, time_ in best.items()}
        growth = (
            slope(runs["ours"], "".join(texts), arguments.longest, arguments.rounds) if arguments.longest else math.nan
        )
        print(
            f"| {name} | {speed['library']:,.0f} | {speed['ours']:,.0f} | "
            f"{speed['ours'] / speed['library']:.2f} | {tokens / first / 1_000:,.0f} | {speed['offsets']:,.0f} | "
            f"{own_class.__name__} {speed['own']:,.0f} | {speed['ours'] / speed['own']:.2f} | {growth:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
