"""ALiBi without the bias tensor for transformers' own BLOOM, which has eager attention only. Opt-in: [`use_folded_alibi`]."""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, BloomModel, BloomPreTrainedModel, Cache

from .._compat.modeling import BloomAttention, dropout_add, sdpa_attention_forward
from .alibi import FoldedAlibi, alibi_sdpa_attention, alibi_slopes, fold_alibi
from .masks import AttentionMask, as_additive

# The attention implementation under which transformers passes BLOOM's layers the 2-D mask and makes no dense one.
NAME = "folded_alibi"


def _padding_only_mask(attention_mask: torch.Tensor | None = None, **kwargs) -> torch.Tensor | None:
    return attention_mask


class FoldedBloomAttention(BloomAttention):
    """`BloomAttention` on SDPA: folded ALiBi for several queries, BLOOM's own bias [batch, heads, 1, keys] for one. Same
    parameters, same numbers as eager attention; no attention weights are returned."""

    num_key_value_groups = 1
    is_causal = True

    @classmethod
    def from_attention(cls, attention: BloomAttention) -> "FoldedBloomAttention":
        """A module that shares the parameters of `attention`."""
        folded = cls.__new__(cls)
        folded.__dict__.update(attention.__dict__)
        return folded

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor,
        alibi: torch.Tensor,
        attention_mask: torch.Tensor | None,
        layer_past: Cache | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        **kwargs,
    ) -> tuple[torch.Tensor, None]:
        batch, queries, _ = hidden_states.shape
        query, key, value = self._reshape(self.query_key_value(hidden_states))
        if layer_past is not None:
            key, value = layer_past.update(key, value, self.layer_idx)
        dropout = self.attention_dropout.p if self.training else 0.0
        mask = self._mask(query, key, alibi, attention_mask)
        context, _ = alibi_sdpa_attention(self, query, key, value, mask, self.inv_norm_factor, dropout)
        output = self.dense(context.reshape(batch, queries, self.hidden_size))
        return dropout_add(output, residual, self.hidden_dropout, self.training), None

    def _mask(
        self, query: torch.Tensor, key: torch.Tensor, alibi: torch.Tensor, attention_mask: torch.Tensor | None
    ) -> torch.Tensor | FoldedAlibi:
        """For one query BLOOM's bias with padding hidden; for several the folded form, with a dense mask of
        [batch, 1, queries, keys] only where a cache is continued."""
        (batch, heads, queries, _), keys = query.shape, key.shape[2]
        tokens = None if attention_mask is None else F.pad(attention_mask != 0, (0, keys - attention_mask.shape[1]))
        if queries == 1:
            bias = alibi.view(batch, heads, 1, -1)
            return bias if tokens is None else bias + as_additive(tokens[:, None, None], bias.dtype)
        mask = AttentionMask(batch, queries, keys, keys - queries, key.device, tokens)
        # BLOOM counts tokens, not places.
        positions = mask.key_positions[None] if tokens is None else tokens.cumsum(1) - 1
        hidden = None if tokens is None or mask.past else ~tokens
        slopes = alibi_slopes(heads).to(key.device)
        dense = mask.additive(query.dtype) if mask.past else None
        return fold_alibi(slopes, mask.query_positions, positions, hidden, self.inv_norm_factor, query.dtype, dense)


def use_folded_alibi(model: nn.Module) -> nn.Module:
    """Gives transformers' BLOOM ALiBi in linear memory, in place; for prefill and training on any device.

    Args:
        model: a BLOOM model of any head.

    Returns:
        `model`, whose attention modules share their parameters with those they replace. `output_attentions` and static
        caches stay with eager attention: load the model without calling this.

    Raises:
        TypeError: `model` is not a BLOOM model.
    """
    if not isinstance(model, BloomPreTrainedModel):
        raise TypeError(
            f"use_folded_alibi() is for transformers' BLOOM models, got {type(model).__name__}. The models of hf_cnllm are "
            'fast as they are; choose their attention with attn_implementation="sdpa".'
        )
    AttentionInterface.register(NAME, sdpa_attention_forward)
    AttentionMaskInterface.register(NAME, _padding_only_mask)
    backbone = model if isinstance(model, BloomModel) else model.transformer
    for block in backbone.h:
        block.self_attention = FoldedBloomAttention.from_attention(block.self_attention)
    for module in (model, backbone):
        module.config._attn_implementation = NAME
    return model
