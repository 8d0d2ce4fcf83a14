"""Qwen v1 for vLLM: LogN, windows, and dynamic NTK with each request's own factor.

A request's factor follows from the length of its prompt, which `forward` never sees. So the rotary table holds a block of
`max_model_len` rows for each factor, one below the other, and the position of a token is its row: `get_mrope_input_positions`,
which sees each prompt once, moves a request's positions into the block of its factor, and all that it generates follows.
"""

import math
from functools import partial

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.model_executor.models.interfaces import SupportsMRoPE

from ..attention.logn import logn_scale
from ..models.qwen.dynamic_ntk import inverse_frequencies, ntk_alpha
from ._compat import WeightsMapper
from .decoder import DecoderForCausalLM, Plan
from .served import needs_ntk


def ntk_block(length: int, seq_length: int) -> int:
    """Which block of the table is for prompts of `length` tokens: the number of doublings of `seq_length` that hold them."""
    return max(0, math.ceil(math.log2(length / seq_length)))


class NtkRotaryEmbedding(RotaryEmbedding):
    """Half-split RoPE with `blocks` tables of `longest` rows, for prompts of up to 1, 2, 4, … times the trained length."""

    def __init__(self, head_dim: int, rotary_dim: int, base: float, longest: int, blocks: int):
        self.longest, self.blocks = longest, blocks
        super().__init__(head_dim, rotary_dim, longest * blocks, base, True, torch.get_default_dtype())

    def _compute_cos_sin_cache(self) -> torch.Tensor:
        alphas = [ntk_alpha(2**block, 1) for block in range(self.blocks)]
        inv_freq = inverse_frequencies(self.rotary_dim, self.base, alphas)
        angles = (torch.arange(self.longest, dtype=torch.float32)[:, None] * inv_freq[:, None]).flatten(0, 1)
        return torch.cat((angles.cos(), angles.sin()), dim=-1)


def query_scale(longest: int, seq_length: int, rows: torch.Tensor) -> torch.Tensor:
    """LogN's factors [tokens, 1] for `rows` [tokens] of a table with blocks of `longest`."""
    return logn_scale((rows % longest)[None], seq_length)[0, 0]


class QWenLMHeadModel(DecoderForCausalLM, SupportsMRoPE):
    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "transformer.wte.": "model.embed_tokens.",
            "transformer.h.": "model.layers.",
            "transformer.ln_f.": "model.norm.",
        },
        orig_to_new_substr={
            ".attn.c_attn.": ".self_attn.qkv_proj.",
            ".attn.c_proj.": ".self_attn.o_proj.",
            ".mlp.c_proj.": ".mlp.down_proj.",
            ".ln_1.": ".input_layernorm.",
            ".ln_2.": ".post_attention_layernorm.",
        },
        orig_to_new_stacked={".w2.": (".gate_up_proj.", 0), ".w1.": (".gate_up_proj.", 1)},
    )
    packed_modules_mapping = {"qkv_proj": ["qkv_proj"], "gate_up_proj": ["w2", "w1"]}
    # Buffers of the originals.
    ignored_suffixes = ("rotary_emb.inv_freq", ".attn.logn_tensor", ".attn.masked_bias", ".attn.bias")

    def plan(self, vllm_config: VllmConfig) -> Plan:
        config, longest = self.config, vllm_config.model_config.max_model_len
        self.longest = longest
        blocks = 1 + (ntk_block(longest, config.seq_length) if needs_ntk(config, longest) else 0)
        has_logn = config.use_logn_attn and longest > config.seq_length
        return Plan(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_attention_heads,
            head_dim=config.kv_channels,
            ffn_size=config.intermediate_size // 2,
            norm_eps=config.layer_norm_epsilon,
            qkv_bias=True,
            bias=not config.no_bias,
            rotary=NtkRotaryEmbedding(config.kv_channels, config.rotary_dim, config.rotary_emb_base, longest, blocks),
            query_scale=partial(query_scale, longest, config.seq_length) if has_logn else None,
            windows=config.window_sizes,
        )

    def get_mrope_input_positions(self, input_tokens: list[int], *args, **kwargs) -> tuple[torch.Tensor, int]:
        """Rows of the table for a prompt [3, tokens], and how far ahead of their positions the tokens after it are."""
        first = self.longest * ntk_block(len(input_tokens), self.config.seq_length)
        return torch.arange(first, first + len(input_tokens)).expand(3, -1), first
