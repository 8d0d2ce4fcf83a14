"""Checks of what a forward pass is given, where PyTorch's own message would not say what is wrong."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig

from .._compat import (
    INSTALLED,
    OLD_CACHE_NAME,
    PAGED_CACHES,
    PIP_INSTALL,
    TESTED,
    PagedAttentionCache,
    pop_cache,
    update_as_others,
)


def check_token_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Refuses token ids outside the vocabulary with a ValueError. On accelerators nothing is looked at, as that would wait
    for them."""
    if input_ids.device.type != "cpu" or torch.compiler.is_compiling() or input_ids.numel() == 0:
        return
    smallest, largest = input_ids.aminmax()
    if smallest < 0 or largest >= vocab_size:
        row, column = ((input_ids < 0) | (input_ids >= vocab_size)).nonzero()[0].tolist()
        raise ValueError(
            f"`input_ids[{row}, {column}]` is {input_ids[row, column].item()}, but the model's vocabulary has ids 0 to "
            f"{vocab_size - 1} (`vocab_size`). Is the tokenizer that of this checkpoint?"
        )


def validate_inputs(
    config: PreTrainedConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    cache: Cache | None,
    kwargs: dict[str, Any],
) -> Cache | None:
    """Refuses what a forward pass cannot begin with, before any work, and returns its cache, see [`take_cache`].

    Args:
        input_ids, inputs_embeds: [batch, length] or [batch, length, hidden_size]; one of the two is given.
        kwargs: the forward pass's other arguments, among them perhaps the cache by its old name.

    Raises:
        ValueError: naming the argument and what to pass instead.
    """
    cache = take_cache(cache, kwargs)
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if input_ids is not None:
        check_token_ids(input_ids, config.vocab_size)
    batch_size, length = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
    if length == 0:
        raise ValueError("`input_ids` (or `inputs_embeds`) holds sequences of length 0; give at least one token.")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    heads = getattr(config, "num_key_value_heads", None) or heads
    check_cache(cache, batch_size, config.num_hidden_layers, heads, head_dim)
    return cache


def take_cache(cache: object, kwargs: dict[str, Any]) -> Any:
    """The cache of a forward pass, by whichever of its names it came, see [`pop_cache`].

    Raises:
        TypeError: a cache came by both, or under another keyword. There it would be ignored, and the answer silently
            wrong: this is how 5.24, which renamed the keyword, broke models that did not know.
    """
    if OLD_CACHE_NAME in kwargs:
        cache = pop_cache(kwargs, cache)
    for name, value in kwargs.items():
        if isinstance(value, (Cache, *PAGED_CACHES)):
            raise TypeError(
                f"the model got a {type(value).__name__} as `{name}`, which it does not know: pass it as `cache`. If "
                f"this call is transformers' own, its release {INSTALLED} has renamed the argument; hf_cnllm works with "
                f"{TESTED}: {PIP_INSTALL}"
            )
    return update_as_others(cache) if isinstance(cache, PagedAttentionCache) else cache


def cached_length(cache: Cache | None, learned_keys: int | None = None) -> int | Tensor:
    """How many tokens `cache` holds; the learned keys of P-tuning, which come with the first of them, are none."""
    if cache is None or isinstance(cache, PAGED_CACHES):
        return 0
    length = cache.get_seq_length()
    return length - learned_keys if learned_keys and isinstance(length, int) and length else length


def check_cache(cache: Cache | None, batch_size: int, num_layers: int, num_heads: int, head_dim: int) -> None:
    """Refuses, with a ValueError, a cache that another model filled or that holds other sequences, and the tuples of older
    versions."""
    if cache is None or isinstance(cache, PAGED_CACHES):
        return
    if not isinstance(cache, Cache):
        raise ValueError(
            f"`cache` is of type {type(cache).__name__}, but must be a transformers `Cache`, such as "
            "`DynamicCache()`, which a forward pass with `use_cache=True` returns."
        )
    if not cache.layers:
        return
    grows = getattr(cache, "layer_class_to_replicate", None) is not None
    if len(cache.layers) > num_layers or (len(cache.layers) < num_layers and not grows):
        raise ValueError(
            f"`cache` has {len(cache.layers)} layers, but the model has {num_layers}. "
            "Was the cache filled by another model?"
        )
    keys = getattr(cache.layers[0], "keys", None)
    if not isinstance(keys, Tensor) or keys.ndim != 4 or keys.numel() == 0:
        return
    if (keys.shape[1], keys.shape[3]) != (num_heads, head_dim):
        raise ValueError(
            f"`cache` holds {keys.shape[1]} heads of {keys.shape[3]} dimensions, but the model has {num_heads} "
            f"of {head_dim}. Was the cache filled by another model?"
        )
    if keys.shape[0] != batch_size:
        raise ValueError(
            f"`cache` holds {keys.shape[0]} sequences, but the inputs are {batch_size}. "
            "Pass the cache of these sequences, or expand it with its own methods."
        )
