"""ALiBi on flash-attn: the bias is an argument of its kernels (`alibi_slopes`), padding and packing are sequences.

flash-attn adds −slope·|i + keys − queries − j|: queries are the last of their sequence's keys, which is how a cache is
continued. It has no mask, so tokens are gathered into sequences without padding. A sequence with padding inside would
lose the distance that the padding takes, so it is refused. flash-attn 3 and 4 have no ALiBi.
"""

import os
from typing import NamedTuple

import torch

from .masks import Stretches, find_sequences


class FlashSequences(NamedTuple):
    """The sequences of a batch, among the flattened [batch · queries] and [batch · keys]."""

    queries: Stretches
    keys: Stretches


def flash_sequences(numbers: torch.Tensor, queries: int) -> FlashSequences | None:
    """The sequences of a batch; None if they are whole rows without padding.

    Args:
        numbers: [batch, keys], 0 for padding, equal for the tokens of one sequence.
        queries: the last so many of the keys are the queries.

    Raises:
        ValueError: a row holds one sequence in two places, as with padding inside it.
    """
    keys, device = numbers.shape[1], numbers.device
    if bool((numbers == 1).all()):
        return None
    found = find_sequences(numbers)
    if found is None:
        raise ValueError(
            "`attention_mask` has padding inside a sequence, which flash attention would close up, and ALiBi counts "
            'distances over it: pad on one side only (the left, to generate), or use attn_implementation="sdpa".'
        )
    past = keys - queries
    row, start, end = (column[found[2] > past] for column in found)  # a sequence that is over has no queries
    in_queries = row * queries - past
    return FlashSequences(
        Stretches.between(in_queries + start.clamp(min=past), in_queries + end, device),
        Stretches.between(row * keys + start, row * keys + end, device),
    )


def flash_attention_with_slopes(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    slopes: torch.Tensor,
    sequences: FlashSequences | None,
    scaling: float,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Causal attention with ALiBi by flash-attn 2.

    Args:
        query: [batch, heads, queries, head_dim], half precision.
        key, value: [batch, key_value_heads, keys, head_dim]; the queries are the last of the keys.
        slopes: [heads], fp32.
        sequences: None when no row has padding or several sequences.

    Returns:
        [batch, queries, heads, head_dim]; 0 at padding.
    """
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    options = {
        "dropout_p": dropout,
        "softmax_scale": scaling,
        "causal": True,
        "alibi_slopes": slopes,
        "deterministic": os.getenv("FLASH_ATTENTION_DETERMINISTIC", "0") == "1",  # as transformers' own path
    }
    if sequences is None:
        return flash_attn_func(query, key, value, **options)
    if sequences.queries.longest == 0:
        return torch.zeros_like(query)
    queries, keys = sequences
    output = flash_attn_varlen_func(
        query.flatten(0, 1)[queries.tokens],
        key.flatten(0, 1)[keys.tokens],
        value.flatten(0, 1)[keys.tokens],
        queries.borders,
        keys.borders,
        queries.longest,
        keys.longest,
        **options,
    )
    return output.new_zeros(query.flatten(0, 1).shape).index_copy(0, queries.tokens, output).view(query.shape)
