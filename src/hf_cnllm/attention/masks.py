"""Who sees whom: the one place where an `attention_mask` is checked and brought into one form.

| `attention_mask`                 | says                                                                               |
|----------------------------------|------------------------------------------------------------------------------------|
| None                             | every row is one sequence                                                          |
| [batch, keys]                    | 0 for padding on any side, 1 for tokens; or numbers from 1 to the row's length, one for |
|                                  | each sequence packed into a row; in any dtype                                           |
| [batch, queries, keys]           | 0/1, 1 where a query sees a key, if it is not after it (ALiBi only)                |
| [batch or 1, 1, queries, keys]   | bool or 0/1, True where a query sees a key; or additive: this says everything      |

Everything else is refused, in the same words for all models; values are read where that needs no look of its own (see
`mask_values.check_mask`). Keys are those in the cache and the new ones. Sequences may also be packed without a mask, by `position_ids` that restart.
Flash attention, which takes no mask for single queries and keys, knows packing only like that.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, PreTrainedConfig

from .._compat import modeling
from .._compat.modeling import (
    PAGED_CACHES,
    and_masks,
    causal_mask_function,
    find_packed_sequence_indices,
    is_flash_attention_requested,
    is_tracing,
    or_masks,
    padding_mask_function,
    sliding_window_overlay,
)
from .flex import fixed_size, make_block_mask
from .layer_types import FULL, SLIDING
from .mask_values import check_mask, is_readable

# The number of keys that the queries of every sequence see.
EVERYONES = -1
# What is added to a score to hide its key: this or less, for all of which softmax gives 0.
HIDES = -1e4
# What eager attention, whose softmax is in fp32, can add at most.
LOWEST = torch.finfo(torch.float32).min


@dataclass(frozen=True)
class AttentionMask:
    """An `attention_mask` that has been checked, beside the sizes of its forward pass; `sequences` or `complete`, or neither.

    Attributes:
        queries, keys: lengths of what the attention function gets, the free room of a static cache included.
        past: number of keys in front of the first query; a static cache counts in a tensor.
        sequences: [batch, past + queries] or [batch, keys], 0 for padding, equal numbers for the tokens of one sequence.
        packed: whether there may be several sequences in a row; None while tracing, where values cannot be read.
        complete: [batch or 1, heads or 1, queries, keys], bool or additive; there is no causality besides.
    """

    batch: int
    queries: int
    keys: int
    past: int | torch.Tensor
    device: torch.device
    sequences: torch.Tensor | None = None
    packed: bool | None = False
    complete: torch.Tensor | None = None

    @property
    def query_positions(self) -> torch.Tensor:
        return torch.arange(self.queries, device=self.device) + self.past

    @property
    def key_positions(self) -> torch.Tensor:
        return torch.arange(self.keys, device=self.device)

    @property
    def hides_nothing(self) -> bool:
        """Whether this is one query of each row that sees every key, as in decoding without padding."""
        is_free = self.sequences is None and self.complete is None
        return is_free and self.queries == 1 and isinstance(self.past, int) and self.keys == self.past + 1

    def additive(self, dtype: torch.dtype) -> torch.Tensor:
        """[batch or 1, 1, queries, keys]: 0, or the dtype's minimum where a query may not look: unlike −inf, it leaves a row
        finite that may look nowhere, as all padding does here."""
        return as_additive(self.seen() if self.complete is None else self.complete, dtype)

    def seen(self, or_mask_function: Callable | None = None, padding_sees: bool = False) -> torch.Tensor:
        """[batch or 1, 1, queries, keys], True where a query may look.

        Args:
            or_mask_function: as in [`make_mask`].
            padding_sees: `sequences` tell padding alone, and queries of padding see tokens as others do.
        """
        rows = torch.arange(self.batch, device=self.device)[:, None, None]
        queries, keys = self.query_positions[:, None], self.key_positions
        seen = keys <= queries
        if or_mask_function is not None:
            seen = seen | or_mask_function(rows, None, queries, keys)
        if self.sequences is not None:
            sequences = _up_to(self.sequences, self.keys)
            shown = padding_mask_function(sequences != 0) if padding_sees else same_sequence(sequences)
            seen = seen & shown(rows, None, queries, keys)
        return seen.view(-1, 1, self.queries, self.keys)

    def block_mask(
        self, cache: Cache | None = None, or_mask_function: Callable | None = None, window: int | None = None
    ) -> BlockMask:
        """For flex attention; arguments as in [`make_mask`]."""
        if self.complete is not None:
            return make_block_mask(self._look_up(), self.batch, self.queries, self.keys, self.device)
        keys, first_key = self.keys, 0
        if window is not None and cache is not None:  # layers with windows keep less
            keys, first_key = cache.get_mask_sizes(self.queries, _layer_of(cache, sliding=True))
        causal = causal_mask_function if or_mask_function is None else or_masks(causal_mask_function, or_mask_function)
        functions = [causal] if window is None else [causal, sliding_window_overlay(window)]
        if self.sequences is not None:
            sequences = _up_to(self.sequences, first_key + keys)
            if self.packed is False:
                functions.append(padding_mask_function(fixed_size(sequences != 0)))
            else:
                functions.append(same_sequence(fixed_size(sequences), padding_sees=self.packed is None))
        return make_block_mask(
            and_masks(*functions), self.batch, self.queries, keys, self.device, self.past, first_key
        )

    def _look_up(self) -> Callable:
        """The mask function that looks `complete` up, by places among its queries and keys."""
        if self.complete.shape[1] != 1:
            raise ValueError("flex_attention takes a 4-D `attention_mask` that is the same for all heads")
        pairs = fixed_size(as_bool(self.complete)[:, 0].expand(self.batch, -1, -1))

        def mask_function(batch_idx, head_idx, q_idx, kv_idx):
            return pairs[batch_idx, q_idx, kv_idx]

        return mask_function


def read_mask(
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    learned_keys: int = 0,
    forms: tuple[int, ...] = (2, 4),
) -> AttentionMask:
    """Checks an `attention_mask` and brings it into one form.

    Args:
        inputs_embeds: [batch, queries, ...]; only shape and device are read.
        cache: before this forward pass.
        learned_keys: how many of the cache's first keys are learned (P-tuning). All see them, and the mask does not
            count them.
        forms: the numbers of dimensions that the mask may have.

    Raises:
        ValueError: the mask does not fit, or is True where the original ChatGLM-6B hid a key.
    """
    batch, queries = inputs_embeds.shape[:2]
    past, keys = 0, queries
    if cache is not None:
        layer = _layer_of(cache, sliding=False)
        past, keys = cache.get_query_offset(layer), cache.get_mask_sizes(queries, layer)[0]
    mask = AttentionMask(batch, queries, keys, past, inputs_embeds.device)
    if attention_mask is None:
        return mask
    packed = check_mask(attention_mask, batch, past - learned_keys, queries, keys, forms)
    attention_mask = attention_mask.to(mask.device)
    if attention_mask.ndim == 2:
        everyones: bool | int = True
        if attention_mask.dtype != torch.bool:
            attention_mask, everyones = attention_mask.long(), EVERYONES
        return replace(mask, sequences=F.pad(attention_mask, (learned_keys, 0), value=everyones), packed=packed)
    is_causal = attention_mask.ndim == 3
    if is_causal or not attention_mask.is_floating_point():
        attention_mask = attention_mask != 0
    is_bool = attention_mask.dtype == torch.bool
    if attention_mask.shape[-1] < keys:
        unseen = False if is_bool else torch.finfo(attention_mask.dtype).min
        attention_mask = F.pad(attention_mask, (learned_keys, 0), value=True if is_bool else 0.0)
        attention_mask = F.pad(attention_mask, (0, keys - attention_mask.shape[-1]), value=unseen)
    if is_causal:
        attention_mask = attention_mask[:, None] & (mask.key_positions <= mask.query_positions[:, None])
    else:
        _refuse_inverted(attention_mask, mask)
    return replace(mask, complete=attention_mask)


def _refuse_inverted(pairs: torch.Tensor, mask: AttentionMask) -> None:
    """Refuses a 4-D bool mask in which no query sees itself: the original ChatGLM-6B's masks were True where a key is
    hidden. Its padding was hidden from all, so rows that are True throughout tell nothing."""
    if pairs.dtype != torch.bool or mask.queries == 1 or not is_readable(pairs):
        return
    itself = pairs.gather(-1, mask.query_positions.expand(*pairs.shape[:2], -1)[..., None])[..., 0]
    tells = ~pairs.all(-1)
    if tells.any() and not (itself & tells).any():
        raise ValueError(
            "no query sees itself in `attention_mask`: it seems to be True where a key is hidden, as the original "
            "ChatGLM-6B has it, but must be True where a query sees a key. Pass `~attention_mask`."
        )


def positions_in_sequences(attention_mask: torch.Tensor) -> torch.Tensor:
    """[batch, keys] places of a 2-D mask's tokens in their sequences, from 0; padding has any that is not negative. No value
    is looked at: 0/1 and numbers are told apart by what they come to."""
    tokens = attention_mask != 0
    count = tokens.cumsum(-1)
    if attention_mask.dtype != torch.bool:
        # From where each number is met first.
        length = attention_mask.shape[1]
        numbers = attention_mask.long().clamp(0, length)
        first = count.new_full((count.shape[0], length + 1), length + 1).scatter_reduce(1, numbers, count, "amin")
        count = count - first.gather(1, numbers) + 1
    return (count - 1).clamp(min=0)


def follow_restarts(mask: AttentionMask, position_ids: torch.Tensor | None, cache: Cache | None) -> AttentionMask:
    """Packs by restarts in `position_ids` [batch or 1, queries], where neither a mask nor a cache says more."""
    if position_ids is None or cache is not None or (mask.sequences, mask.complete) != (None, None):
        return mask
    sequences = find_packed_sequence_indices(position_ids.expand(mask.batch, -1))
    return mask if sequences is None else replace(mask, sequences=sequences + 1, packed=True)


def _packs_rows(mask: AttentionMask, position_ids: torch.Tensor | None, cache: Cache | None) -> bool:
    """Whether `position_ids` pack several rows: transformers' flash attention follows restarts in a single row only, and in
    several would compute as if there were none."""
    if mask.batch == 1 or position_ids is None or not is_readable(position_ids):
        return False
    return bool(follow_restarts(mask, position_ids, cache).packed)


@dataclass(frozen=True)
class _OneWindow:
    """All that transformers' mask functions read of a configuration, as if every layer had this window."""

    _attn_implementation: str
    sliding_window: int


# --- plain causal attention ------------------------------------------------------------------------------------------


def create_causal_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_ids: torch.Tensor | None = None,
    learned_keys: int = 0,
) -> torch.Tensor | BlockMask | None:
    """transformers' function of this name, for all forms of mask on all backends; `learned_keys` as in [`read_mask`].

    Raises:
        ValueError: the mask does not fit, or the backend cannot follow it.
    """
    if isinstance(cache, PAGED_CACHES):
        return modeling.create_causal_mask(config, inputs_embeds, attention_mask, None, position_ids)  # it is ready
    mask = read_mask(inputs_embeds, attention_mask, cache, learned_keys)
    return make_mask(config, inputs_embeds, mask, cache, position_ids)


def make_mask(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    mask: AttentionMask,
    cache: Cache | None,
    position_ids: torch.Tensor | None = None,
    or_mask_function: Callable | None = None,
    window: int | None = None,
) -> torch.Tensor | BlockMask | None:
    """`mask` in the form that the configured backend takes.

    Args:
        or_mask_function: shows keys besides the causal ones.
        window: a query sees itself and the `window` − 1 tokens before it. None: all of them.
    """
    backend, flash = config._attn_implementation, is_flash_attention_requested(config)
    if flash and (mask.complete is not None or mask.packed or _packs_rows(mask, position_ids, cache)):
        raise ValueError(
            f"attn_implementation={backend!r} takes no mask for single queries and keys: pass a 2-D `attention_mask` of "
            "0 and 1, or one row with `position_ids` that restart where packed sequences begin, or use 'sdpa', "
            "'flex_attention' or 'eager'."
        )
    if backend == "flex_attention":
        return follow_restarts(mask, position_ids, cache).block_mask(cache, or_mask_function, window)
    if mask.complete is not None:
        takes_bool = backend != "eager" and mask.complete.dtype == torch.bool
        return mask.complete if takes_bool else mask.additive(inputs_embeds.dtype)
    sequences, same = mask.sequences, None
    if mask.packed is not False and sequences is not None and not flash:
        same = same_sequence(_up_to(sequences, mask.keys), padding_sees=mask.packed is None)
    if flash and sequences is None and cache is not None and mask.keys != mask.past + mask.queries:
        # Flash attention would see the free room of a static cache.
        sequences = torch.ones(mask.batch, int(mask.past) + mask.queries, dtype=torch.bool, device=mask.device)
    make = modeling.create_causal_mask
    if window is not None:
        config = _OneWindow(backend, window)  # type: ignore[assignment]
        make = modeling.create_sliding_window_causal_mask
    made = make(
        config,
        inputs_embeds,
        sequences,
        cache,
        position_ids,
        or_mask_function=or_mask_function,
        and_mask_function=same,
    )
    if backend == "eager" and inputs_embeds.dtype == torch.float64:
        # transformers' minimum is −inf once softmax makes it fp32, and NaN where all of a row is.
        made = made.clamp(min=LOWEST)
    return made


# --- windows, a size of its own for each layer ------------------------------------------------------------------------
# A layer of window w lets each query see itself and the w - 1 tokens before it. Qwen's long-context recipe gives lower
# layers shorter windows (Qwen report, arXiv 2309.16609); Longformer (arXiv 2004.05150) is the idea's source. Caches keep
# the largest size in every windowed layer, so all of them have the same geometry; smaller windows are cut out by their
# masks, or by the kernel's own window.


def mask_name(config: PreTrainedConfig, layer_idx: int) -> str:
    """Under which name [`create_window_masks`] files the mask of this layer: transformers' for the largest window."""
    window = config.window_sizes[layer_idx] if config.window_sizes else None
    if window is None:
        return FULL
    return SLIDING if window == config.sliding_window else f"{SLIDING}_{window}"


def create_window_masks(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_ids: torch.Tensor | None = None,
) -> dict[str, torch.Tensor | BlockMask | None]:
    """One mask per kind of layer of `config.window_sizes`, under its [`mask_name`], each as [`create_causal_mask`] makes it."""
    windows = {mask_name(config, layer): window for layer, window in enumerate(config.window_sizes or (None,))}
    if isinstance(cache, PAGED_CACHES):
        return dict.fromkeys(windows, create_causal_mask(config, inputs_embeds, attention_mask, cache, position_ids))
    if getattr(attention_mask, "ndim", None) == 4 and cache is not None and any(windows.values()):
        _refuse_dropped_keys(inputs_embeds.shape[1], cache)
    mask = read_mask(inputs_embeds, attention_mask, cache)
    return {
        name: make_mask(config, inputs_embeds, mask, cache, position_ids, window=window)
        for name, window in windows.items()
    }


def _refuse_dropped_keys(queries: int, cache: Cache) -> None:
    """A 4-D mask says of every key who sees it, which no layer may have dropped."""
    layer = _layer_of(cache, sliding=True)
    past, (kept, _) = cache.get_query_offset(layer), cache.get_mask_sizes(queries, layer)
    others = cache.get_mask_sizes(queries, _layer_of(cache, sliding=False))[0]
    if kept != others or (isinstance(past, int) and kept < past + queries):
        raise ValueError(
            "a 4-D `attention_mask` is for every token before it, but layers with a window (`window_sizes`) keep only the "
            "last of them in `cache`. Pass a 2-D mask, or compute without a cache."
        )


# --- forms of a mask -------------------------------------------------------------------------------------------------


def same_sequence(sequences: torch.Tensor, padding_sees: bool = False) -> Callable:
    """Mask function: key and query have the same number in `sequences` [batch, keys], or the key has EVERYONES.

    With `padding_sees`, queries of padding see all tokens, so that of 0 and 1 it makes what `padding_mask_function` does.
    """

    def mask_function(batch_idx, head_idx, q_idx, kv_idx):
        key, query = sequences[batch_idx, kv_idx], sequences[batch_idx, q_idx]
        seen = (key == query) | (key == EVERYONES)
        return (key != 0) & (seen | (query == 0) if padding_sees else seen)

    return mask_function


def sees(mask: torch.Tensor) -> torch.Tensor:
    """Where a query sees a key, in a 4-D `attention_mask` of any form."""
    return mask > HIDES if mask.is_floating_point() else mask != 0


def as_bool(mask: torch.Tensor) -> torch.Tensor:
    """A mask, bool or additive, as True where a query sees a key.

    Raises:
        ValueError: an additive mask has other biases than 0 and what hides a key.
    """
    if mask.dtype == torch.bool:
        return mask
    if not is_tracing(mask) and ((mask != 0) & (mask > HIDES)).any():
        raise ValueError(
            "flex_attention takes an additive `attention_mask` only of 0 and the dtype's minimum, or bool; for other "
            "biases use 'sdpa' or 'eager'."
        )
    return mask == 0


def as_additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask, bool or additive, as what is added to scores.

    The minimum of another dtype is this one's, and not −inf, of which rows that may look nowhere would become NaN.
    """
    lowest = max(torch.finfo(dtype).min, LOWEST)
    if mask.dtype != torch.bool:
        return mask.to(dtype).clamp(min=lowest)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)


def _up_to(sequences: torch.Tensor, keys: int) -> torch.Tensor:
    """A static cache has room for more keys than there are."""
    return F.pad(sequences, (0, max(0, keys - sequences.shape[1])))


def _layer_of(cache: Cache, sliding: bool) -> int:
    """A layer of the cache that has a window, or one that has none; the first if there is no such layer."""
    return cache.is_sliding.index(sliding) if sliding in cache.is_sliding else 0
