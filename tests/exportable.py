"""Tiny checkpoints of every kind that `hf-cnllm export` takes."""

import shutil
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_cnllm.families import Shape, family_with
from tokenizer_goldens import TokenizerGolden


class Kind(NamedTuple):
    """A checkpoint that has an equivalent, and which."""

    vocabulary: str
    architecture: str
    target: str
    fields: dict = {}
    dtype: torch.dtype = torch.float32


IDS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
BAICHUAN2 = {"norm_head": True, "tokenizer_class": "BaichuanTokenizer"}
LONG = {"rope_ratio": 8, "rope_ratio_type": "linear"}
KINDS = {
    "baichuan": Kind("baichuan1_small", "baichuan-rope", "llama"),
    "baichuan2": Kind("baichuan2_small", "baichuan-rope", "llama", BAICHUAN2),
    "baichuan2-bf16": Kind("baichuan2_small", "baichuan-rope", "llama", BAICHUAN2, torch.bfloat16),
    "baichuan2-13b": Kind("baichuan2_small", "baichuan-alibi", "baichuan", BAICHUAN2),
    "qwen": Kind("qwen_small", "qwen", "qwen2", IDS),
    "qwen-72b": Kind(
        "qwen_small", "qwen", "qwen2", IDS | {"use_dynamic_ntk": False, "use_logn_attn": False, "rotary_emb_base": 1e6}
    ),
    "chatglm2": Kind("chatglm2_small", "chatglm2", "glm", {"add_qkv_bias": True}),
    "chatglm2-32k": Kind("chatglm2_small", "chatglm2", "glm", LONG, torch.float16),
    "chatglm2-mha": Kind("chatglm2_small", "chatglm2", "glm", {"multi_query_attention": False}),
    "chatglm3": Kind("chatglm3_small", "chatglm2", "glm"),
    "chatglm2-llama": Kind("chatglm2_small", "chatglm2", "llama", {"add_qkv_bias": True}),
    "chatglm2-mha-llama": Kind("chatglm2_small", "chatglm2", "llama", {"multi_query_attention": False}),
    "chatglm3-32k": Kind("chatglm3_small", "chatglm2", "glm", LONG | {"rope_ratio_type": "base"}),
    "chatglm3-32k-llama": Kind("chatglm3_small", "chatglm2", "llama", LONG | {"rope_ratio_type": "base"}),
}


def write_checkpoint(kind: Kind, folder: Path, std: float = 0.3, head_dim: int = 8) -> Path:
    """In the layout that this package saves, with random weights large enough to tell rows from each other."""
    vocabulary = TokenizerGolden(kind.vocabulary).vocabulary
    shutil.copytree(vocabulary, folder, ignore=shutil.ignore_patterns("*.json.gz"))
    tokens = len(AutoTokenizer.from_pretrained(folder))
    shape = Shape(hidden_size=4 * head_dim, layers=2, heads=4, ffn_size=48, vocab_size=tokens + 16)
    model = AutoModelForCausalLM.from_config(
        family_with(kind.architecture).make_config(kind.architecture, shape, **kind.fields)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.ndim == 1), std=std, generator=generator)
    model.to(kind.dtype).save_pretrained(folder)
    return folder
