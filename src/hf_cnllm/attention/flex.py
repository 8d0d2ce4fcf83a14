"""Flex attention's masks, made so that they compile on every device at every size and with every cache.

transformers' own refer to the length of a static cache, which has moved on when the mask is read, and look padding up in
tensors of changing sizes, which torch's flex attention for CPUs does not compile.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import Cache, PreTrainedConfig

from .. import _compat
from .._compat import (
    and_masks,
    causal_mask_function,
    find_packed_sequence_indices,
    or_masks,
    padding_mask_function,
)
from .packing import fixed_size, same_document


def create_causal_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_ids: torch.Tensor | None = None,
    or_mask_function: Callable | None = None,
    and_mask_function: Callable | None = None,
) -> torch.Tensor | BlockMask | None:
    """transformers' function of this name; with flex attention [`causal_block_mask`] makes the mask.

    Without mask and cache, restarts in `position_ids` (batch or 1, length) separate packed documents.
    """
    is_2d = attention_mask is None or (isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2)
    if config._attn_implementation != "flex_attention" or not is_2d:
        return _compat.create_causal_mask(
            config,
            inputs_embeds,
            attention_mask,
            cache,
            position_ids,
            or_mask_function=or_mask_function,
            and_mask_function=and_mask_function,
        )
    if position_ids is not None and attention_mask is None and cache is None:
        documents = find_packed_sequence_indices(position_ids.expand(inputs_embeds.shape[0], -1))
        and_mask_function = and_mask_function if documents is None else same_document(documents + 1)
    return causal_block_mask(inputs_embeds, attention_mask, cache, or_mask_function, and_mask_function)


def causal_block_mask(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    or_mask_function: Callable | None = None,
    and_mask_function: Callable | None = None,
) -> BlockMask:
    """A query sees a token up to itself, or that `or_mask_function` shows it, unless `and_mask_function` hides it.

    Args:
        inputs_embeds: [batch, queries, ...]; only shape and device are read.
        attention_mask: [batch, past + queries], 0 for padding; or None.
        cache: the cache before this forward pass.
        or_mask_function, and_mask_function: as those of transformers' mask makers, of absolute positions.
    """
    batch, queries = inputs_embeds.shape[:2]
    past, keys = 0, queries
    if cache is not None:
        # Layers with windows keep less; this is the mask of those without.
        layer_idx = cache.is_sliding.index(False) if False in cache.is_sliding else 0
        past, keys = cache.get_query_offset(layer_idx), cache.get_mask_sizes(queries, layer_idx)[0]
    positions = fixed_size(torch.arange(queries, device=inputs_embeds.device) + past)
    mask_function = causal_mask_function
    if or_mask_function is not None:
        mask_function = or_masks(mask_function, or_mask_function)
    if and_mask_function is not None:
        mask_function = and_masks(mask_function, and_mask_function)
    if attention_mask is not None:
        tokens = F.pad(attention_mask != 0, (0, max(0, keys - attention_mask.shape[1])))
        mask_function = and_masks(mask_function, padding_mask_function(fixed_size(tokens)))

    def from_positions(batch_idx, head_idx, q_idx, kv_idx):
        return mask_function(batch_idx, head_idx, positions[q_idx], kv_idx)

    return block_mask(from_positions, batch, queries, keys, inputs_embeds.device)


def block_mask(mask_function: Callable, batch: int, queries: int, keys: int, device: torch.device) -> BlockMask:
    # torch's compiler for CPUs stumbles over some of these functions, and there the mask is quickly made without it.
    return create_block_mask(mask_function, batch, None, queries, keys, device=device, _compile=device.type != "cpu")
