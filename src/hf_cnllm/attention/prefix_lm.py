"""Prefix-LM attention (GLM, arXiv 2103.10360, figure 2c): the prefix of a sequence sees all of itself, the rest is causal.

    query i sees key j of the same sequence  ⇔  j ≤ i  or  j is in the prefix

Kernels know "causal" and "everything", but no prefix. A dense mask costs L × L numbers and the fast kernels, and flash
attention takes none at all. Two plain calls say it exactly, forward and backward, in memory linear in L:

    1. the prefix' queries on the prefix' keys, not causal;
    2. the other queries on all keys, causal with the last query aligned to the last key.

The forward pass makes one mask for all layers with [`create_prefix_lm_mask`]: a dense or block mask where the backend
takes one, or else a [`PrefixLMLayout`], from which [`prefix_lm_attention`] makes the two calls. What the cache holds
afterwards is plain keys and values: everything after the prefix is plain causal.

| backend               | prefill, training                          | the same while tracing or compiling |
|-----------------------|--------------------------------------------|-------------------------------------|
| eager, flex_attention | mask                                       | mask                                |
| sdpa                  | up to 256 tokens a dense mask, then two    | dense mask                          |
|                       | calls for every sequence                   |                                     |
| flash_attention_2/3/4 | two calls, each over the batch's tokens    | refused                             |
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, PreTrainedConfig

from .._compat.modeling import (
    ALL_ATTENTION_FUNCTIONS,
    eager_attention_forward,
    is_flash_attention_requested,
    is_tracing,
    repeat_kv,
)
from .flex import fixed_size
from .mask_values import in_transform
from .masks import EVERYONES, make_mask, read_mask
from .stretches import Stretches, find_sequences

MASK_BACKENDS = ("eager", "sdpa", "flex_attention")

# The rows of one call in `_causal_at_the_end` on a CPU, where the triangle is a mask: its memory is BLOCK × keys.
BLOCK = 512
# Where a collator says the sequences of a row are, for flash attention; here they are found in the mask.
PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# Up to this length one dense mask is as cheap as two calls in every layer, and cheaper for rows that differ.
DENSE_LENGTH = 256


class Sequence(NamedTuple):
    """One sequence in a row: tokens `start` to `end`, of which those before `middle` are its prefix."""

    start: int
    middle: int
    end: int


class PrefixLMLayout(NamedTuple):
    """Where the sequences of a batch are; tokens outside of them are padding, and their output is 0.

    Attributes:
        rows: row numbers -> the sequences in each of these rows, in order.
        past: number of keys in front of the tokens, which all of them see (a cache, a learned prefix).
    """

    rows: dict[tuple[int, ...], tuple[Sequence, ...]]
    past: int


# --- the mask of a forward pass --------------------------------------------------------------------------------------


def create_prefix_lm_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    prefix: torch.Tensor | None,
    learned_keys: int = 0,
) -> torch.Tensor | BlockMask | PrefixLMLayout | None:
    """What `create_causal_mask` is to causal attention.

    Args:
        config: read for `_attn_implementation`.
        inputs_embeds: [batch, queries, ...]; only shape, dtype and device are read.
        attention_mask, learned_keys: see `attention.masks`; a mask has 2 or 4 dimensions.
        cache: the cache before this forward pass. All queries see what it holds, but for its padding.
        prefix: [batch, queries], True for the queries that every query of their sequence sees. None: there are none, as
            in decoding.

    Raises:
        ValueError: the attention implementation has no prefix-LM form, or the mask does not fit.
    """
    backend = config._attn_implementation
    # Continuous batching ("paged|…") has no place for a prefix whatever it runs on.
    flash = is_flash_attention_requested(config) and "|" not in backend
    if backend not in MASK_BACKENDS and not flash:
        raise ValueError(
            f"attn_implementation={backend!r} has no prefix-LM form here and would silently be causal: use one of "
            f"{', '.join(MASK_BACKENDS)}, or flash attention."
        )
    mask = read_mask(inputs_embeds, attention_mask, cache, learned_keys)
    tracing = is_tracing(inputs_embeds) or in_transform()
    queries, past = mask.queries, mask.past
    packed = mask.packed is not False
    has_prefix = prefix is not None and (tracing or bool(prefix.any()))
    if mask.complete is not None or queries == 1 or not (packed or has_prefix):
        return make_mask(config, inputs_embeds, replace(mask, packed=False), cache)

    if prefix is None:
        prefix = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
    new, front = None, None
    if mask.sequences is not None:
        new, front = mask.sequences[:, -queries:], mask.sequences[:, :-queries] != 0
    # A traced graph is to hold for all lengths, so tracing does not ask for this one, nor can `torch.func.vmap`.
    two_calls = not tracing and (flash or (backend == "sdpa" and queries > DENSE_LENGTH))
    if two_calls and (front is None or front.all()):
        layout = find_layout(prefix, new, int(past))
        if layout is not None:
            return layout
    if flash:
        raise ValueError(
            "flash attention takes no prefix-LM mask: tokens with padding between them, padding in the cache and "
            'torch.compile need attn_implementation="sdpa", "flex_attention" or "eager".'
        )
    if packed:
        mask = replace(mask, sequences=torch.cat([front * EVERYONES, new], dim=1), packed=True)
    key = torch.arange(mask.keys, device=prefix.device)
    is_query = (key >= past) & (key < past + queries)
    in_prefix = prefix[:, (key - past).clamp(0, queries - 1)] & is_query  # [batch, keys]
    lookup = fixed_size(in_prefix) if backend == "flex_attention" else in_prefix

    def sees_prefix(batch_idx, head_idx, q_idx, kv_idx):
        return lookup[batch_idx, kv_idx]

    if backend == "flex_attention":
        return make_mask(config, inputs_embeds, mask, cache, or_mask_function=sees_prefix)
    seen = mask.seen(sees_prefix, padding_sees=not packed)
    return make_mask(config, inputs_embeds, replace(mask, complete=seen), cache)


# --- where the sequences are -----------------------------------------------------------------------------------------


def find_layout(prefix: torch.Tensor, numbers: torch.Tensor | None, past: int = 0) -> PrefixLMLayout | None:
    """The layout of a batch, or None if its sequences are not what two calls can compute.

    Args:
        prefix: [batch, length], True for the prefix of each sequence.
        numbers: [batch, length], 0 for padding and one number for each sequence of a row; None: a row is one sequence.
        past: number of keys in front that every token sees.

    Returns:
        None if a sequence has padding inside, or prefix tokens behind other tokens.
    """
    if numbers is None:
        numbers = torch.ones_like(prefix)
    if (found := find_sequences(numbers)) is None:
        return None
    row, start, end = found
    count = F.pad((prefix & (numbers != 0)).cpu().cumsum(1), (1, 0))
    middle = start + count[row, end] - count[row, start]
    if (count[row, middle] - count[row, start] != middle - start).any():
        return None

    sequences: list[list[Sequence]] = [[] for _ in prefix]
    for index, *borders in torch.stack([row, start, middle, end], dim=1).tolist():
        sequences[index].append(Sequence(*borders))
    rows = defaultdict(list)
    for index, in_row in enumerate(sequences):
        rows[tuple(in_row)].append(index)
    return PrefixLMLayout({tuple(same): in_row for in_row, same in rows.items()}, past)


# --- the two calls ---------------------------------------------------------------------------------------------------


def prefix_lm_attention(backend: str, interface: Callable | None = None) -> Callable:
    """transformers' attention function of a backend (`interface`), which takes a [`PrefixLMLayout`] as mask too."""
    interface = interface or ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)

    def attention(module, query, key, value, attention_mask, **kwargs):
        if not isinstance(attention_mask, PrefixLMLayout):
            return interface(module, query, key, value, attention_mask, **kwargs)
        if backend == "sdpa":
            return two_sdpa_calls(query, key, value, attention_mask, **kwargs), None
        return two_flash_calls(partial(interface, module), query, key, value, attention_mask, **kwargs), None

    return attention


def two_sdpa_calls(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PrefixLMLayout,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> torch.Tensor:
    """Two calls of torch's `scaled_dot_product_attention` for each sequence; rows with the same ones go together.

    Args:
        query: [batch, heads, length, head_dim].
        key, value: [batch, key_value_heads, past + length or more, head_dim]; heads is a multiple of key_value_heads.
        scaling: factor on q·kᵀ, by default head_dim^−½.
        dropout: probability; above 0 torch has no kernel of linear memory on a CPU.

    Returns:
        [batch, length, heads, head_dim].
    """
    attend = partial(F.scaled_dot_product_attention, scale=scaling, dropout_p=dropout)
    groups = query.shape[1] // key.shape[1]
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    outputs = []
    for rows, sequences in layout.rows.items():
        q, k, v = query, key, value
        if len(rows) < query.shape[0]:
            index = torch.tensor(rows, device=query.device)
            q, k, v = (states.index_select(0, index) for states in (query, key, value))
        pieces, done = [], 0
        for start, middle, end in sequences:
            pieces.append(torch.zeros_like(q[:, :, done:start]))  # padding
            if middle > start:
                keys, values = (_keys_of(states, layout.past, start, middle) for states in (k, v))
                pieces.append(attend(q[:, :, start:middle], keys, values))
            if end > middle:
                keys, values = (_keys_of(states, layout.past, start, end) for states in (k, v))
                pieces.append(_causal_at_the_end(attend, q[:, :, start:end], keys, values, end - middle))
            done = end
        pieces.append(torch.zeros_like(q[:, :, done:]))
        outputs.append(torch.cat([piece.transpose(1, 2) for piece in pieces], dim=1))
    if len(outputs) == 1:
        return outputs[0]
    order = torch.tensor([row for rows in layout.rows for row in rows], device=query.device)
    return torch.cat(outputs).index_select(0, order.argsort())


def _keys_of(states: torch.Tensor, past: int, start: int, end: int) -> torch.Tensor:
    """The keys (or values) in front and those of tokens `start` to `end`."""
    if start == 0 or past == 0:
        return states[:, :, start if past == 0 else 0 : past + end]
    return torch.cat([states[:, :, :past], states[:, :, past + start : past + end]], dim=2)


def _causal_at_the_end(
    attend: Callable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, count: int
) -> torch.Tensor:
    """Attention of the last `count` queries, where the last query sees all keys, the one before it all but one, …

    SDPA's own causal mask starts at the first query and the first key, which does not fit when there are more keys than
    queries; only CUDA kernels have the other alignment too. On a CPU, plain causal attention of all queries, the first
    of which are thrown away, is fastest when there are few of those; else blocks of rows get a mask of BLOCK × keys.
    """
    keys = key.shape[2]
    before = keys - count  # keys before the triangle
    last = query[:, :, query.shape[2] - count :]
    if count == 1:
        return attend(last, key, value)
    if before == 0 or (keys == query.shape[2] and before <= keys // 4 and query.device.type == "cpu"):
        return attend(query, key, value, is_causal=True)[:, :, before:]
    if query.device.type == "cuda":
        return attend(last, key, value, attn_mask=causal_lower_right(count, keys))
    # Column c + keys of row r is c − r steps in the future; a block's mask is a window of this one band, so that what
    # autograd keeps for all blocks is one band.
    block = min(BLOCK, count)
    band = torch.full((block, block), -torch.inf, dtype=query.dtype, device=query.device).triu(1)
    band = F.pad(band, (keys, 0))
    outputs = []
    for first in range(0, count, block):
        rows = min(block, count - first)
        seen = before + first + rows
        mask = band[:rows, keys + rows - seen : keys + rows]
        queries = last[:, :, first : first + rows]
        outputs.append(attend(queries, key[:, :, :seen], value[:, :, :seen], attn_mask=mask[None, None]))
    return torch.cat(outputs, dim=2)


def two_flash_calls(
    interface: Callable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layout: PrefixLMLayout, **kwargs
) -> torch.Tensor:
    """Two calls of flash attention's form for sequences of different lengths, over the tokens of the whole batch.

    Its causal mask ends at the last query and the last key of each sequence (flash-attn 2.1 and later).

    Args:
        interface: transformers' `flash_attention_forward` for a module; the rest as in `two_sdpa_calls`.
    """
    batch, heads, length, head_dim = query.shape
    total, past, device = key.shape[2], layout.past, query.device
    kwargs = {name: value for name, value in kwargs.items() if name not in PACKING}
    sequences = [(row, *one) for rows, in_row in layout.rows.items() for row in rows for one in in_row]
    row, start, middle, end = torch.tensor(sequences, dtype=torch.long).view(-1, 4).T
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    output = query.new_zeros(batch * length, heads, head_dim)
    for causal, first, last in ((False, start, middle), (True, middle, end)):
        in_row, begin, first, last = (column[last > first] for column in (row, start, first, last))
        if in_row.numel() == 0:
            continue
        queries = Stretches.between(in_row * length + first, in_row * length + last, device)
        # The keys in front of a row, and those of its sequence, one after the other.
        front = in_row * total
        pairs = (torch.stack([front, front + past + begin], 1), torch.stack([front + past, front + past + last], 1))
        keys = Stretches.between(pairs[0].flatten(), pairs[1].flatten(), device)
        result, _ = interface(
            query[queries.tokens].transpose(0, 1)[None],
            key[keys.tokens].transpose(0, 1)[None],
            value[keys.tokens].transpose(0, 1)[None],
            None,
            is_causal=causal,
            cu_seq_lens_q=queries.borders,
            cu_seq_lens_k=keys.borders[::2].contiguous(),
            max_length_q=queries.longest,
            max_length_k=int((past + last - begin).max()),
            **kwargs,
        )
        output = output.index_copy(0, queries.tokens, result[0].to(output.dtype))
    return output.view(batch, length, heads, head_dim)
