"""Causal language-model loss with Baichuan 2's max-z term.

For logits ``z`` of one position, its target ``y`` and the largest logit ``m = max_v z_v``::

    loss = mean over counted labels of (logsumexp_v z_v - z_y)  +  weight * mean over all positions of m^2

The second term is the *max-z loss* of the Baichuan 2 report (arXiv 2309.10305, section 2.6), which holds the logits
down: it stabilises training and makes sampling less sensitive to the repetition penalty. It counts every shifted
position, also those whose label is ignored.
"""

import torch
from torch import Tensor, nn


def shift_labels_left(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Aligns `labels` (..., length) with the logits that predict them: position t holds label t + 1, the last none."""
    return nn.functional.pad(labels[..., 1:], (0, 1), value=ignore_index)


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    z_loss_weight: float = 0.0,
    **kwargs,
) -> Tensor:
    """Cross entropy plus max-z, in the calling convention of transformers' `ForCausalLMLoss`.

    A model uses it as its `loss_function` (`self.loss_function = causal_lm_loss`) and leaves `loss_type` at
    `"ForCausalLM"` (or a name that `LOSS_MAPPING` sends to `ForCausalLMLoss`): that is what tells `Trainer` to count
    labels after the shift.

    Args:
        logits: (batch, length, vocab_size). Half precision is computed in fp32.
        labels: (batch, length) token ids, `ignore_index` where nothing is to be learned; shifted here.
        vocab_size: the size of the last dimension of `logits`.
        num_items_in_batch: number of counted labels in the whole accumulated batch. Cross entropy is then summed and
            divided by it, and this micro-batch's mean of m^2 is weighted by its share of the counted labels. The sum
            over the micro-batches is the loss of the one big batch: always for the cross entropy, and for the max-z
            term whenever counted labels make up the same fraction of the positions in each micro-batch.
        shift_labels: (batch, length) labels that are already aligned with `logits`; replaces `labels`, and every
            position then counts as a shifted position.
        z_loss_weight: weight of the max-z term; 0 leaves plain cross entropy.

    Returns:
        A scalar. A batch without a counted label has cross entropy 0 (not NaN).
    """
    if logits.shape[-1] != vocab_size:
        raise ValueError(f"logits have {logits.shape[-1]} entries per position, but vocab_size is {vocab_size}")
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()

    shifted_here = shift_labels is None
    targets = shift_labels_left(labels, ignore_index) if shifted_here else shift_labels
    targets = targets.to(logits.device)
    counted = (targets != ignore_index).sum()
    total = counted if num_items_in_batch is None else torch.as_tensor(num_items_in_batch, device=logits.device)
    total = torch.where(total > 0, total, 1)

    loss = nn.functional.cross_entropy(
        logits.reshape(-1, vocab_size), targets.reshape(-1), ignore_index=ignore_index, reduction="sum"
    )
    loss = loss / total
    if z_loss_weight:
        largest = logits.max(dim=-1).values
        largest = largest[..., :-1] if shifted_here else largest
        max_z = largest.square().sum() / max(largest.numel(), 1)
        if num_items_in_batch is not None:
            max_z = max_z * counted / total
        loss = loss + z_loss_weight * max_z
    return loss
