"""What a user waits for before the first token: importing the package, loading a checkpoint; and tokenization."""

import os
import statistics
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from hf_cnllm.data.conversations import load_instructions
from hf_cnllm.demo.tiny_checkpoints import write_tiny_checkpoint
from hf_cnllm.models.qwen.tiktoken_bpe import PRETOKENIZE_REGEX

from .measure import CLOCKS, take_turns
from .subjects import Subject, auto_class_for, llama_config
from .tasks import Row

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


def measure_import(work: Namespace) -> Iterator[Row]:
    """Seconds that `import hf_cnllm` adds to importing the same pieces of torch, transformers and the rest."""
    modules = _python(LIST_PROBE).split()
    probe = IMPORT_PROBE.format(modules=modules, clock=CLOCKS[work.clock].__name__)
    probes = [_python(probe).split() for _ in range(work.rounds)]
    pieces, package = ([float(probe[i]) for probe in probes] for i in range(2))
    yield Row(
        task="import",
        family="hf_cnllm",
        setting="beyond what it imports",
        value=statistics.median(package),
        reference="what it imports",
        reference_value=statistics.median(pieces),
        rounds={"hf_cnllm": package, "what it imports": pieces},
    )


def _python(code: str) -> str:
    environment = os.environ | {"PYTHONWARNINGS": "ignore"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    if result.returncode:
        raise OSError(f"importing hf_cnllm failed: {result.stderr.strip().splitlines()[-1]}")
    return result.stdout


def measure_load(name: str, subject: Subject, dtype: str, work: Namespace) -> Iterator[Row]:
    """`from_pretrained` of a checkpoint on disk that the system has read before."""
    loads = {}
    with tempfile.TemporaryDirectory() as folder:
        for key, config in {name: subject.config(work.shape), "llama": llama_config(subject, work.shape)}.items():
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


def measure_tokenizer(name: str, subject: Subject, work: Namespace) -> Iterator[Row]:
    """A batch of Chinese and English texts through the tokenizer, beside the library the original ran on."""
    texts = [message["content"] for conversation in load_instructions() for message in conversation]
    with tempfile.TemporaryDirectory() as scratch:
        if work.vocabularies is not None:
            folder, kind = work.vocabularies / subject.vocabulary, "real vocabulary"
        else:
            folder, kind = Path(scratch, "checkpoint"), "tiny vocabulary"
            write_tiny_checkpoint(subject.tiny_vocabulary, folder)
        texts = texts * TEXT_COPIES
        tokenizer = AutoTokenizer.from_pretrained(folder)
        runs = {name: lambda: tokenizer(texts)}
        original = _original_engine(folder, texts)
        if original is not None:
            runs["original"] = original
        times = take_turns(runs, work.rounds, CPU, CLOCKS[work.clock])
    millions = sum(map(len, texts)) / 1e6
    setting = f"{len(texts)} texts, {kind}"
    row = Row("tokenizer", name, setting, value=times.median(name), rounds=times.seconds)
    if original is not None:
        row = Row.from_times(times, name, "original", task=row.task, family=name, setting=setting)
        row = replace(row, reference="sentencepiece or tiktoken", reference_value=millions / row.reference_value)
    yield replace(row, value=millions / row.value, unit="M characters/s")


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
    ranks = load_tiktoken_bpe(str(next(folder.glob("*.tiktoken"))))
    encoding = tiktoken.Encoding("qwen", pat_str=PRETOKENIZE_REGEX, mergeable_ranks=ranks, special_tokens={})

    def encode_bytes() -> None:
        for text in texts:
            encoding.encode_ordinary(text)

    return encode_bytes
