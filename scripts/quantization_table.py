"""Every quantization method on every family: size, speed, what it costs in perplexity, and whether it can be saved.

    python scripts/quantization_table.py                                   # tiny models, trained for a minute each
    python scripts/quantization_table.py --model PATH --data FILE.jsonl    # a checkpoint of yours
    python scripts/quantization_table.py --families glm --methods torchao-int8 --output outputs/quantization.md

All methods go through `from_pretrained(quantization_config=...)`; what its package is missing for is left out. Perplexity is
that of the assistant's replies in fp32, so that rounding alone changes it, and the tiny models' in conversations that they
were trained on: they know nothing else. Time is processor time of greedy decoding, by that of the floats (run it with
OMP_NUM_THREADS=1). docs/quantization.md reads a run.
"""

import argparse
import contextlib
import importlib.util
import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from hf_cnllm import ChatGLMQuantizationConfig
from hf_cnllm.cli.quantize import linear_layers
from hf_cnllm.demo.dataset import split_data
from hf_cnllm.demo.tasks import ChatTask, load_task
from hf_cnllm.demo.tiny_checkpoints import TINY_FAMILIES, write_tiny_checkpoint
from hf_cnllm.families import family_of

TRAINING_STEPS = 60
WIDTH = 256
NEW_TOKENS = 32
ROUNDS = 5


class Method(NamedTuple):
    """One way to quantize.

    Attributes:
        package: what must be installed, as Python names it; None: hf_cnllm has it.
        make_config: makes the `quantization_config`.
        only: the tiny checkpoints it is for; empty: all.
    """

    package: str | None
    make_config: Callable[[], Any]
    only: tuple[str, ...] = ()


def _torchao(name: str, **options: Any) -> transformers.TorchAoConfig:
    from torchao import quantization

    return transformers.TorchAoConfig(getattr(quantization, name)(**options))


def _nf4() -> transformers.BitsAndBytesConfig:
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )


GLM_LINE = ("chatglm", "chatglm2", "chatglm3", "glm")
METHODS = {
    "bitsandbytes-8bit": Method("bitsandbytes", lambda: transformers.BitsAndBytesConfig(load_in_8bit=True)),
    "bitsandbytes-nf4": Method("bitsandbytes", _nf4),
    "torchao-int8": Method("torchao", lambda: _torchao("Int8WeightOnlyConfig")),
    "torchao-int8-dynamic": Method("torchao", lambda: _torchao("Int8DynamicActivationInt8WeightConfig")),
    "quanto-int8": Method("optimum.quanto", lambda: transformers.QuantoConfig(weights="int8")),
    "quanto-int4": Method("optimum.quanto", lambda: transformers.QuantoConfig(weights="int4")),
    "chatglm-int8": Method(None, lambda: ChatGLMQuantizationConfig(bits=8), GLM_LINE),
    "chatglm-int4": Method(None, lambda: ChatGLMQuantizationConfig(bits=4), GLM_LINE),
}


def is_installed(package: str | None) -> bool:
    """Whether a method's package is there."""
    try:
        return package is None or importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package in front of the dot
        return False


def size(model: nn.Module) -> int:
    """Bytes of all that a model stores, the parts of quantized tensors and their scales included."""

    def of(tensor: torch.Tensor) -> int:
        if hasattr(tensor, "__tensor_flatten__"):
            return sum(of(getattr(tensor, name)) for name in tensor.__tensor_flatten__()[0])
        return tensor.numel() * tensor.element_size()

    values = model.state_dict(keep_vars=True).values()
    return sum(
        of(value) for value in {id(value): value for value in values if isinstance(value, torch.Tensor)}.values()
    )


class Figures(NamedTuple):
    """One line of the table."""

    family: str
    method: str
    linears: str
    size: str
    seconds: str
    perplexity: str
    reload: str


@torch.no_grad()
def perplexity(task: ChatTask, conversations: list) -> float:
    """Of the replies, over all of their tokens."""
    batch = task.collate([task.example(conversation) for conversation in conversations])
    return math.exp(task.model.eval()(**batch.to(task.model.device)).loss.item())


def seconds_to_generate(task: ChatTask, conversations: list) -> float:
    """Median processor time of greedy decoding."""
    prompts, times = task.prompts(conversations[:1]).to(task.model.device), []
    for _ in range(ROUNDS + 1):
        since = time.process_time()
        task.model.generate(**prompts, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False)
        times.append(time.process_time() - since)
    return median(times[1:])


def widen(tiny: Path, folder: Path) -> None:
    """A tiny checkpoint with random layers of round widths: methods work on blocks of 32 to 128 weights."""
    config = transformers.AutoConfig.from_pretrained(tiny, hidden_size=WIDTH, num_attention_heads=WIDTH // 32)
    for name in ("intermediate_size", "inner_hidden_size", "ffn_hidden_size"):
        if hasattr(config, name):
            setattr(config, name, 2 * WIDTH)
    transformers.set_seed(0)
    getattr(transformers, family_of(config).generates_with).from_config(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)


def train(task: ChatTask, conversations: list, learning_rate: float, steps: int) -> None:
    """Enough for weights that are not random."""
    optimizer = torch.optim.AdamW(task.model.parameters(), lr=learning_rate)
    task.model.train()
    for step in range(steps):
        first = 16 * step % (len(conversations) - 16)
        batch = task.collate([task.example(conversation) for conversation in conversations[first : first + 16]])
        task.model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def measure(checkpoint: Path, family: str, methods: list[str], conversations: list) -> Iterator[Figures]:
    """The line of the floats, and one for each method."""
    task = load_task(checkpoint, 512)
    auto_class = getattr(transformers, family_of(task.model.config).generates_with)
    device = task.model.device
    before = size(task.model), seconds_to_generate(task, conversations), perplexity(task, conversations)
    floats = sum(linear_layers(task.model).values())
    yield Figures(family, "float32", f"0 of {floats}", f"{before[0] / 1e6:.2f} MB", "1.00", f"{before[2]:.3f}", "")
    for name in methods:
        method = METHODS[name]
        if method.only and family not in method.only:
            continue
        task.model = auto_class.from_pretrained(
            checkpoint, quantization_config=method.make_config(), dtype=torch.float32, device_map=str(device)
        )
        task.model.generation_config.eos_token_id = task.end_token_ids if hasattr(task, "end_token_ids") else None
        # Both before the first forward pass: on some CPUs bitsandbytes then packs 4-bit weights anew, and spoils them when
        # it is asked for them.
        stored, reload = size(task.model), save_and_reload(task, auto_class, conversations)
        after = stored, seconds_to_generate(task, conversations), perplexity(task, conversations)
        layers = linear_layers(task.model)
        yield Figures(
            family,
            name,
            f"{sum(not is_float for is_float in layers.values())} of {len(layers)}",
            f"{after[0] / 1e6:.2f} MB ({after[0] / before[0]:.2f})",
            f"{after[1] / before[1]:.2f}",
            f"{after[2]:.3f} ({after[2] / before[2] - 1:+.1%})",
            reload,
        )


def save_and_reload(task: ChatTask, auto_class: type, conversations: list) -> str:
    """What comes back: the same logits, others, or what the save ended with."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            task.model.save_pretrained(folder)
        except ValueError as error:
            return "refused by transformers" if "not serializable" in str(error) else f"failed: {error}"
        logits, quantized = task.logits(conversations[:4]), task.model
        task.model = auto_class.from_pretrained(folder, device_map=str(quantized.device))
        again, task.model = task.logits(conversations[:4]), quantized
    same = torch.equal(logits, again)
    return "identical" if same else f"logits differ by {(logits - again).abs().max().item():.1e}"


def as_markdown(lines: list[Figures]) -> str:
    """The table."""
    titles = (
        "family",
        "method",
        "linears quantized",
        "size (ratio)",
        "time",
        "perplexity (change)",
        "saved, reloaded",
    )
    rows = [titles, ("---",) * len(titles), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=TINY_FAMILIES, default=list(TINY_FAMILIES))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--model", type=Path, help="a checkpoint of yours in place of tiny ones")
    parser.add_argument(
        "--data", type=Path, help="conversations that perplexity is measured on, one JSON object a line"
    )
    parser.add_argument("--steps", type=int, default=TRAINING_STEPS, help="training of the tiny models")
    parser.add_argument("--output", type=Path, help="file for the table")
    args = parser.parse_args(arguments)
    missing = sorted({METHODS[name].package for name in args.methods if not is_installed(METHODS[name].package)})
    if missing:
        print(f'Left out, not installed: {", ".join(missing)} (pip install "hf-cnllm[quantize]")')
    methods = [name for name in args.methods if is_installed(METHODS[name].package)]
    split, lines = split_data(args.data, seed=0), []
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for family in ["yours"] if args.model else args.families:
        with contextlib.ExitStack() as stack:
            checkpoint = args.model
            if checkpoint is None:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                write_tiny_checkpoint(family, folder / "tiny")
                widen(folder / "tiny", folder / "random")
                task = load_task(folder / "random", 512)
                train(task, split.train, TINY_FAMILIES[family][1].learning_rate, args.steps)
                checkpoint = folder / "trained"
                task.model.save_pretrained(checkpoint)
                task.tokenizer.save_pretrained(checkpoint)
            for figures in measure(checkpoint, family, methods, split.train[:64]):
                print(*figures, sep="  ", flush=True)
                lines.append(figures)
    table = as_markdown(lines)
    print(table)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(table + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
