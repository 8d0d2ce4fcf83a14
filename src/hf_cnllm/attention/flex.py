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


def fixed_number(number: int | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A tensor of `number` as it is now: a static cache counts in one that moves on, and an int would be compiled in."""
    return torch.full((), number, device=device) if isinstance(number, int) else number.to(device, copy=True)


def make_block_mask(
    mask_function: Callable,
    batch: int,
    queries: int,
    keys: int,
    device: torch.device,
    first_query: int | torch.Tensor = 0,
    first_key: int | torch.Tensor = 0,
) -> BlockMask:
    """The block mask of `mask_function(batch, head, query position, key position)`, whose positions count on from the first
    of each."""
    first_query, first_key = fixed_number(first_query, device), fixed_number(first_key, device)

    def at_positions(batch_idx, head_idx, q_idx, kv_idx):
        return mask_function(batch_idx, head_idx, q_idx + first_query, kv_idx + first_key)

    # torch's compiler for CPUs stumbles over some of these functions, and there the mask is quickly made without it.
    return create_block_mask(at_positions, batch, None, queries, keys, device=device, _compile=device.type != "cpu")
