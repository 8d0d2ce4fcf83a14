"""Throughput of the models for vLLM beside vLLM's own Llama of equal shape, in one process.

    python scripts/benchmark_vllm.py [--subjects baichuan-rope qwen …] [--layers 4 --hidden 1024 --heads 16] [--rounds 5]

Weights are random. Prefill is `--prompts` prompts of `--length` tokens with one new token each, decoding `--prompts` prompts of
one token with `--new` each. Rounds alternate between the two models, and once each of them is made first, since the engine made
second can be faster by a tenth. What is printed is Llama's time divided by the subject's, the median of neighboring rounds
and the geometric mean of both orders: 1.00 is as fast. Times are those of the processor, so that others on the machine
count little; on a GPU, which works by itself, those of the clock.
"""

import argparse
import os
import tempfile
import time
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_cnllm.families import Shape, family_with

DEFAULTS = {"hidden": 1024, "layers": 4, "heads": 16, "prompts": 8, "length": 512, "new": 64, "rounds": 5}
SUBJECTS = ("baichuan-rope", "baichuan-alibi", "qwen", "chatglm2")


def write_models(folder: Path, subject: str, shape: Shape, longest: int) -> None:
    """Both models' checkpoints. Of ChatGLM2, Llama gets the number of key/value heads."""
    lengths = {"seq_length": longest} if subject == "chatglm2" else {}
    config = family_with(subject).make_config(subject, shape, **lengths)
    llama = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=config.num_key_value_heads if subject == "chatglm2" else shape.heads,
        max_position_embeddings=longest,
        architectures=["LlamaForCausalLM"],
    )
    for name, made in (("subject", config), ("llama", llama)):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(made).save_pretrained(folder / name)


def measure(llm: Any, clock: Any, prompts: int, length: int, new: int) -> float:
    """Seconds for that many prompts of `length` tokens and `new` tokens after each."""
    from vllm import SamplingParams

    inputs = [{"prompt_token_ids": torch.randint(100, 1000, (length,)).tolist()} for _ in range(prompts)]
    parameters = SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    start = clock()
    llm.generate(inputs, parameters, use_tqdm=False)
    return clock() - start


def compare(arguments: argparse.Namespace, subject: str, folder: Path) -> str:
    shape = Shape(arguments.hidden, arguments.layers, arguments.heads, 11 * arguments.hidden // 4, 8192)
    write_models(folder, subject, shape, longest=max(arguments.length, arguments.new) + 32)
    orders = [race(arguments, folder, order) for order in (("llama", "subject"), ("subject", "llama"))]
    line = f"{subject:15}"
    for task in orders[0]:
        ratios = [median(llama / own for llama, own in zip(*order[task].values(), strict=True)) for order in orders]
        fastest = min(min(order[task]["subject"]) for order in orders)
        tokens = arguments.prompts * {"prefill": arguments.length, "decode": arguments.new}[task]
        line += f" {task} {geometric_mean(ratios):.2f}x ({tokens / fastest:,.0f} tokens/s)"
    return line


def race(arguments: argparse.Namespace, folder: Path, order: tuple[str, str]) -> dict[str, dict[str, list[float]]]:
    """Seconds of every round, by task and then by model, "llama" first; the engines are made in `order`."""
    from vllm import LLM

    options = {
        "dtype": arguments.dtype,
        "max_model_len": max(arguments.length, arguments.new) + 32,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
        "enforce_eager": arguments.eager,
        "max_num_seqs": arguments.prompts,
    }
    engines = {name: LLM(str(folder / name), **options) for name in order}
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    taken: dict[str, dict[str, list[float]]] = {}
    for task, length, new in (("prefill", arguments.length, 1), ("decode", 1, arguments.new)):
        seconds = taken[task] = {"llama": [], "subject": []}
        for round_ in range(arguments.rounds + 1):
            for name in sorted(engines, reverse=round_ % 2 == 1):
                measured = measure(engines[name], clock, arguments.prompts, length, new)
                if round_:  # the first one warms up
                    seconds[name].append(measured)
    for llm in engines.values():
        llm.llm_engine.engine_core.shutdown()
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=SUBJECTS)
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="do not compile the models")
    arguments = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    for subject in arguments.subjects:
        with tempfile.TemporaryDirectory() as folder:
            print(compare(arguments, subject, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
