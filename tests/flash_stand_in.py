"""flash-attn 2 in plain PyTorch, for machines without a GPU: the signatures, the mathematics and the refusals of 2.8.

Semantics from flash-attn's documentation and its `flash_api.cpp`: causal masks end at the last query and the last key
(version 2.1 and later), ALiBi adds −slope·|i + keys − queries − j|, a window (left, right) keeps keys from
i + keys − queries − left to i + keys − queries + right, and rows that see nothing are 0. Products are summed in fp32, and
probabilities are rounded to the dtype of the values, as on tensor cores.
"""

import importlib.machinery
import math
import sys
import types
from contextlib import contextmanager
from unittest import mock

import torch
from torch.nn import functional as F
from transformers import modeling_flash_attention_utils
from transformers.utils import import_utils


def _check(q, k, v, dropout_p, softcap, alibi_slopes, return_attn_probs, batch):
    """What the real one refuses, in its words."""
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
    if k.dtype != q.dtype:
        raise RuntimeError("query and key must have the same dtype")
    if v.dtype != q.dtype:
        raise RuntimeError("query and value must have the same dtype")
    if q.shape[-1] > 256:
        raise RuntimeError("FlashAttention forward only supports head dimension at most 256")
    if v.shape != k.shape or k.shape[-1] != q.shape[-1]:
        raise RuntimeError(f"k must have the head dimension {q.shape[-1]} and v the shape of k")
    if q.shape[-2] % k.shape[-2]:
        raise RuntimeError("Number of heads in key/value must divide number of heads in query")
    if not 0 <= dropout_p < 1:
        raise RuntimeError("p_dropout must be in [0, 1)")
    if softcap > 0 and dropout_p > 0:
        raise RuntimeError("Softcapping does not support dropout for now")
    if return_attn_probs and dropout_p == 0:
        raise RuntimeError("return_softmax is only supported when p_dropout > 0.0")
    if alibi_slopes is not None:
        if alibi_slopes.dtype != torch.float32:
            raise RuntimeError("ALiBi slopes must have dtype fp32")
        if alibi_slopes.shape not in ((q.shape[-2],), (batch, q.shape[-2])):
            raise RuntimeError(f"ALiBi slopes must have shape ({q.shape[-2]},) or ({batch}, {q.shape[-2]})")


def _attend(q, k, v, slopes, dropout_p, softmax_scale, causal, window_size, softcap):
    """One sequence: q [queries, heads, dim], k and v [keys, key_value_heads, dim], slopes [heads] or None."""
    queries, heads, dim = q.shape
    keys, kv_heads, _ = k.shape
    k, v = k.repeat_interleave(heads // kv_heads, 1), v.repeat_interleave(heads // kv_heads, 1)
    scale = 1 / math.sqrt(dim) if softmax_scale is None else softmax_scale
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    i = torch.arange(queries, device=q.device)[:, None] + keys - queries
    j = torch.arange(keys, device=q.device)[None, :]
    if slopes is not None:
        scores = scores - slopes[:, None, None] * (i - j).abs()
    left, right = window_size
    mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
    if left >= 0:
        mask &= j >= i - left
    if causal or right >= 0:
        mask &= j <= i + (0 if causal else right)
    fully_masked = ~mask.any(-1)[None, :, None]
    weights = (
        scores.masked_fill(~mask, -math.inf).masked_fill(fully_masked, 0).softmax(-1).masked_fill(fully_masked, 0)
    )
    weights = F.dropout(weights, dropout_p).to(v.dtype).float()
    return torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype)


def _slopes_of(alibi_slopes, row):
    return alibi_slopes if alibi_slopes is None or alibi_slopes.ndim == 1 else alibi_slopes[row]


def flash_attn_func(
    q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    if not q.ndim == k.ndim == v.ndim == 4 or q.shape[0] != k.shape[0]:
        raise RuntimeError("q, k and v must be [batch, length, heads, head_dim]")
    _check(q, k, v, dropout_p, softcap, alibi_slopes, return_attn_probs, q.shape[0])
    options = (dropout_p, softmax_scale, causal, window_size, softcap)
    rows = (_attend(q[row], k[row], v[row], _slopes_of(alibi_slopes, row), *options) for row in range(q.shape[0]))
    return torch.stack(list(rows))


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    if cu_seqlens_q.dtype != torch.int32 or cu_seqlens_k.dtype != torch.int32:
        raise RuntimeError("cu_seqlens_q and cu_seqlens_k must have dtype int32")
    if len(cu_seqlens_q) != len(cu_seqlens_k) or cu_seqlens_q[-1] > q.shape[0] or cu_seqlens_k[-1] > k.shape[0]:
        raise RuntimeError("cu_seqlens_q and cu_seqlens_k must be [batch + 1] and end within the tokens")
    if block_table is not None:
        raise RuntimeError("the stand-in has no paged keys for sequences of several lengths")
    _check(q, k, v, dropout_p, softcap, alibi_slopes, return_attn_probs, len(cu_seqlens_q) - 1)
    outputs = []
    for row in range(len(cu_seqlens_q) - 1):
        queries = slice(cu_seqlens_q[row], cu_seqlens_q[row + 1])
        keys = slice(cu_seqlens_k[row], cu_seqlens_k[row + 1])
        # The kernel would leave out what is longer.
        assert queries.stop - queries.start <= max_seqlen_q and keys.stop - keys.start <= max_seqlen_k
        options = (dropout_p, softmax_scale, causal, window_size, softcap)
        outputs.append(_attend(q[queries], k[keys], v[keys], _slopes_of(alibi_slopes, row), *options))
    return torch.cat(outputs)


def flash_attn_with_kvcache(
    q, k_cache, v_cache, k=None, v=None, rotary_cos=None, rotary_sin=None, cache_seqlens=None, cache_batch_idx=None,
    cache_leftpad=None, block_table=None, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
    rotary_interleaved=True, alibi_slopes=None, num_splits=0, return_softmax_lse=False,
):  # fmt: skip
    """Puts `k` and `v` into the cache in place, [batch, room, heads, dim] or pages of it, and attends to what is there."""
    others = (rotary_cos, rotary_sin, cache_batch_idx, cache_leftpad)
    if any(other is not None for other in others) or return_softmax_lse:
        raise RuntimeError("the stand-in has neither rotary embeddings, cache_batch_idx, cache_leftpad nor the lse")
    batch, new = q.shape[0], 0 if k is None else k.shape[1]
    _check(q, k_cache, v_cache, 0.0, softcap, alibi_slopes, False, batch)
    if cache_seqlens is None:
        cache_seqlens = k_cache.shape[1] - new
    if isinstance(cache_seqlens, int):
        cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32)
    outputs = []
    for row in range(batch):
        end = int(cache_seqlens[row]) + new
        page = torch.tensor([row]) if block_table is None else block_table[row].long()
        place = (torch.arange(end) // k_cache.shape[1], torch.arange(end) % k_cache.shape[1])
        place = (page[place[0]], place[1])
        if new:
            k_cache[place[0][-new:], place[1][-new:]] = k[row]
            v_cache[place[0][-new:], place[1][-new:]] = v[row]
        options = (0.0, softmax_scale, causal, window_size, softcap)
        outputs.append(_attend(q[row], k_cache[place], v_cache[place], _slopes_of(alibi_slopes, row), *options))
    return torch.stack(outputs)


# --- flash_attn.bert_padding -----------------------------------------------------------------------------------------


def index_first_axis(tokens, indices):
    return tokens[indices]


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """[batch, length, ...] and its mask -> tokens, their indices, borders [batch + 1], longest, tokens in each row."""
    mask = attention_mask if unused_mask is None else attention_mask + unused_mask
    lengths = mask.sum(dim=-1, dtype=torch.int32)
    indices = mask.flatten().nonzero().flatten()
    borders = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    used = attention_mask.sum(dim=-1, dtype=torch.int32)
    return index_first_axis(hidden_states.flatten(0, 1), indices), indices, borders, lengths.max().item(), used


def pad_input(hidden_states, indices, batch, seqlen):
    output = hidden_states.new_zeros(batch * seqlen, *hidden_states.shape[1:])
    return output.index_copy(0, indices.long(), hidden_states).view(batch, seqlen, *hidden_states.shape[1:])


# --- installing it ---------------------------------------------------------------------------------------------------


def _module(name: str, *members, **attributes) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, loader=None, is_package=True)
    vars(module).update({member.__name__: member for member in members}, **attributes)
    return module


def _availability():
    return import_utils.is_torch_cuda_available, import_utils.is_flash_attn_2_available


def _distributions() -> dict[str, list[str]]:
    if hasattr(import_utils, "_package_distribution_mapping"):
        return import_utils._package_distribution_mapping()
    return import_utils.PACKAGE_DISTRIBUTION_MAPPING  # until 5.22


@contextmanager
def installed():
    """`import flash_attn` gives the stand-in, and transformers takes it for flash-attn 2 on a GPU."""
    padding = _module("flash_attn.bert_padding", index_first_axis, pad_input, unpad_input)
    package = _module(
        "flash_attn", flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache, bert_padding=padding,
        __version__="2.8.3",
    )  # fmt: skip
    modules = {"flash_attn": package, "flash_attn.bert_padding": padding}
    utils = modeling_flash_attention_utils
    loaded = {
        name: None for name in vars(utils) if name.endswith("_fn") and name.startswith(("_flash", "_pad", "_unpad"))
    }
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        with (
            mock.patch.dict(_distributions(), {"flash_attn": ["flash-attn"]}),
            mock.patch.multiple(utils, _loaded_implementation=None, **loaded),
        ):
            for is_available in _availability():
                is_available.cache_clear()
            with mock.patch.object(torch.cuda, "is_available", return_value=True):
                assert all(is_available() for is_available in _availability())  # which is remembered
            yield
    finally:
        for is_available in _availability():
            is_available.cache_clear()
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
