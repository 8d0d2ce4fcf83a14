"""From hidden states to loss and logits: the end of every causal language model's forward pass, and what Trainer is to
know of the other heads."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .._compat.modeling import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    ForCausalLMLoss,
    ForMaskedLMLoss,
    slice_logits_to_keep,
)
from ..attention.mask_values import in_transform
from .causal_lm import DEFAULT_CHUNK_SIZE, causal_lm_loss, chunked_causal_lm_loss
from .lazy_logits import lazy_logits
from .norm_head import NormHead

_SHIFTS_LABELS = {causal_lm_loss: True, ForCausalLMLoss: True, ForMaskedLMLoss: False}
"""The loss functions that the chunked form stands in for, and whether they shift the labels."""


class MeanLoss:
    """For heads whose loss is the mean of a batch. Trainer takes a `forward` with `**kwargs` for one that divides by
    `num_items_in_batch`, and would add up the means of accumulated steps instead of averaging them."""

    accepts_loss_kwargs = False


def causal_lm_output(
    model: PreTrainedModel,
    head: nn.Linear | NormHead,
    outputs: BaseModelOutputWithPast,
    labels: Tensor | None,
    logits_to_keep: int | Tensor = 0,
    **loss_kwargs,
) -> CausalLMOutputWithPast:
    """What `forward` returns: the backbone's `outputs` with the logits, and with labels the loss, see [`loss_and_logits`]."""
    hidden_states, loss = outputs.last_hidden_state, None
    if labels is None:
        logits = head(slice_logits_to_keep(hidden_states, logits_to_keep))
    else:
        loss, logits = loss_and_logits(model, head, hidden_states, labels, logits_to_keep, **loss_kwargs)
    return CausalLMOutputWithPast(
        loss=loss,
        logits=logits,
        cache=outputs.cache,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
    )


def loss_and_logits(
    model: PreTrainedModel,
    head: nn.Linear | NormHead,
    hidden_states: Tensor,
    labels: Tensor,
    logits_to_keep: int | Tensor = 0,
    **loss_kwargs,
) -> tuple[Tensor, Tensor]:
    """`(loss, logits)` of `head(hidden_states)` under `model.loss_function`.

    In training, where the loss is this package's or transformers' own for causal or masked (unshifted)
    language models and the head a plain `nn.Linear` or `NormHead`, the loss is computed in chunks of
    `config.loss_chunk_size` tokens without the logits, and the returned logits are lazy: who reads
    `outputs.logits` (a metric, a loss of one's own) gets them then, differentiable as ever, and who does not never pays
    for them. Everything else computes the logits and the loss from them: evaluation, `loss_chunk_size=None`,
    `logits_to_keep`, a `loss_function` of the user's own, a head that is quantized, sharded, adapted by LoRA, offloaded
    or hooked, `torch.compile`, transforms of `torch.func`, and `nn.DataParallel`.

    Args:
        hidden_states: (batch, length, hidden_size).
        labels: (batch, length).
        logits_to_keep: as in transformers' causal language models.
        loss_kwargs: passed on to the loss (`num_items_in_batch`, `shift_labels`, `z_loss_weight`, ...).
    """
    chunk_size = getattr(model.config, "loss_chunk_size", DEFAULT_CHUNK_SIZE)
    in_data_parallel = getattr(model, "_is_replica", False)  # its gather cannot read lazy logits
    if (
        model.training
        and torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not in_transform()
        and not in_data_parallel
        and chunk_size is not None
        and isinstance(logits_to_keep, int)
        and logits_to_keep == 0
        and model.loss_function in _SHIFTS_LABELS
        and _is_plain(head, hidden_states)
    ):
        if not _SHIFTS_LABELS[model.loss_function]:
            loss_kwargs["shift_labels"] = labels
        loss = chunked_causal_lm_loss(
            hidden_states,
            head.raw_weight if isinstance(head, NormHead) else head.weight,
            labels,
            normalize=isinstance(head, NormHead),
            bias=head.bias,
            chunk_size=chunk_size,
            **loss_kwargs,
        )
        return loss, lazy_logits(head, hidden_states)

    logits = head(slice_logits_to_keep(hidden_states, logits_to_keep))
    return model.loss_function(logits=logits, labels=labels, vocab_size=model.config.vocab_size, **loss_kwargs), logits


def _is_plain(head: nn.Module, hidden_states: Tensor) -> bool:
    """Whether multiplying by the head's own parameters is all that `head(hidden_states)` does."""
    parameters = dict(head.named_parameters())
    autocast = torch.is_autocast_enabled(hidden_states.device.type)
    return (
        type(head) in (nn.Linear, NormHead)
        and "forward" not in vars(head)
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
        and type(hidden_states) is Tensor
        and all(type(p) in (Tensor, nn.Parameter) and p.is_floating_point() for p in parameters.values())
        and all(p.device == hidden_states.device for p in parameters.values())
        and all(autocast or p.dtype == hidden_states.dtype for p in parameters.values())
        and "weight" in parameters
        and parameters["weight"].shape == (head.out_features, head.in_features)
        and any(tensor.requires_grad for tensor in (hidden_states, *parameters.values()))
    )
