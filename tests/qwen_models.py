"""A small Qwen whose trained length is 32 tokens, and prompts on both sides of it."""

import torch
from transformers import AutoModelForCausalLM

import hf_cnllm  # noqa: F401
from goldens import GOLDENS

WIDTH, LENGTHS = 70, (70, 40, 20)  # trained length 32: the factors are 7, 3 and 1
NEW_TOKENS = 8

WAYS_OF_GENERATING = {
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "chunks within the trained length": {"prefill_chunk_size": 16},
    "chunks past the trained length": {"prefill_chunk_size": 40},
}


def load(name: str = "qwen", backend: str = "sdpa", **overrides):
    model = AutoModelForCausalLM.from_pretrained(GOLDENS / name, attn_implementation=backend, **overrides)
    model.generation_config.pad_token_id = 0
    return model.eval()


def generate(model, ids, mask=None, **kwargs):
    kwargs = {"max_new_tokens": NEW_TOKENS, "do_sample": False, **kwargs}
    return model.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **kwargs)
