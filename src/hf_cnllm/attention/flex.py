"""Flex attention's block masks, made so that they compile on every device, at every size and with every cache.

transformers' own refer to the length of a static cache, which has moved on when the mask is read, and look padding up in
tensors of changing sizes, which torch's flex attention for CPUs does not compile.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


def fixed_size(lookup: torch.Tensor) -> torch.Tensor:
    """`lookup` [batch, ...] with zeros behind it up to sizes that seldom change, for mask functions to read."""
    if lookup.device.type != "cpu":
        return lookup
    padding = []
    for dim in reversed(range(lookup.ndim)):
        step = 16 if dim == 0 and lookup.ndim > 1 else 1024
        padding += [0, -lookup.shape[dim] % step]
    lookup = F.pad(lookup, padding)
    torch._dynamo.mark_static(lookup)
    return lookup


def make_block_mask(
    mask_function: Callable, batch: int, query_positions: torch.Tensor, key_positions: torch.Tensor
) -> BlockMask:
    """The block mask of `mask_function(batch, head, query position, key position)` at positions [queries] and [keys]."""
    queries, keys, device = len(query_positions), len(key_positions), query_positions.device
    query_positions, key_positions = fixed_size(query_positions), fixed_size(key_positions)

    def at_positions(batch_idx, head_idx, q_idx, kv_idx):
        return mask_function(batch_idx, head_idx, query_positions[q_idx], key_positions[kv_idx])

    # torch's compiler for CPUs stumbles over some of these functions, and there the mask is quickly made without it.
    return create_block_mask(at_positions, batch, None, queries, keys, device=device, _compile=device.type != "cpu")
