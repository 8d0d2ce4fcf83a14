"""Window attention with a size of its own for each layer, through transformers' caches.

A layer of window w lets each query see itself and the w - 1 tokens before it. Qwen's long-context recipe gives lower
layers shorter windows (Qwen report, arXiv 2309.16609); Longformer (arXiv 2004.05150) is the idea's source.

The configuration names the sizes (`window_sizes`, one per layer, None for full attention) and derives from them what
transformers reads: `layer_types`, and `sliding_window`, the largest size. Caches keep that many tokens in every windowed
layer, so all of them have the same geometry; smaller windows are cut out by their masks, or by the kernel's own window.
"""

from typing import Any

import torch
from transformers import Cache, PreTrainedConfig

from .._compat import PAGED_CACHES
from .masks import create_causal_mask, make_mask, read_mask

FULL = "full_attention"
SLIDING = "sliding_attention"


def mask_name(config: PreTrainedConfig, layer_idx: int) -> str:
    """Under which name `create_window_masks` files the mask of this layer. The largest window has transformers' name."""
    window = config.window_sizes[layer_idx] if config.window_sizes else None
    return _name(window, config.sliding_window)


def create_window_masks(
    config: PreTrainedConfig,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cache: Cache | None,
    position_ids: torch.Tensor | None = None,
) -> dict[str, Any]:
    """One mask per kind of layer, each in the form that the configured attention backend takes.

    Args:
        config: a configuration with `window_sizes`; the rest as for [`create_causal_mask`], whose errors it has.
    """
    windows = {_name(window, config.sliding_window): window for window in config.window_sizes or (None,)}
    if isinstance(cache, PAGED_CACHES):
        return dict.fromkeys(windows, create_causal_mask(config, inputs_embeds, attention_mask, cache, position_ids))
    mask = read_mask(inputs_embeds, attention_mask, cache)
    return {
        name: make_mask(config, inputs_embeds, mask, cache, position_ids, window=window)
        for name, window in windows.items()
    }


def _name(window: int | None, largest: int | None) -> str:
    if window is None:
        return FULL
    return SLIDING if window == largest else f"{SLIDING}_{window}"
