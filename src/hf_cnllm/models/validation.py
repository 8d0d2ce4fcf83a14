"""Checks of what a forward pass is given, where PyTorch's own message would not say what is wrong."""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig

from .._compat import INSTALLED, OLD_CACHE_NAME, PIP_INSTALL, TESTED
from .._compat.modeling import PAGED_CACHES, PagedAttentionCache, pop_cache, update_as_others
from ..attention.mask_values import is_readable

# What embedding tables take.
ID_DTYPES = (torch.int64, torch.int32)
# From here on fp32, in which angles are computed, rounds neighboring positions to the same number.
POSITION_LIMIT = 2**24
# Arguments of the originals that these models do not compute with.
NOT_COMPUTED = {
    "head_mask": "transformers' models have it no more, leave it out",
    "encoder_hidden_states": "these models are decoders alone, leave it out",
    "encoder_attention_mask": "these models are decoders alone, leave it out",
    "full_attention_mask": "pass a 4-D `attention_mask`",
    "mems": "pass `cache`",
}


def validate_inputs(
    config: PreTrainedConfig,
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Any,
    position_ids: Tensor | None,
    cache: Cache | None,
    kwargs: dict[str, Any],
    has_blocks: bool | None = None,
) -> Cache | None:
    """Refuses what a forward pass cannot begin with, before any work, and returns its cache, see [`take_cache`].

    Args:
        input_ids, inputs_embeds: [batch, length] or [batch, length, hidden_size]; one of the two is given.
        attention_mask: only its type; the rest when masks are made, see `attention.masks`.
        position_ids, has_blocks: see [`check_positions`].
        kwargs: the forward pass's other arguments, among them perhaps the cache by its old name.

    Raises:
        ValueError: naming the argument and what to pass instead.
    """
    cache = take_cache(cache, kwargs)
    for name, advice in NOT_COMPUTED.items():
        if kwargs.get(name) is not None:
            raise ValueError(f"`{name}` has no effect here: {advice}.")
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("You must specify exactly one of input_ids or inputs_embeds")
    if input_ids is not None:
        check_token_ids(input_ids, config.vocab_size)
        batch_size, length = input_ids.shape
    else:
        _check_tensor("inputs_embeds", inputs_embeds, "[batch, length, hidden_size]", 3)
        batch_size, length = inputs_embeds.shape[:2]
    if batch_size == 0 or length == 0:
        name = "input_ids" if inputs_embeds is None else "inputs_embeds"
        what = "no sequence" if batch_size == 0 else "sequences of length 0"
        raise ValueError(f"`{name}` holds {what}; give at least one token.")
    if attention_mask is not None and not isinstance(attention_mask, (Tensor, dict)):  # `generate` makes dictionaries
        raise ValueError(
            f"`attention_mask` is of type {type(attention_mask).__name__}, but must be a tensor: pass "
            "`torch.tensor(attention_mask)`."
        )
    if position_ids is not None and not isinstance(cache, PAGED_CACHES):
        check_positions(position_ids, batch_size, length, has_blocks)
    if cache is not None:
        fields = vars(config)  # a step should not pay six times for a configuration's own attribute access
        heads = fields["num_attention_heads"]
        head_dim = fields.get("kv_channels") or fields["hidden_size"] // heads
        heads = fields["multi_query_group_num"] if fields.get("multi_query_attention") else heads
        check_cache(cache, batch_size, config.num_hidden_layers, heads, head_dim)
    return cache


def check_token_ids(input_ids: Tensor, vocab_size: int) -> None:
    """Refuses, with a ValueError, what is no [batch, length] tensor of token ids. Ids outside the vocabulary are looked for
    on the CPU only: on accelerators that would wait for them."""
    _check_tensor("input_ids", input_ids, "[batch, length]", 2, ID_DTYPES)
    if input_ids.device.type != "cpu" or not is_readable(input_ids):
        return
    smallest, largest = (value.item() for value in input_ids.aminmax())
    if smallest < 0 or largest >= vocab_size:
        row, column = ((input_ids < 0) | (input_ids >= vocab_size)).nonzero()[0].tolist()
        raise ValueError(
            f"`input_ids[{row}, {column}]` is {input_ids[row, column].item()}, but the model's vocabulary has ids 0 to "
            f"{vocab_size - 1} (`vocab_size`). Is the tokenizer that of this checkpoint?"
        )


def check_positions(position_ids: Any, batch_size: int, length: int, has_blocks: bool | None = None) -> None:
    """Refuses, with a ValueError, position ids of another type or shape, and, where they are on the CPU, of other values
    than positions can have: elsewhere a look would wait for them.

    Args:
        has_blocks: whether they are [batch, 2, length], positions and block positions, which count from 0; None in models
            whose positions are relative, so that only their distances matter.
    """
    one_row = (length,)
    rows = {None: (one_row,), False: (one_row, (1, length)), True: ((2, length),)}[has_blocks]
    _check_tensor(
        "position_ids", position_ids, "[batch, 2, length]" if has_blocks else "[batch, length]", None, ID_DTYPES
    )
    if position_ids.shape[1:] not in rows or position_ids.shape[0] not in (1, batch_size):
        raise ValueError(
            f"`position_ids` has shape {tuple(position_ids.shape)}, but must be {(batch_size, *rows[0])}: "
            f"positions{' and block positions' if has_blocks else ''} of the {length} tokens."
        )
    if position_ids.device.type != "cpu" or not is_readable(position_ids):
        return
    smallest, largest = (value.item() for value in position_ids.aminmax())
    first = -POSITION_LIMIT if has_blocks is None else 0
    if smallest < first or largest > POSITION_LIMIT:
        raise ValueError(
            f"`position_ids` holds {smallest if smallest < first else largest}, but positions are numbers from {first} to "
            f"{POSITION_LIMIT}."
        )


def _check_tensor(name: str, tensor: Any, form: str, ndim: int | None, dtypes: tuple[torch.dtype, ...] = ()) -> None:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"`{name}` is of type {type(tensor).__name__}, but must be a tensor {form}.")
    if dtypes and tensor.dtype not in dtypes:
        raise ValueError(f"`{name}` is of dtype {tensor.dtype}, but must be whole numbers: pass `{name}.long()`.")
    if ndim is not None and tensor.ndim != ndim:
        raise ValueError(f"`{name}` has shape {list(tensor.shape)}, but must be {form}.")


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
