"""Rotary position embeddings (RoFormer, arXiv 2104.09864) in the half-split form, where dimension i turns with dimension
i + d/2: transformers' own Llama code, but for one thing."""

from .._compat.modeling import LlamaRotaryEmbedding


class RotaryEmbedding(LlamaRotaryEmbedding):
    """transformers' Llama rotary embedding, whose frequencies stay fp32.

    `model.half()`, which old scripts call, would round the buffer: at position 4,000 the angle is then up to one radian
    off.
    """

    def _apply(self, fn, recurse: bool = True):
        exact = {name: self.get_buffer(name) for name in ("inv_freq", "original_inv_freq")}
        super()._apply(fn, recurse)
        for name, buffer in exact.items():
            moved = self.get_buffer(name)
            if moved.dtype != buffer.dtype and not buffer.is_meta:
                setattr(self, name, buffer.to(moved.device))
        return self
