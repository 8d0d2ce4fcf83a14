"""Packed documents: several texts in one row, each seeing only itself.

Two ways to say it: position ids that restart (transformers' own, see `find_packed_sequence_indices`), or, as Baichuan's
training code has it, a 2-D attention mask that holds document numbers from 1 and 0 for padding.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig

from .._compat import is_flash_attention_requested


def fixed_size(lookup: torch.Tensor) -> torch.Tensor:
    """`lookup` [batch, ...] with zeros behind it up to sizes that seldom change: torch's flex attention for CPUs does
    not compile a mask function that looks things up in a tensor of a changing size."""
    if lookup.device.type != "cpu":
        return lookup
    padding = []
    for dim in reversed(range(lookup.ndim)):
        step = 16 if dim == 0 and lookup.ndim > 1 else 1024
        padding += [0, -lookup.shape[dim] % step]
    lookup = F.pad(lookup, padding)
    torch._dynamo.mark_static(lookup)
    return lookup


def same_document(documents: torch.Tensor) -> Callable:
    """Mask function: key and query carry the same document number in `documents` [batch, keys], and not 0."""

    documents = fixed_size(documents)

    def mask_function(batch_idx, head_idx, q_idx, kv_idx):
        document = documents[batch_idx, kv_idx]
        return (document == documents[batch_idx, q_idx]) & (document != 0)

    return mask_function


def lookup_mask(allowed: torch.Tensor, first_query: torch.Tensor) -> Callable:
    """Mask function that looks up a bool mask [batch, queries, keys], whose first row is position `first_query`, 0-d."""

    allowed = fixed_size(allowed)

    def mask_function(batch_idx, head_idx, q_idx, kv_idx):
        return allowed[batch_idx, q_idx - first_query, kv_idx]

    return mask_function


def packed_documents(config: PreTrainedConfig, attention_mask: torch.Tensor | None) -> Callable | None:
    """The `and_mask_function` of transformers' mask makers for a 2-D mask that holds document numbers, else None.

    Raises:
        ValueError: flash attention, which knows packed documents only by restarting `position_ids`.
    """
    if attention_mask is None or attention_mask.ndim != 2 or attention_mask.dtype == torch.bool:
        return None
    if torch.compiler.is_compiling() or attention_mask.max() <= 1:
        return None
    if is_flash_attention_requested(config):
        raise ValueError(
            "`attention_mask` holds document numbers, which flash attention cannot follow: leave it out and pass "
            "`position_ids` that restart at every document."
        )
    return same_document(attention_mask)
