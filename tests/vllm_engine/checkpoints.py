"""Checkpoints for vLLM's tests: the goldens' own configurations, with heads of 32, which is the smallest that vLLM has on a
CPU, and random weights large enough for attention to decide which token comes next."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import hf_cnllm  # noqa: F401
from goldens import GOLDENS

HEAD_DIM = 32
NEW_TOKENS = 24
TRAINED = 64  # tokens that Qwen is trained on here
LENGTHS = (5, 60, 64, 65, 100, 200, 300)  # of the prompts
LONGEST = 512

# Golden -> number of heads, and what else is changed in its config.json.
SUBJECTS: dict[str, tuple[int, dict[str, Any]]] = {
    "baichuan_7b": (4, {"max_position_embeddings": LONGEST}),
    "baichuan_13b": (5, {"model_max_length": LONGEST}),
    "baichuan2_7b": (6, {"max_position_embeddings": LONGEST, "model_max_length": LONGEST}),
    "baichuan2_13b": (6, {"model_max_length": LONGEST}),
    "qwen": (4, {"seq_length": TRAINED, "max_position_embeddings": LONGEST}),
    "qwen_early": (3, {"seq_length": TRAINED, "n_positions": LONGEST}),
    "qwen_bias": (3, {"seq_length": TRAINED, "max_position_embeddings": LONGEST}),
    "qwen_72b": (4, {"seq_length": LONGEST, "max_position_embeddings": LONGEST}),
    "chatglm2_6b": (6, {"seq_length": LONGEST}),
    "chatglm2_6b_32k": (6, {"seq_length": LONGEST}),
    "chatglm3_6b": (4, {"seq_length": LONGEST}),
    "chatglm3_6b_32k": (6, {"seq_length": LONGEST}),
}


def write_checkpoint(golden: str, folder: Path, **changes: Any) -> Path:
    """The golden's config.json in the sizes of `SUBJECTS`, with `changes`, and weights drawn at random."""
    heads, own = SUBJECTS[golden]
    config = json.loads((GOLDENS / golden / "config.json").read_text(encoding="utf-8"))
    width = "n_embd" if "n_embd" in config else "hidden_size"
    count = "n_head" if "n_head" in config else "num_attention_heads"
    config |= {width: heads * HEAD_DIM, count: heads, "initializer_range": 0.15, **own, **changes}
    if "kv_channels" in config:
        config["kv_channels"] = HEAD_DIM
    config.pop("auto_map", None)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config)
    (folder / "config.json").write_text(text, encoding="utf-8")
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(text, encoding="utf-8")
    return folder


def make_prompts(seed: int = 1, lengths: tuple[int, ...] = LENGTHS) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 148, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def greedy(model: Any, prompts: list[list[int]], **options: Any) -> list[list[int]]:
    """What transformers' `generate` goes on with, prompt by prompt."""
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0, **options}
    return [model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]
