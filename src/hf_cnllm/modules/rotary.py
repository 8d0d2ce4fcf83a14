"""Rotary position embeddings that several families share (RoFormer, arXiv 2104.09864).

The half-split form, where dimension i turns with dimension i + d/2, is transformers' own Llama code.
"""

from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding as RotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, rotate_half


__all__ = ["RotaryEmbedding", "apply_rotary_pos_emb", "rotate_half"]
