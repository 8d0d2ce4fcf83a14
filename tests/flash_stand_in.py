"""flash-attn 2 in plain PyTorch: the same signatures and the same mathematics, for machines without a GPU.

Semantics from flash-attn's documentation: causal masks end at the last query and the last key (version 2.1 and later),
ALiBi adds −slope·|i + keys − queries − j|, a window (left, right) keeps keys from i + keys − queries − left to
i + keys − queries + right, and rows that see nothing are 0.
"""

import math
import types

import torch


def _attend(q, k, v, softmax_scale, causal, window_size, alibi_slopes):
    """One sequence: q [queries, heads, dim], k and v [keys, key_value_heads, dim]."""
    queries, heads, dim = q.shape
    keys, kv_heads, _ = k.shape
    k, v = k.repeat_interleave(heads // kv_heads, 1), v.repeat_interleave(heads // kv_heads, 1)
    scores = torch.einsum("qhd,khd->hqk", q, k).float() * (softmax_scale or 1 / math.sqrt(dim))
    i = torch.arange(queries, device=q.device)[:, None] + keys - queries
    j = torch.arange(keys, device=q.device)[None, :]
    if alibi_slopes is not None:
        assert alibi_slopes.dtype == torch.float32
        scores = scores - alibi_slopes[:, None, None] * (i - j).abs()
    hidden = torch.zeros(queries, keys, dtype=torch.bool, device=q.device)
    if causal:
        hidden |= j > i
    left, right = window_size
    if left >= 0:
        hidden |= j < i - left
    if right >= 0:
        hidden |= j > i + right
    scores = scores.masked_fill(hidden, -math.inf)
    blind = hidden.all(-1)
    weights = scores.masked_fill(blind[None, :, None], 0).softmax(-1).masked_fill(blind[None, :, None], 0)
    return torch.einsum("hqk,khd->qhd", weights.to(v.dtype), v)


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert softcap == 0.0 and dropout_p == 0.0 and not return_attn_probs
    assert q.ndim == k.ndim == v.ndim == 4 and q.dtype == k.dtype == v.dtype
    return torch.stack(
        [_attend(*row, softmax_scale, causal, window_size, alibi_slopes) for row in zip(q, k, v, strict=True)]
    )


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    assert softcap == 0.0 and dropout_p == 0.0 and not return_attn_probs and block_table is None
    assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert cu_seqlens_q[-1] == q.shape[0] and cu_seqlens_k[-1] == k.shape[0]
    outputs = []
    for index in range(len(cu_seqlens_q) - 1):
        queries = slice(cu_seqlens_q[index], cu_seqlens_q[index + 1])
        keys = slice(cu_seqlens_k[index], cu_seqlens_k[index + 1])
        assert queries.stop - queries.start <= max_seqlen_q and keys.stop - keys.start <= max_seqlen_k
        outputs.append(_attend(q[queries], k[keys], v[keys], softmax_scale, causal, window_size, alibi_slopes))
    return torch.cat(outputs)


def module() -> types.ModuleType:
    """What `import flash_attn` gives."""
    stand_in = types.ModuleType("flash_attn")
    stand_in.flash_attn_func = flash_attn_func
    stand_in.flash_attn_varlen_func = flash_attn_varlen_func
    stand_in.__version__ = "2.8.3"
    return stand_in
