"""ALiBi on flash-attn: the bias is an argument of its kernels (`alibi_slopes`), padding and packing are sequences.

flash-attn adds −slope·|i + keys − queries − j|: queries are the last of their sequence's keys, which is how a cache is
continued. It has no mask, so tokens are gathered into sequences without padding. A sequence with padding inside would
lose the distance that the padding takes, so it is refused. flash-attn 3 and 4 have no ALiBi.
"""

import os
from typing import NamedTuple

import torch
from torch import nn


class FlashSequences(NamedTuple):
    """The sequences of a batch, as `flash_attn_varlen_func` takes them.

    Attributes:
        query_tokens, key_tokens: indices into the flattened [batch · queries] and [batch · keys].
        query_borders, key_borders: [sequences + 1] int32, where each sequence begins and ends among the tokens.
        longest_query, longest_key: length of the longest sequence.
    """

    query_tokens: torch.Tensor
    key_tokens: torch.Tensor
    query_borders: torch.Tensor
    key_borders: torch.Tensor
    longest_query: int
    longest_key: int


def find_sequences(numbers: torch.Tensor, queries: int) -> FlashSequences | None:
    """The sequences of a batch; None if they are whole rows without padding.

    Args:
        numbers: [batch, keys], 0 for padding, equal for the tokens of one sequence.
        queries: the last so many of the keys are the queries.

    Raises:
        ValueError: a row holds one sequence in two places, as with padding inside it.
    """
    batch, keys = numbers.shape
    if bool((numbers == 1).all()):
        return None
    numbers = numbers.long()
    row = torch.arange(batch, device=numbers.device)[:, None].expand_as(numbers)
    begins = torch.ones_like(numbers, dtype=torch.bool)
    begins[:, 1:] = numbers[:, 1:] != numbers[:, :-1]
    sequence = begins.flatten().cumsum(0).view_as(numbers) - 1
    token = numbers != 0

    starts = begins & token
    pairs = torch.stack([row[starts], numbers[starts]], dim=1)
    if torch.unique(pairs, dim=0).shape[0] != pairs.shape[0]:
        raise ValueError(
            "`attention_mask` has padding inside a sequence, which flash attention would close up, and ALiBi counts "
            'distances over it: pad on one side only (the left, to generate), or use attn_implementation="sdpa".'
        )
    is_query = torch.zeros_like(token)
    is_query[:, keys - queries :] = token[:, keys - queries :]
    asked = torch.zeros(batch * keys, dtype=torch.bool, device=numbers.device)
    asked[sequence[is_query]] = True  # a sequence that is over has keys but no queries
    is_key = token & asked[sequence]

    query_lengths = torch.bincount(sequence[is_query], minlength=batch * keys)[asked]
    key_lengths = torch.bincount(sequence[is_key], minlength=batch * keys)[asked]
    return FlashSequences(
        query_tokens=is_query[:, keys - queries :].flatten().nonzero().flatten(),
        key_tokens=is_key.flatten().nonzero().flatten(),
        query_borders=nn.functional.pad(query_lengths.cumsum(0), (1, 0)).int(),
        key_borders=nn.functional.pad(key_lengths.cumsum(0), (1, 0)).int(),
        longest_query=max(query_lengths.tolist(), default=0),
        longest_key=max(key_lengths.tolist(), default=0),
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
    if sequences.query_tokens.numel() == 0:
        return torch.zeros_like(query)
    output = flash_attn_varlen_func(
        query.flatten(0, 1)[sequences.query_tokens],
        key.flatten(0, 1)[sequences.key_tokens],
        value.flatten(0, 1)[sequences.key_tokens],
        sequences.query_borders,
        sequences.key_borders,
        sequences.longest_query,
        sequences.longest_key,
        **options,
    )
    padded = torch.zeros(query.shape[0] * query.shape[1], *output.shape[1:], dtype=output.dtype, device=output.device)
    return padded.index_copy(0, sequences.query_tokens, output).view(query.shape)
