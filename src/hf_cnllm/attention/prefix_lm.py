"""Prefix-LM attention (GLM, arXiv 2103.10360, figure 2c): the prefix of a text sees all of itself, the rest is causal.

    query i sees key j of the same text  ⇔  j ≤ i  or  j is in the prefix

Kernels know "causal" and "everything", but no prefix. A dense mask says it at the price of L × L numbers and of the fast
kernels; flash attention takes no such mask at all. Two plain calls say it exactly, forward and backward, in memory
linear in L:

    1. the prefix' queries on the prefix' keys, not causal;
    2. the other queries on all keys, causal with the last query aligned to the last key.

The forward pass makes one mask for all layers with [`create_prefix_lm_mask`]: a dense or block mask where the backend
takes one, or else a [`PrefixLMLayout`], from which [`prefix_lm_attention`] makes the two calls. What the cache holds
afterwards is plain keys and values: everything after the prefix is plain causal.

| backend               | prefill, training                          | the same while tracing or compiling |
|-----------------------|--------------------------------------------|-------------------------------------|
| eager, flex_attention | mask                                       | mask                                |
| sdpa                  | two calls for every text                   | dense mask                          |
| flash_attention_2/3/4 | two calls, each over the batch's tokens    | refused                             |
"""

from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, PreTrainedConfig

from .._compat import (
    ALL_ATTENTION_FUNCTIONS,
    eager_attention_forward,
    is_flash_attention_requested,
    is_tracing,
    repeat_kv,
)
from .flex import block_mask, create_causal_mask
from .packing import fixed_size, lookup_mask

MASK_BACKENDS = ("eager", "sdpa", "flex_attention")

# The rows of one call in `_causal_at_the_end` on a CPU, where the triangle is a mask: its memory is BLOCK × keys.
BLOCK = 512
# Up to this length a ragged batch is cheaper with one dense mask than with two calls for every row.
DENSE_LENGTH = 256

# Number of the keys in front that the queries of every document see.
EVERYONES = -1


class Text(NamedTuple):
    """One text in a row: tokens `start` to `end`, of which those before `middle` are its prefix."""

    start: int
    middle: int
    end: int


class PrefixLMLayout(NamedTuple):
    """Where the texts of a batch are; tokens outside of them are padding, and their output is 0.

    Attributes:
        rows: row numbers -> the texts in each of these rows, in order.
        past: number of keys in front of the tokens, which all of them see (a cache, a learned prefix).
        length: number of tokens in a row, padding included.
    """

    rows: dict[tuple[int, ...], tuple[Text, ...]]
    past: int
    length: int


# --- the mask of a forward pass --------------------------------------------------------------------------------------


def create_prefix_lm_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    prefix: torch.Tensor | None,
    learned_keys: int = 0,
) -> torch.Tensor | BlockMask | PrefixLMLayout | None:
    """What transformers' `create_causal_mask` is to causal attention.

    Args:
        config: read for `_attn_implementation`.
        inputs_embeds: [batch, queries, ...]; only shape, dtype and device are read.
        attention_mask: None; [batch, past + queries] with 0 for padding and 1 for tokens, or equal numbers from 1 for
            the tokens of one packed text; or [batch or 1, 1, queries, keys], bool (True: visible) or additive, which
            then says everything.
        cache: the cache before this forward pass. All queries see what it holds, but for its padding.
        prefix: [batch, queries], True for the queries that every query of their text sees. None: there are none, as in
            decoding.
        learned_keys: how many of the cache's first keys are learned (P-tuning): `attention_mask` does not count them.

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
    if attention_mask is not None and attention_mask.ndim == 4:
        return _given_mask(backend, inputs_embeds, attention_mask, cache, learned_keys)

    queries = inputs_embeds.shape[1]
    if attention_mask is not None:
        attention_mask = F.pad(attention_mask, (learned_keys, 0), value=1)
    past = cache.get_seq_length() if cache is not None else 0
    _check_mask(attention_mask, inputs_embeds.shape[0], queries, past)
    mask_like = partial(_backend_mask, config, inputs_embeds, attention_mask, cache)
    if queries == 1:
        return mask_like()

    documents = None if attention_mask is None else attention_mask[:, -queries:]
    tracing = is_tracing(inputs_embeds)
    packed = documents is not None and documents.dtype != torch.bool and (tracing or bool((documents > 1).any()))
    if not packed and (prefix is None or (not tracing and not prefix.any())):
        return mask_like()

    if prefix is None:
        prefix = torch.zeros(inputs_embeds.shape[:2], dtype=torch.bool, device=inputs_embeds.device)
    if flash or (backend == "sdpa" and not tracing):
        layout = None if tracing or _hides_past(attention_mask, queries) else find_layout(prefix, documents, int(past))
        ragged = layout is not None and len(layout.rows) > 1
        if layout is not None and (flash or queries > DENSE_LENGTH or not ragged):
            return layout
    if flash:
        raise ValueError(
            "flash attention takes no prefix-LM mask: tokens with padding between them, padding in the cache and "
            'torch.compile need attn_implementation="sdpa", "flex_attention" or "eager".'
        )
    keys = cache.get_mask_sizes(queries, 0)[0] if cache is not None else queries
    prefix = _at_keys(prefix, past, keys, before=False, after=False)
    if packed:
        documents = _at_keys(documents, past, keys, before=EVERYONES, after=0)
    return mask_like(prefix, documents if packed else None)


def _backend_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    prefix: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
) -> torch.Tensor | BlockMask | None:
    """transformers' mask of (causal or in `prefix`) and the same of `documents` and no padding; all are [batch, keys]."""
    return create_causal_mask(
        config,
        inputs_embeds,
        attention_mask,
        cache,
        or_mask_function=None if prefix is None else prefix_mask_function(prefix),
        and_mask_function=None if documents is None else packed_mask_function(documents),
    )


def prefix_mask_function(prefix: torch.Tensor) -> Callable:
    """The `or_mask_function` of transformers' mask makers: the key is in `prefix` [batch, keys]."""

    prefix = fixed_size(prefix)

    def mask_function(batch_idx, head_idx, q_idx, kv_idx):
        return prefix[batch_idx, kv_idx]

    return mask_function


def packed_mask_function(documents: torch.Tensor) -> Callable:
    """The `and_mask_function`: key and query have the same number in `documents` [batch, keys], or the key has EVERYONES."""

    documents = fixed_size(documents)

    def mask_function(batch_idx, head_idx, q_idx, kv_idx):
        document = documents[batch_idx, kv_idx]
        return (document == documents[batch_idx, q_idx]) | (document == EVERYONES)

    return mask_function


def _at_keys(tokens: torch.Tensor, past: int | torch.Tensor, keys: int, before: int | bool, after: int | bool):
    """[batch, queries] -> [batch, keys], with `before` at the keys in front of the queries and `after` behind them."""
    index = torch.arange(keys, device=tokens.device) - past
    result = tokens[:, index.clamp(0, tokens.shape[1] - 1)]
    return result.masked_fill(index < 0, before).masked_fill(index >= tokens.shape[1], after)


def _check_mask(attention_mask: torch.Tensor | None, batch: int, queries: int, past: int | torch.Tensor) -> None:
    if attention_mask is None:
        return
    needed = past + queries if isinstance(past, int) else queries
    if attention_mask.ndim != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < needed:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, but must be [batch, cached + new tokens] = "
            f"[{batch}, {needed}] or 4-D."
        )


def _given_mask(
    backend: str,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    cache: Cache | None,
    learned_keys: int,
) -> torch.Tensor | BlockMask:
    """A 4-D mask in the form that the backend reads, as long as the keys."""
    if backend not in MASK_BACKENDS:
        raise ValueError(
            f"attn_implementation={backend!r} takes no 4-D `attention_mask`: pass a 2-D mask, or use one of "
            f"{', '.join(MASK_BACKENDS)}."
        )
    queries = inputs_embeds.shape[1]
    keys = cache.get_mask_sizes(queries, 0)[0] if cache is not None else queries
    if attention_mask.shape[-2] != queries or attention_mask.shape[-1] > keys:
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, but the cache and the input together ask for "
            f"[batch, 1, {queries}, {keys}]."
        )
    additive = attention_mask.is_floating_point()
    if additive and backend == "flex_attention":
        raise ValueError("flex_attention takes a 4-D `attention_mask` only as bool, True where a query sees a key")
    if not additive:
        attention_mask = attention_mask != 0
    lowest = torch.finfo(inputs_embeds.dtype).min if additive else False
    if attention_mask.shape[-1] < keys:
        attention_mask = F.pad(attention_mask, (learned_keys, 0), value=not additive)
        # A static cache has room for more keys than there are.
        attention_mask = F.pad(attention_mask, (0, keys - attention_mask.shape[-1]), value=lowest)
    if backend == "flex_attention":
        batch, device = inputs_embeds.shape[0], attention_mask.device
        visible = attention_mask[:, 0].expand(batch, -1, -1)
        look_up = lookup_mask(visible, torch.zeros((), dtype=torch.long, device=device))
        return block_mask(look_up, batch, queries, keys, device)
    if backend == "eager" and not additive:
        additive_mask = torch.zeros_like(attention_mask, dtype=inputs_embeds.dtype)
        return additive_mask.masked_fill(~attention_mask, torch.finfo(inputs_embeds.dtype).min)
    return attention_mask


# --- where the texts are ---------------------------------------------------------------------------------------------


def find_layout(prefix: torch.Tensor, documents: torch.Tensor | None, past: int = 0) -> PrefixLMLayout | None:
    """The layout of a batch, or None if its texts are not what two calls can compute.

    Args:
        prefix: [batch, length], True for the prefix of each text.
        documents: [batch, length], 0 for padding and one number for each text of a row; None: a row is one text.
        past: number of keys in front that every token sees.

    Returns:
        None if a text has padding inside, or prefix tokens behind other tokens.
    """
    batch, length = prefix.shape
    if documents is None:
        documents = torch.ones_like(prefix)
    documents, prefix = documents.to("cpu", torch.long), prefix.cpu()
    border = F.pad(documents, (1, 1), value=0).diff(dim=1) != 0  # [batch, length + 1]
    token = documents != 0
    row, start = (border[:, :-1] & token).nonzero(as_tuple=True)
    end = (border[:, 1:] & token).nonzero(as_tuple=True)[1] + 1
    if torch.unique(torch.stack([row, documents[row, start]]), dim=1).shape[1] != row.numel():
        return None  # one number in two places of a row
    count = F.pad((prefix & token).cumsum(1), (1, 0))
    middle = start + count[row, end] - count[row, start]
    if (count[row, middle] - count[row, start] != middle - start).any():
        return None

    texts: list[list[Text]] = [[] for _ in range(batch)]
    for index, *borders in torch.stack([row, start, middle, end], dim=1).tolist():
        texts[index].append(Text(*borders))
    rows = defaultdict(list)
    for index, row_texts in enumerate(texts):
        rows[tuple(row_texts)].append(index)
    return PrefixLMLayout({tuple(same): row_texts for row_texts, same in rows.items()}, past, length)


def _hides_past(attention_mask: torch.Tensor | None, queries: int) -> bool:
    return attention_mask is not None and bool((attention_mask[:, :-queries] == 0).any())


# --- the two calls ---------------------------------------------------------------------------------------------------


def prefix_lm_attention(backend: str, interface: Callable | None = None) -> Callable:
    """The attention function of a backend, which takes a [`PrefixLMLayout`] for its `attention_mask` too.

    Same arguments and results as transformers' attention functions, of which `interface` is the backend's.
    """
    if interface is None:
        interface = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)

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
    """Two calls of torch's `scaled_dot_product_attention` for each text; rows with the same texts go together.

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
    for rows, texts in layout.rows.items():
        q, k, v = query, key, value
        if len(rows) < query.shape[0]:
            index = torch.tensor(rows, device=query.device)
            q, k, v = (states.index_select(0, index) for states in (query, key, value))
        pieces, done = [], 0
        for start, middle, end in texts:
            pieces.append(_nothing(q, start - done))
            if middle > start:
                keys, values = (_text_keys(states, layout.past, start, middle) for states in (k, v))
                pieces.append(attend(q[:, :, start:middle], keys, values))
            if end > middle:
                keys, values = (_text_keys(states, layout.past, start, end) for states in (k, v))
                pieces.append(_causal_at_the_end(attend, q[:, :, start:end], keys, values, end - middle))
            done = end
        pieces.append(_nothing(q, layout.length - done))
        outputs.append(torch.cat(pieces, dim=2).transpose(1, 2))
    if len(outputs) == 1:
        return outputs[0]
    order = torch.tensor([row for rows in layout.rows for row in rows], device=query.device)
    return torch.cat(outputs).index_select(0, order.argsort())


def _nothing(query: torch.Tensor, length: int) -> torch.Tensor:
    """The output of `length` tokens of padding, [batch, heads, length, head_dim]."""
    return query.new_zeros(*query.shape[:2], length, query.shape[3])


def _text_keys(states: torch.Tensor, past: int, start: int, end: int) -> torch.Tensor:
    """The keys (or values) in front and those of tokens `start` to `end`."""
    if start == 0 or past == 0:
        return states[:, :, start if past == 0 else 0 : past + end]
    return torch.cat([states[:, :, :past], states[:, :, past + start : past + end]], dim=2)


def _causal_at_the_end(
    attend: Callable, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, count: int
) -> torch.Tensor:
    """Attention of the last `count` queries, where the last query sees all keys, the one before it all but one, …

    SDPA's own causal mask starts at the first query and the first key, so it does not fit when there are more keys than
    queries. CUDA kernels have the other alignment too. On a CPU, plain causal attention of all queries, the first of
    which are thrown away, is fastest when there are few of those; else blocks of rows get a mask of BLOCK × keys.
    """
    keys = key.shape[2]
    hidden = keys - count  # keys before the triangle
    last = query[:, :, query.shape[2] - count :]
    if count == 1:
        return attend(last, key, value)
    if hidden == 0 or (keys == query.shape[2] and hidden <= keys // 4 and query.device.type == "cpu"):
        return attend(query, key, value, is_causal=True)[:, :, hidden:]
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
        seen = hidden + first + rows
        mask = band[:rows, keys + rows - seen : keys + rows]
        queries = last[:, :, first : first + rows]
        outputs.append(attend(queries, key[:, :, :seen], value[:, :, :seen], attn_mask=mask[None, None]))
    return torch.cat(outputs, dim=2)


def two_flash_calls(
    interface: Callable,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    layout: PrefixLMLayout,
    **kwargs,
) -> torch.Tensor:
    """Two calls of flash attention's form for sequences of different lengths, over the tokens of the whole batch.

    Its causal mask ends at the last query and the last key of each sequence (flash-attn 2.1 and later).

    Args:
        interface: transformers' `flash_attention_forward` for a module; the rest as in `two_sdpa_calls`.
    """
    batch, heads, length, head_dim = query.shape
    total, past = key.shape[2], layout.past
    texts = sorted((row, text) for rows, row_texts in layout.rows.items() for row in rows for text in row_texts)
    query, key, value = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    output = query.new_zeros(batch * length, heads, head_dim)
    for causal in (False, True):
        q_index, k_index = [], []
        for row, (start, middle, end) in texts:
            first, last = (middle, end) if causal else (start, middle)
            if last > first:
                q_index.append(torch.arange(row * length + first, row * length + last))
                front = row * total
                k_index.append(
                    torch.cat(
                        [torch.arange(front, front + past), torch.arange(front + past + start, front + past + last)]
                    )
                )
        if not q_index:
            continue
        q_lengths, k_lengths = (torch.tensor([len(index) for index in indices]) for indices in (q_index, k_index))
        q_tokens, k_tokens = (torch.cat(indices).to(query.device) for indices in (q_index, k_index))
        result, _ = interface(
            query[q_tokens].transpose(0, 1)[None],
            key[k_tokens].transpose(0, 1)[None],
            value[k_tokens].transpose(0, 1)[None],
            None,
            is_causal=causal,
            cu_seq_lens_q=F.pad(q_lengths.cumsum(0), (1, 0)).to(query.device, torch.int32),
            cu_seq_lens_k=F.pad(k_lengths.cumsum(0), (1, 0)).to(query.device, torch.int32),
            max_length_q=int(q_lengths.max()),
            max_length_k=int(k_lengths.max()),
            **kwargs,
        )
        output = output.index_copy(0, q_tokens, result[0].to(output.dtype))
    return output.view(batch, length, heads, head_dim)
