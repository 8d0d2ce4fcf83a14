"""Window attention with a size of its own for each layer, through transformers' masks and caches.

A layer of window w lets each query see itself and the w - 1 tokens before it. Qwen's long-context recipe gives lower
layers shorter windows (Qwen report, arXiv 2309.16609); Longformer (arXiv 2004.05150) is the idea's source.

The configuration names the sizes (`window_sizes`, one per layer, None for full attention) and derives from them what
transformers reads: `layer_types`, and `sliding_window`, the largest size. Caches keep that many tokens in every windowed
layer, so all of them have the same geometry; smaller windows are cut out by their masks, or by the kernel's own window.
"""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from .._compat import create_sliding_window_causal_mask
from .flex import create_causal_mask

FULL = "full_attention"
SLIDING = "sliding_attention"


@dataclass(frozen=True)
class _OneWindow:
    """All that transformers' mask functions read of a configuration, as if every layer had this window."""

    _attn_implementation: str
    sliding_window: int


def mask_name(config: PreTrainedConfig, layer_idx: int) -> str:
    """Under which name `create_window_masks` files the mask of this layer. The largest window has transformers' name."""
    window = config.window_sizes[layer_idx] if config.window_sizes else None
    return _name(window, config.sliding_window)


def create_window_masks(config: PreTrainedConfig, **mask_arguments: Any) -> dict[str, Any]:
    """One mask per kind of layer, each in the form that the configured attention backend takes.

    Args:
        config: a configuration with `window_sizes`.
        mask_arguments: what `transformers.masking_utils.create_causal_mask` takes besides `config`.
    """
    masks = {}
    for window in dict.fromkeys(config.window_sizes or (None,)):
        if window is None:
            mask = create_causal_mask(config=config, **mask_arguments)
        else:
            one_window = _OneWindow(config._attn_implementation, window)
            mask = create_sliding_window_causal_mask(config=one_window, **mask_arguments)  # type: ignore[arg-type]
        masks[_name(window, config.sliding_window)] = mask
    return masks


def _name(window: int | None, largest: int | None) -> str:
    if window is None:
        return FULL
    return SLIDING if window == largest else f"{SLIDING}_{window}"
