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

**Dense for a few queries** (decoding, one query): slope·(j − i) as a [batch, heads, 1, keys] mask, made once a step.

The forward pass makes one [`AlibiMask`] for all layers; attention functions of this file read it.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, PreTrainedConfig

from .._compat import (
    compile_friendly_flex_attention,
    eager_attention_forward,
    find_packed_sequence_indices,
    repeat_kv,
    sdpa_attention_forward,
)
from .alibi_flash import FlashSequences, find_sequences, flash_attention_with_slopes
from .flex import causal_block_mask
from .packing import fixed_size, lookup_mask, same_document


class AlibiMask(NamedTuple):
    """What one forward pass knows about positions and visibility, for every layer.

    Exactly the fields that the backend needs are set.

    Attributes:
        slopes: [heads], fp32.
        bias: [batch or 1, heads, queries, keys] additive bias with the mask in it: dense form.
        query_columns: [1, heads, queries, columns] to put in front of q: folded form.
        key_columns: [batch or 1, 1, keys, columns] to put in front of k: folded form.
        visible: [batch, 1, queries, keys] additive mask beside the folded bias, None for plain causal attention; with
            flex attention its `BlockMask`.
        sequences: flash attention's sequences, None for whole rows.
        keys: with flash attention, how many keys there are (a static cache has room for more).
        positions: with flex attention, those of the queries (and more behind them).
    """

    slopes: torch.Tensor
    bias: torch.Tensor | None = None
    query_columns: torch.Tensor | None = None
    key_columns: torch.Tensor | None = None
    visible: torch.Tensor | BlockMask | None = None
    sequences: FlashSequences | None = None
    keys: int | None = None
    positions: torch.Tensor | None = None


def alibi_slopes(num_heads: int) -> torch.Tensor:
    """[num_heads] fp32: 2^(−8/n), 2^(−16/n), … for n a power of two, else those of the next smaller power of two and
    then every other one of the next larger (section 3 and the authors' code)."""

    def geometric(n: int) -> list[float]:
        ratio = 2 ** (-8 / n)
        return [ratio ** (k + 1) for k in range(n)]

    power = 2 ** math.floor(math.log2(num_heads))
    return torch.tensor(geometric(power) + geometric(2 * power)[::2][: num_heads - power], dtype=torch.float32)


def alibi_bias(slopes: torch.Tensor, query_positions: torch.Tensor, key_positions: torch.Tensor) -> torch.Tensor:
    """slope·(j − i), fp32 [heads, queries, keys]."""
    return slopes[:, None, None] * (key_positions[None, :] - query_positions[:, None])


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
) -> tuple[torch.Tensor, torch.Tensor]:
    """The columns that make plain attention compute ALiBi.

    Args:
        slopes: [heads].
        query_positions: [queries], integers; only a reference point, see the module's docstring.
        key_positions: [keys] or [batch, keys], integers from 0 to keys − 1.
        hidden_keys: [batch, keys], True for padding, or None.
        scaling: the model's factor on q·k.
        dtype: of the queries and keys.

    Returns:
        query columns [1, heads, queries, columns] and key columns [batch or 1, 1, keys, columns].

    Raises:
        ValueError: more keys than half precision can count.
    """
    if dtype not in FULL_PRECISION and key_positions.shape[-1] > MOST_KEYS_IN_HALF_PRECISION:
        raise ValueError(
            f"attn_implementation='sdpa' computes ALiBi for up to {MOST_KEYS_IN_HALF_PRECISION:,} keys in {dtype}, not "
            f"for {key_positions.shape[-1]:,}; use 'flex_attention' or 'flash_attention_2', or run the model in fp32."
        )
    scaling = _kernel_scaling(scaling, dtype)
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
    return query_columns, key_columns


def _kernel_scaling(scaling: float, dtype: torch.dtype) -> float:
    """What the kernel is to scale q'·k' by: nothing in full precision, where q is scaled before."""
    return 1.0 if dtype in FULL_PRECISION else scaling


def _pieces(value: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
    """fp32 `value` as three tensors of `dtype` that add up to it, to the rounding of the last."""
    pieces = []
    for _ in range(3):
        pieces.append(value.to(dtype))
        value = value - pieces[-1].float()
    return pieces


def _with_columns(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: AlibiMask, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """q', k' and v of the same width, a multiple of 8 as CUDA kernels ask of the head dimension; the kernel's scaling."""
    if not query.dtype == key.dtype == mask.query_columns.dtype:
        raise ValueError(
            f"ALiBi was folded for {mask.query_columns.dtype}, but the queries are {query.dtype} and the cached keys "
            f"{key.dtype}: run the model and its cache in one dtype, or use attn_implementation='eager'."
        )
    kernel_scaling = _kernel_scaling(scaling, query.dtype)
    if kernel_scaling != scaling:
        query = query * (scaling / kernel_scaling)
    head_dim, columns = query.shape[-1], mask.query_columns.shape[-1]
    fill = -(head_dim + columns) % 8
    keys = mask.key_columns.shape[2]  # fewer than a static cache holds
    query_columns = mask.query_columns.expand(query.shape[0], -1, -1, -1)
    key_columns = mask.key_columns.expand(key.shape[0], key.shape[1], -1, -1)
    query = torch.cat([query_columns, F.pad(query, (0, fill))], dim=-1)
    key = torch.cat([key_columns, F.pad(key[:, :, :keys], (0, fill))], dim=-1)
    return query, key, F.pad(value[:, :, :keys], (0, columns + fill)), kernel_scaling


# --- one mask per forward pass ---------------------------------------------------------------------------------------


def create_alibi_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_ids: torch.Tensor | None = None,
    **kwargs,
) -> AlibiMask:
    """What transformers' `create_causal_mask` is to plain attention, for a model with ALiBi.

    Args:
        config: read for `_attn_implementation`, `hidden_size` and `num_attention_heads`.
        inputs_embeds: [batch, queries, ...]; only shape, dtype and device are read.
        attention_mask: None; [batch, keys] with 0 for padding and equal numbers for the tokens of one packed document;
            [batch, queries, keys] 0/1, to which causality is added; or [batch, 1, queries, keys], bool or additive,
            taken as it is.
        cache: the cache, before this forward pass.
        position_ids: [batch, queries]; without mask and cache, restarts in it separate packed documents.

    Raises:
        ValueError: the attention implementation has no ALiBi, or the mask does not fit the keys.
    """
    backend = config._attn_implementation
    alibi_attention(backend)  # an unknown backend is refused before any work
    device = inputs_embeds.device
    # The dtype of the queries to come. Meta tensors, which measure a model without running it, know no autocast.
    autocast = device.type != "meta" and torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else inputs_embeds.dtype
    queries = inputs_embeds.shape[1]
    offset, keys = 0, queries
    if cache is not None:
        offset, keys = cache.get_query_offset(0), cache.get_mask_sizes(queries, 0)[0]
    _check_mask(attention_mask, inputs_embeds.shape[0], queries, keys, offset)
    if attention_mask is None and cache is None and position_ids is not None:
        attention_mask = _documents(position_ids, inputs_embeds.shape[0])
    slopes = alibi_slopes(config.num_attention_heads).to(device)
    if backend == "flash_attention_2":
        keys = int(offset) + queries
        return AlibiMask(slopes, sequences=_sequences(attention_mask, queries, keys), keys=keys)
    key_positions = torch.arange(keys, device=device)
    query_positions = torch.arange(queries, device=device) + offset
    if backend == "flex_attention":
        blocks = _block_mask(inputs_embeds, attention_mask, cache, query_positions, key_positions)
        return AlibiMask(slopes, visible=blocks, positions=fixed_size(query_positions))

    plain = backend == "sdpa" and queries > 1 and _is_padding_only(attention_mask, offset)
    visible = None if plain else _visible(attention_mask, query_positions, key_positions, dtype)
    if backend == "eager" or queries == 1:
        return AlibiMask(slopes, bias=alibi_bias(slopes, query_positions, key_positions).to(dtype)[None] + visible)
    hidden_keys = None
    if plain:
        key_positions = key_positions[:queries]
        hidden_keys = None if attention_mask is None else attention_mask[:, :queries] == 0
    scaling = (config.hidden_size // config.num_attention_heads) ** -0.5
    columns = fold_alibi(slopes, query_positions, key_positions, hidden_keys, scaling, dtype)
    return AlibiMask(slopes, query_columns=columns[0], key_columns=columns[1], visible=visible)


def _check_mask(
    attention_mask: torch.Tensor | None, batch: int, queries: int, keys: int, offset: int | torch.Tensor
) -> None:
    if attention_mask is None:
        return
    shape = tuple(attention_mask.shape)
    expected = {
        2: f"[batch, keys] = [{batch}, {keys}]",
        3: f"[batch, queries, keys] = [{batch}, {queries}, {keys}]",
        4: f"[batch, 1, queries, keys] = [{batch}, 1, {queries}, {keys}]",
    }
    if attention_mask.ndim not in expected:
        raise ValueError(f"`attention_mask` must have 2, 3 or 4 dimensions, got shape {shape}.")
    # A static cache has room for more keys than there are; a 2-D mask need only reach those that are there.
    needed = offset + queries if attention_mask.ndim == 2 and isinstance(offset, int) else 0
    fits = shape[-1] >= needed if attention_mask.ndim == 2 else shape[-2] == queries and shape[-1] == keys
    if not fits or shape[0] not in (1, batch):
        raise ValueError(
            f"`attention_mask` has shape {shape}, but the cache and the input together ask for "
            f"{expected[attention_mask.ndim]}: it must cover the cached tokens too."
        )


def _documents(position_ids: torch.Tensor, batch: int) -> torch.Tensor | None:
    """[batch, queries] document numbers from 1 where `position_ids` restart, None if they never do."""
    documents = find_packed_sequence_indices(position_ids.expand(batch, -1))
    return None if documents is None else documents + 1


def _is_padding_only(attention_mask: torch.Tensor | None, offset: int | torch.Tensor) -> bool:
    """Whether causality and padding are all there is to the mask, which a folded column expresses.

    Reads values, so while tracing the answer is the one that is always right.
    """
    if isinstance(offset, torch.Tensor):
        if torch.compiler.is_compiling():
            return False
        offset = int(offset)
    if offset != 0:
        return False
    if attention_mask is None:
        return True
    if attention_mask.ndim != 2:
        return False
    return attention_mask.dtype == torch.bool or not (torch.compiler.is_compiling() or attention_mask.max() > 1)


def _sequences(attention_mask: torch.Tensor | None, queries: int, keys: int) -> FlashSequences | None:
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(
            "flash attention takes no mask for single queries and keys: give a 2-D `attention_mask`, or use "
            'attn_implementation="sdpa".'
        )
    return find_sequences(attention_mask[:, :keys], queries)


def _visible(
    attention_mask: torch.Tensor | None, query_positions: torch.Tensor, key_positions: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """The additive mask [batch or 1, 1, queries, keys]: 0, or the dtype's minimum where a query may not look.

    The minimum rather than −inf: a row that may look nowhere stays finite.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        if attention_mask.dtype != torch.bool:
            return attention_mask.to(dtype)
        allowed = attention_mask
    else:
        allowed = (key_positions[None, :] <= query_positions[:, None])[None]
        if attention_mask is not None and attention_mask.ndim == 3:
            allowed = allowed & (attention_mask != 0)
        elif attention_mask is not None:
            key_ids = F.pad(attention_mask, (0, max(0, len(key_positions) - attention_mask.shape[-1])))
            key_ids = key_ids[:, : len(key_positions)]
            query_ids = key_ids.index_select(1, query_positions)
            allowed = allowed & (query_ids[:, :, None] == key_ids[:, None, :]) & (key_ids != 0)[:, None, :]
        allowed = allowed[:, None]
    lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)  # eager attention's softmax is fp32
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, lowest)


def _block_mask(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
) -> BlockMask:
    """Flex attention's form of [`_visible`]: the same rules as functions of the positions."""
    rule, complete = None, False
    if attention_mask is not None and attention_mask.ndim == 2:
        rule = same_document(F.pad(attention_mask, (0, max(0, len(key_positions) - attention_mask.shape[-1]))))
    elif attention_mask is not None and attention_mask.ndim == 3:
        rule = lookup_mask(attention_mask != 0, query_positions[0])
    elif attention_mask is not None:
        keeps = attention_mask if attention_mask.dtype == torch.bool else attention_mask >= 0
        rule, complete = lookup_mask(keeps[:, 0], query_positions[0]), True
    return causal_block_mask(
        inputs_embeds,
        None,
        cache,
        or_mask_function=rule if complete else None,
        and_mask_function=rule,
    )


# --- attention functions, called as those of transformers' AttentionInterface ----------------------------------------


def alibi_eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: AlibiMask,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense scores plus dense bias; returns the attention weights too."""
    return eager_attention_forward(module, query, key, value, attention_mask.bias, scaling, dropout)


def alibi_sdpa_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: AlibiMask,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Folded for several queries, with a dense bias for one."""
    head_dim, visible = value.shape[-1], attention_mask.bias
    if attention_mask.query_columns is not None:
        query, key, value, scaling = _with_columns(query, key, value, attention_mask, scaling)
        visible = attention_mask.visible  # type: ignore[assignment]  # a BlockMask is flex attention's
    output, _ = sdpa_attention_forward(
        module, query, key, value, visible, dropout, scaling, is_causal=visible is None, **kwargs
    )
    return output[..., :head_dim], None


def alibi_flex_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: AlibiMask,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """The bias as a `score_mod`, the mask as a `BlockMask`."""
    if dropout > 0:
        raise ValueError("flex_attention has no attention dropout; use sdpa or eager.")
    slopes, positions = attention_mask.slopes, attention_mask.positions

    def add_bias(score, batch_idx, head_idx, q_idx, kv_idx):
        return score + slopes[head_idx] * (kv_idx - positions[q_idx])

    groups = query.shape[1] // key.shape[1]
    output = compile_friendly_flex_attention(
        query,
        repeat_kv(key, groups),
        repeat_kv(value, groups),
        score_mod=add_bias,
        block_mask=attention_mask.visible,
        scale=scaling,
        training=module.training,
    )
    return output.transpose(1, 2).contiguous(), None


def alibi_flash_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: AlibiMask,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """flash-attn 2 with its own ALiBi."""
    key, value = key[:, :, : attention_mask.keys], value[:, :, : attention_mask.keys]
    output = flash_attention_with_slopes(
        query, key, value, attention_mask.slopes, attention_mask.sequences, scaling, dropout
    )
    return output, None


ALIBI_ATTENTION: dict[str, Callable] = {
    "eager": alibi_eager_attention,
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
