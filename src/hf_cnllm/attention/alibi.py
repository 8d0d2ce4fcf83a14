"""ALiBi (Press et al., arXiv 2108.12409): the score of query i and key j gets slope_h·(j − i).

Kernels know causal attention but no such bias, and a dense bias costs heads × L × L numbers. Two forms avoid it:

**Folded** (SDPA, prefill and training). softmax ignores what is constant along a row, and the bias has rank two, so it is
folded into a few more columns of q and k, after which plain causal attention computes ALiBi exactly, forward and
backward (the low-rank view of FlashBias, arXiv 2505.12044):

    q' = [ −s·i | s | q ],  k' = [ 1 | j | k ]   ⇒   q'·k' = s·(j − i) + q·k,   s = slope / the kernel's scaling

The columns stand in front: kernels sum along the head dimension in order, so the two large terms cancel before q·k is
added and the error is that of a dense bias of slope·(j − i), not that of slope·j. The row term −s·i is free to be
inexact, being constant along the row; s·j has to be exact. In full precision that takes a kernel that scales by 1 (q is
scaled before), since a backward kernel may scale k' first and round it. In half precision scaling q before would round
it; there each entry is split into pieces that are exact (`_pieces`). A padded key gets a large negative entry in one
more column. v is padded to the same width, as flash kernels want it. Measured: scripts/alibi_precision.py.

**Dense for little** (decoding, short prompts): slope·(j − i) as a [batch, heads, queries, keys] mask, made once a step. Up to
`DENSE_PAIRS` pairs of query and key that costs less than the columns do (scripts/benchmark_alibi.py).

The forward pass makes one [`AlibiMask`] for all layers; attention functions of this file read it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, PreTrainedConfig

from .._compat.modeling import (
    PAGED_CACHES,
    compile_friendly_flex_attention,
    eager_attention_forward,
    is_tracing,
    repeat_kv,
    sdpa_attention_forward,
)
from .alibi_flash import FlashAlibi, alibi_flash_attention, make_flash_alibi
from .flex import fixed_number
from .masks import FULL, AttentionMask, follow_restarts, read_mask


class FoldedAlibi(NamedTuple):
    """For SDPA with several queries.

    Attributes:
        query_columns: [1, heads, queries, columns], to put in front of q.
        key_columns: [batch or 1, 1, keys, columns], to put in front of k.
        scaling: the kernel's factor on q'·k'. What is missing from the model's, q is scaled by before.
        mask: additive, [batch or 1, 1, queries, keys]; None for plain causal attention.
    """

    query_columns: torch.Tensor
    key_columns: torch.Tensor
    scaling: float
    mask: torch.Tensor | None = None


class FlexAlibi(NamedTuple):
    """For flex attention; slopes [heads], and the position of the first query."""

    slopes: torch.Tensor
    first_query: torch.Tensor
    block_mask: BlockMask


# A tensor is the dense bias, [batch or 1, heads, queries, keys], with the mask in it.
AlibiMask: TypeAlias = torch.Tensor | FoldedAlibi | FlexAlibi | FlashAlibi
# Those that need an attention function of this file; a tensor is the dense bias, which every function adds.
ALIBI_MASKS = (FoldedAlibi, FlexAlibi, FlashAlibi)
# Under which name `generate` hands a dense bias that was made outside of the forward pass to it.
PREPARED = "alibi_bias"


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """[num_heads] fp32: 2^(−8/n), 2^(−16/n), … for n a power of two, else those of the next smaller power of two and
    then every other one of the next larger (section 3 and the authors' code)."""

    def geometric(n: int) -> list[float]:
        ratio = 2 ** (-8 / n)
        return [ratio ** (k + 1) for k in range(n)]

    power = 2 ** math.floor(math.log2(num_heads))
    return torch.tensor(geometric(power) + geometric(2 * power)[::2][: num_heads - power], dtype=torch.float32)


# So many pairs of query and key may have a dense bias.
DENSE_PAIRS = 128**2

# --- the folded form -------------------------------------------------------------------------------------------------

# Hides a padded key: far below any visible score, and exact in every dtype.
HIDDEN = -(2.0**14)
FULL_PRECISION = (torch.float32, torch.float64)
# Half precision takes a position as two digits of 8 bits, which are all that bf16 has.
MOST_KEYS_IN_HALF_PRECISION = 2**16


def fold_alibi(
    slopes: torch.Tensor,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    hidden_keys: torch.Tensor | None,
    scaling: float,
    dtype: torch.dtype,
    mask: torch.Tensor | None = None,
) -> FoldedAlibi:
    """The columns that make plain attention compute ALiBi.

    Args:
        slopes: [heads].
        query_positions: [queries], integers; only a reference point, see the module's docstring.
        key_positions: [keys] or [batch, keys], integers from 0 to keys − 1.
        hidden_keys: [batch, keys], True for padding, or None.
        scaling: the model's factor on q·k.
        dtype: of the queries and keys.
        mask: see [`FoldedAlibi`].

    Raises:
        ValueError: more keys than half precision can count.
    """
    if dtype not in FULL_PRECISION and key_positions.shape[-1] > MOST_KEYS_IN_HALF_PRECISION:
        raise ValueError(
            f"attn_implementation='sdpa' computes ALiBi for up to {MOST_KEYS_IN_HALF_PRECISION:,} keys in {dtype}, not "
            f"for {key_positions.shape[-1]:,}; use 'flex_attention' or 'flash_attention_2', or run the model in fp32."
        )
    scaling = 1.0 if dtype in FULL_PRECISION else scaling
    slope = slopes / scaling
    row_term = -slope[:, None] * query_positions
    ones = torch.ones_like(key_positions, dtype=dtype)
    if dtype in FULL_PRECISION:
        for_queries = [row_term, slope[:, None].expand_as(row_term)]
        for_keys = [ones, key_positions]
    else:
        # A factor 256 only moves the exponent; it stands where it keeps fp16 within its range.
        slope_pieces = [piece[:, None].expand_as(row_term) for piece in _pieces(slope, dtype)]
        for_queries = _pieces(row_term / 256, dtype) + [256 * piece for piece in slope_pieces] + slope_pieces
        for_keys = [256 * ones] * 3 + [key_positions // 256] * 3 + [key_positions % 256] * 3
    query_columns = torch.stack([column.to(dtype) for column in for_queries], dim=-1)[None]
    key_columns = torch.stack([column.to(dtype) for column in for_keys], dim=-1)
    key_columns = key_columns.view(-1, 1, *key_columns.shape[-2:])
    if hidden_keys is not None:
        hide = torch.where(hidden_keys, HIDDEN, 0.0).to(dtype)[:, None, :, None]
        key_columns = torch.cat([key_columns.expand(hide.shape[0], -1, -1, -1), hide], dim=-1)
        # The kernel scales the product; at least 1 keeps the entry below any score.
        query_columns = F.pad(query_columns, (0, 1), value=max(1.0, 1.0 / scaling))
    return FoldedAlibi(query_columns, key_columns, scaling, mask)


def _pieces(value: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """fp32 `value` as three tensors of `dtype` that add up to it, to the rounding of the last."""
    pieces = []
    for _ in range(3):
        pieces.append(value.to(dtype))
        value = value - pieces[-1].float()
    return pieces


# --- one mask per forward pass ---------------------------------------------------------------------------------------


def create_alibi_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | dict[str, torch.Tensor] | None,
    cache: Cache | None,
    position_ids: torch.Tensor | None = None,
    key_borders: torch.Tensor | dict[str, torch.Tensor] | None = None,
) -> AlibiMask:
    """What `create_causal_mask` is to plain attention, for a model with ALiBi.

    Args:
        attention_mask: any form of `attention.masks`, or what [`prepare_alibi_mask`] made of it.
        position_ids: [batch, queries]; without mask and cache, restarts in it separate packed sequences.
        key_borders: continuous batching's `cu_seq_lens_k`, see [`page_alibi`].

    Raises:
        ValueError: the attention implementation has no ALiBi, or the mask does not fit the keys.
    """
    backend, heads = config._attn_implementation, config.num_attention_heads
    if isinstance(cache, PAGED_CACHES):
        borders = key_borders[FULL] if isinstance(key_borders, dict) else key_borders
        return page_alibi(heads, attention_mask, position_ids, borders)  # type: ignore[arg-type]  # a tensor there
    alibi_attention(backend)  # an unknown backend is refused before any work
    if isinstance(attention_mask, dict):
        return attention_mask[PREPARED]
    slopes = alibi_slopes(heads).to(inputs_embeds.device)
    mask = read_mask(inputs_embeds, attention_mask, cache, forms=(2, 3, 4))
    mask = follow_restarts(mask, position_ids, cache)
    if backend == "flash_attention_2":
        return make_flash_alibi(slopes, mask)
    if backend == "flex_attention":
        return FlexAlibi(slopes, fixed_number(mask.past, mask.device), mask.block_mask())
    queries, keys = mask.query_positions, mask.key_positions
    # The dtype of the queries to come. Meta tensors, which measure a model without running it, know no autocast.
    autocast = mask.device.type != "meta" and torch.is_autocast_enabled(mask.device.type)
    dtype = torch.get_autocast_dtype(mask.device.type) if autocast else inputs_embeds.dtype
    is_little = not is_tracing(inputs_embeds) and mask.queries * mask.keys <= DENSE_PAIRS
    if backend == "eager" or mask.queries == 1 or is_little:
        bias = (slopes[:, None, None] * (keys - queries[:, None])).to(dtype)[None]
        return bias if mask.hides_nothing else bias + mask.additive(dtype)
    scaling = (config.hidden_size // heads) ** -0.5
    if not _is_padding_only(mask):
        return fold_alibi(slopes, queries, keys, None, scaling, dtype, mask.additive(dtype))
    hidden_keys = None if mask.sequences is None else mask.sequences == 0
    return fold_alibi(slopes, queries, keys[: mask.queries], hidden_keys, scaling, dtype)


def page_alibi(
    num_heads: int, mask: torch.Tensor, query_positions: torch.Tensor, borders: torch.Tensor
) -> torch.Tensor:
    """The dense bias of continuous batching (`generate_batch`), which packs requests into one row: a request's keys lie
    together, its first token in front.

    Args:
        mask: [1, 1, queries, keys], additive, transformers' own.
        query_positions: [1, queries], counted in each request.
        borders: [requests + 1], where each one's keys begin and end. The row may have filling behind the last.
    """
    keys = torch.arange(mask.shape[-1], device=mask.device)
    key_positions = keys - borders[torch.searchsorted(borders[1:], keys, right=True)]
    slopes = alibi_slopes(num_heads).to(mask.device)
    bias = slopes[:, None, None] * (key_positions - query_positions[0, :, None])
    return torch.where(mask < 0, mask, bias.to(mask.dtype))


def prepare_alibi_mask(
    config: PreTrainedConfig, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor | None, cache: Cache
) -> torch.Tensor | dict[str, torch.Tensor] | None:
    """The mask of a compiled step with a static cache, made outside of it; `attention_mask` itself where the forward
    pass is to make it: in prompts, which are not compiled."""
    if inputs_embeds.shape[1] > 1:
        return attention_mask
    return {PREPARED: create_alibi_mask(config, inputs_embeds, attention_mask, cache)}


def _is_padding_only(mask: AttentionMask) -> bool:
    """Whether causality and padding are all there is to the mask, which a folded column expresses; while tracing, where
    values cannot be read, the answer that is always right."""
    if mask.packed is not False or mask.complete is not None:
        return False
    return mask.past == 0 if isinstance(mask.past, int) else not is_tracing(mask.past) and int(mask.past) == 0


# --- attention functions, called as those of transformers' AttentionInterface ----------------------------------------
# module, query [batch, heads, queries, head_dim], key and value [batch, key_value_heads, keys, head_dim], the AlibiMask
# -> output [batch, queries, heads, head_dim], attention weights or None


def alibi_sdpa_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Folded for several queries, all of q', k' and v as wide, a multiple of 8, as CUDA kernels ask of the head dimension;
    with a dense bias for one."""
    folded, head_dim = attention_mask, query.shape[-1]
    if not isinstance(folded, FoldedAlibi):
        return sdpa_attention_forward(module, query, key, value, folded, dropout, scaling, is_causal=False, **kwargs)
    if not query.dtype == key.dtype == folded.query_columns.dtype:
        raise ValueError(
            f"ALiBi was folded for {folded.query_columns.dtype}, but the queries are {query.dtype} and the cached keys "
            f"{key.dtype}: run the model and its cache in one dtype, or use attn_implementation='eager'."
        )
    if folded.scaling != scaling:
        query = query * (scaling / folded.scaling)
    keys, columns = folded.key_columns.shape[2:]  # fewer keys than a static cache holds
    fill = -(head_dim + columns) % 8
    query_columns = F.pad(folded.query_columns, (fill, 0)).expand(query.shape[0], -1, -1, -1)
    key_columns = F.pad(folded.key_columns, (fill, 0)).expand(key.shape[0], key.shape[1], -1, -1)
    query = torch.cat([query_columns, query], dim=-1)
    key = torch.cat([key_columns, key[:, :, :keys]], dim=-1)
    value = F.pad(value[:, :, :keys], (0, fill + columns))
    is_causal = folded.mask is None
    output, _ = sdpa_attention_forward(
        module, query, key, value, folded.mask, dropout, folded.scaling, is_causal=is_causal, **kwargs
    )
    return output[..., :head_dim], None


def alibi_flex_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """The bias as a `score_mod`, the mask as a `BlockMask`."""
    if dropout > 0:
        raise ValueError("flex_attention has no attention dropout; use sdpa or eager.")
    slopes, first_query, block_mask = attention_mask

    def add_bias(score, batch_idx, head_idx, q_idx, kv_idx):
        return score + slopes[head_idx] * (kv_idx - q_idx - first_query)

    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    output = compile_friendly_flex_attention(
        query, key, value, score_mod=add_bias, block_mask=block_mask, scale=scaling, training=module.training
    )
    return output.transpose(1, 2).contiguous(), None


ALIBI_ATTENTION: dict[str, Callable] = {
    "eager": eager_attention_forward,
    "sdpa": alibi_sdpa_attention,
    "flex_attention": alibi_flex_attention,
    "flash_attention_2": alibi_flash_attention,
}


def alibi_attention(attn_implementation: str) -> Callable:
    """The attention function of a backend; a backend that would drop the bias is refused."""
    try:
        return ALIBI_ATTENTION[attn_implementation]
    except KeyError:
        raise ValueError(
            f"attn_implementation={attn_implementation!r} has no ALiBi bias here and would silently drop it. "
            f"Use one of {', '.join(ALIBI_ATTENTION)}."
        ) from None
