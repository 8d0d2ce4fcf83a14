"""`hf-cnllm info PATH`: what a checkpoint is, what it takes in memory and what it runs with. Reads its configuration alone."""

import argparse
import importlib.util
from collections.abc import Iterator

from .checkpoint import Checkpoint, NotOurs, read_checkpoint
from .memory import Sizes, in_words, sizes_of, stored_bytes

CONTEXTS = (2048, 8192, 32768)
KINDS = {"float32": (32, 4), "bfloat16, float16": (16, 2), "8-bit weights": (8, 2), "4-bit weights": (4, 2)}
BACKENDS = {
    # name: (the class's own word for it, the package it needs)
    "sdpa": ("_supports_sdpa", None),
    "flex_attention": ("_supports_flex_attn", None),
    "flash_attention_2": ("_supports_flash_attn", "flash_attn"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("path", metavar="PATH", help="folder of a checkpoint or of an adapter, or its name on the Hub")


def run(args: argparse.Namespace) -> int:
    """Print one thing a line."""
    try:
        rows = dict(_rows(read_checkpoint(args.path)))
    except NotOurs as other:
        rows = {"family": str(other)}
    width = max(map(len, rows))
    print("\n".join(f"{name:<{width}}  {value}" for name, value in rows.items()))
    return 0


def _rows(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    config, family = checkpoint.config, checkpoint.family
    if checkpoint.adapter:
        yield "adapter for", checkpoint.name
    yield "family", family.line_of(config)
    yield "trained length", f"{family.trained_length(config):,} tokens"
    for name, decide in family.decisions.items():
        yield name, str(decide(config))
    yield "vocabulary", f"{config.vocab_size} tokens"
    yield from _memory(sizes_of(config), config)
    yield from _support(checkpoint)


def _memory(sizes: Sizes, config) -> Iterator[tuple[str, str]]:
    yield "parameters", f"{sizes.parameters:,} ({sizes.parameters / 1e9:.2f} billion)"
    if config.dtype is not None:
        yield "stored in", str(config.dtype).removeprefix("torch.")
    kinds = {name: (sizes.weight_bytes(*kind), kind[1]) for name, kind in KINDS.items()}
    if (stored := stored_bytes(config)) is not None:
        kinds = {"as it is": (stored, 2)}
    for name, (weights, dtype_bytes) in kinds.items():
        totals = (f"{in_words(weights + sizes.cache_bytes(n, dtype_bytes))} with {n:,} tokens" for n in CONTEXTS)
        yield name, f"{in_words(weights)}; {', '.join(totals)}"


def _support(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    family, kind = checkpoint.family, checkpoint.family.architectures[checkpoint.architecture]
    model = family.models[family.generates_with]
    if variant := getattr(model, "for_config", None):
        model = variant(type(checkpoint.config))
    is_causal, is_prefix = family.generates_with == "AutoModelForCausalLM", bool(kind.prompt_end)
    backends = ["eager"]
    for name, (flag, package) in BACKENDS.items():
        if getattr(model, flag, False):
            is_missing = package is not None and importlib.util.find_spec(package) is None
            backends.append(f"{name} (needs {package}, which is not installed here)" if is_missing else name)
    yield "attention", ", ".join(backends)
    yield "auto classes", ", ".join(family.models)
    uses = ["continues texts"] * is_causal + ["fills blanks"] * is_prefix
    yield "generate", f"{family.generates_with}: {' and '.join(uses)}"
    yield "PEFT", f"LoRA on {', '.join(family.config.adapter_targets.attention)} unless told otherwise"
    yield "TRL", "trainers of causal models" if is_causal else "no: it trains causal models. Use Trainer"
    yield "vLLM", kind.vllm
