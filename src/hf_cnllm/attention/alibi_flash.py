"""ALiBi on flash-attn: the bias is an argument of its kernels (`alibi_slopes`), padding and packing are sequences.

flash-attn adds −slope·|i + keys − queries − j|: queries are the last of their sequence's keys, which is how a cache is
continued. It has no mask, so tokens are gathered into sequences without padding. A sequence with padding inside would
lose the distance that the padding takes, so it is refused. flash-attn 3 and 4 have no ALiBi.
"""

import os
from typing import NamedTuple

import torch

from .._compat.modeling import get_target_dtype
from .masks import AttentionMask
from .stretches import Stretches, find_sequences


class FlashAlibi(NamedTuple):
    """For flash attention.

    Attributes:
        slopes: [heads], fp32.
        keys: how many there are; a static cache has room for more.
        sequences: those of the batch among the flattened [batch · queries] and [batch · keys]; None: they are whole rows.
    """

    slopes: torch.Tensor
    keys: int
    sequences: tuple[Stretches, Stretches] | None = None


def make_flash_alibi(slopes: torch.Tensor, mask: AttentionMask) -> FlashAlibi:
    """What all layers of a forward pass share.

    Raises:
        ValueError: the mask is one for single queries and keys, or a row holds one sequence in two places, as with
            padding inside it.
    """
    if mask.complete is not None:
        raise ValueError(
            "flash attention takes no mask for single queries and keys: give a 2-D `attention_mask`, or use "
            'attn_implementation="sdpa".'
        )
    past, keys = int(mask.past), int(mask.past) + mask.queries
    if mask.sequences is None or bool((mask.sequences[:, :keys] == 1).all()):
        return FlashAlibi(slopes, keys)
    found = find_sequences(mask.sequences[:, :keys])
    if found is None:
        raise ValueError(
            "`attention_mask` has padding inside a sequence, which flash attention would close up, and ALiBi counts "
            'distances over it: pad on one side only (the left, to generate), or use attn_implementation="sdpa".'
        )
    row, start, end = (column[found[2] > past] for column in found)  # a sequence that is over has no queries
    in_queries, in_keys = row * mask.queries - past, row * keys
    queries_of = Stretches.between(in_queries + start.clamp(min=past), in_queries + end, mask.device)
    return FlashAlibi(slopes, keys, (queries_of, Stretches.between(in_keys + start, in_keys + end, mask.device)))


def alibi_flash_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """flash-attn 2 with its own ALiBi; the output is 0 at padding. Called as `alibi`'s other attention functions."""
    try:
        from flash_attn import flash_attn_func, flash_attn_varlen_func
    except ImportError as error:
        raise ImportError(f"flash_attention_2 needs flash-attn ({error}): pip install flash-attn") from error

    slopes, keys, sequences = attention_mask
    dtype = get_target_dtype(query, module) or query.dtype  # norms kept in fp32 make fp32 queries
    query, key, value = (states.to(dtype).transpose(1, 2) for states in (query, key[:, :, :keys], value[:, :, :keys]))
    options = {
        "dropout_p": dropout,
        "softmax_scale": scaling,
        "causal": True,
        "alibi_slopes": slopes,
        "deterministic": os.getenv("FLASH_ATTENTION_DETERMINISTIC", "0") == "1",  # as transformers' own path
    }
    if sequences is None:
        return flash_attn_func(query, key, value, **options), None
    queries, keys = sequences
    if queries.longest == 0:
        return torch.zeros_like(query), None
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
    padded = output.new_zeros(query.flatten(0, 1).shape).index_copy(0, queries.tokens, output)
    return padded.view(query.shape), None
