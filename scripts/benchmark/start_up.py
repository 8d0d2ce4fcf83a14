"""What a user waits for before the first token: importing the package, loading a checkpoint; and tokenisation."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from .measure import CLOCKS, take_turns
from .subjects import Shape, Subject, auto_class_for, llama_config
from .tasks import Row, Work

CPU = torch.device("cpu")
TEXT_COPIES = 4  # of the embedded instruction set in a batch for the tokenizers

# Imports every module from elsewhere that the package imports, then times the package on top of them.
IMPORT_PROBE = """
import importlib, sys, time
clock = time.{clock}
start = clock()
for name in {modules}:
    try:
        importlib.import_module(name)
    except ImportError:
        pass
middle = clock()
import hf_cnllm
print(middle - start, clock() - middle)
"""
LIST_PROBE = "import sys, hf_cnllm; print(*(m for m in sys.modules if m.partition('.')[0] != 'hf_cnllm'))"


def measure_import(work: Work) -> Iterator[Row]:
    """Seconds that `import hf_cnllm` adds to importing the same pieces of torch, transformers and the rest."""
    modules = _python(LIST_PROBE).split()
    probe = IMPORT_PROBE.format(modules=modules, clock=CLOCKS[work.clock].__name__)
    probes = [_python(probe).split() for _ in range(work.rounds)]
    pieces, package = ([float(probe[i]) for probe in probes] for i in range(2))
    yield Row(
        task="import",
        family="hf_cnllm",
        setting="beyond what it imports",
        value=min(package),
        reference="what it imports",
        reference_value=min(pieces),
        rounds={"hf_cnllm": package, "what it imports": pieces},
    )


def _python(code: str) -> str:
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if result.returncode:
        raise OSError(f"importing hf_cnllm failed: {result.stderr.strip().splitlines()[-1]}")
    return result.stdout


def measure_load(name: str, subject: Subject, shape: Shape, dtype: str, work: Work) -> Iterator[Row]:
    """`from_pretrained` of a checkpoint on disk that the system has read before."""
    loads = {}
    with tempfile.TemporaryDirectory() as folder:
        for key, config in {name: subject.config(shape), "llama": llama_config(subject, shape)}.items():
            auto_class = auto_class_for(config)
            auto_class.from_config(config, dtype=getattr(torch, dtype)).save_pretrained(Path(folder, key))
            loads[key] = _load(auto_class, Path(folder, key), dtype)
        times = take_turns(loads, work.rounds, CPU, CLOCKS[work.clock])
        size = sum(file.stat().st_size for file in Path(folder, name).glob("*.safetensors"))
    yield Row.from_times(
        times, name, "llama", task="load", family=name, dtype=dtype, setting=f"{size / 2**20:.0f} MiB checkpoint"
    )


def _load(auto_class: Any, folder: Path, dtype: str) -> Callable[[], None]:
    def load() -> None:
        auto_class.from_pretrained(folder, dtype=getattr(torch, dtype))

    return load


def measure_tokenizer(name: str, subject: Subject, vocabularies: Path | None, work: Work) -> Iterator[Row]:
    """A batch of Chinese and English texts through the tokenizer, beside the library the original ran on."""
    from ..data.conversations import load_instructions
    from ..demo.dataset import SIGN_OFFS
    from ..demo.families import write_tiny_checkpoint

    texts = [message["content"] for conversation in load_instructions() for message in conversation]
    with tempfile.TemporaryDirectory() as scratch:
        if vocabularies is not None:
            folder, kind = vocabularies / subject.vocabulary, "real vocabulary"
            if not folder.is_dir():
                raise FileNotFoundError(f"--vocabularies: there is no folder {folder}")
        else:
            folder, kind = Path(scratch, "checkpoint"), "tiny vocabulary"
            write_tiny_checkpoint(subject.tiny_vocabulary, folder, [*texts, *SIGN_OFFS.values()])
        texts = texts * TEXT_COPIES
        tokenizer = AutoTokenizer.from_pretrained(folder)

        def tokenize() -> None:
            tokenizer(texts)

        runs = {name: tokenize}
        reference = _original_engine(folder, texts)
        if reference is not None:
            runs["original"] = reference
        times = take_turns(runs, work.rounds, CPU, CLOCKS[work.clock])
    characters = sum(map(len, texts))
    comparison: dict[str, Any] = {}
    if reference is not None:
        comparison = {
            "reference": "sentencepiece or tiktoken",
            "reference_value": characters / times.best("original") / 1e6,
            "ratio": times.ratio(name, "original"),
            "spread": times.spread(name, "original"),
        }
    yield Row(
        task="tokenizer",
        family=name,
        setting=f"{len(texts)} texts, {kind}",
        value=characters / times.best(name) / 1e6,
        unit="M characters/s",
        rounds=times.seconds,
        **comparison,
    )


def _original_engine(folder: Path, texts: list[str]) -> Callable[[], None] | None:
    """The library under the original tokenizer, called as it was; what it did besides in Python is left out."""
    model_file = next(folder.glob("*.model"), None)
    if model_file is not None:
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=str(model_file))

        def encode_pieces() -> None:
            for text in texts:
                [processor.piece_to_id(piece) for piece in processor.encode(text, out_type=str)]

        return encode_pieces
    try:
        import tiktoken
        from tiktoken.load import load_tiktoken_bpe
    except ImportError:
        return None
    pattern = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ranks = load_tiktoken_bpe(str(next(folder.glob("*.tiktoken"))))
    encoding = tiktoken.Encoding("qwen", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    def encode_bytes() -> None:
        for text in texts:
            encoding.encode_ordinary(text)

    return encode_bytes
