"""Rows that may look nowhere: padding that stands before the first token, or that a mask hides altogether.

Kernels differ in what they give there: zeros, a mean, NaN, and gradients of any size. Nothing real ever reads such a row,
but the loss does: under left padding, the last of them predicts the first token, and max-z counts them all. The original
models added their dtype's minimum to masked scores, which levels all scores of such a row: it got the plain mean of values.
In Baichuan and Qwen every backend gives the same.
"""

from typing import NamedTuple

import torch

from .mask_values import is_readable


class FullyMaskedRows(NamedTuple):
    """Which rows look nowhere, and what their mean is taken over.

    Attributes:
        rows: [batch, queries], True for such a row. The queries are the first of the keys.
        tokens: [batch, queries], True for tokens, where the mean of row i is over the padding up to i and the tokens
            after it: Baichuan2-7B added the minimum twice where a key was both padding and in the future, and that is
            −inf. None where the mean is over all keys.
    """

    rows: torch.Tensor
    tokens: torch.Tensor | None = None


def find_padding_in_front(attention_mask: object, length: int) -> FullyMaskedRows | None:
    """The rows of padding before the first token, in a prompt or training batch whose mask is [batch, length]; None if
    there are none. Rows of padding behind a token see that token."""
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.shape[1:] != (length,) or length == 1:
        return None
    tokens = attention_mask != 0
    if is_readable(tokens) and tokens[:, 0].all():
        return None
    return FullyMaskedRows(tokens.cumsum(1) == 0)


def fill_fully_masked_rows(
    output: torch.Tensor, value: torch.Tensor, fully_masked_rows: FullyMaskedRows
) -> torch.Tensor:
    """`output` [batch, queries, heads, head_dim] with those rows replaced by their mean of `value`
    [batch, heads, keys, head_dim]; in time and memory linear in the length."""
    value = value[:, :, : output.shape[1]]
    if fully_masked_rows.tokens is None:
        mean = value.mean(dim=2, keepdim=True)
    else:
        token = fully_masked_rows.tokens[:, None, :, None].to(value.dtype)
        tokens, paddings = value * token, value * (1 - token)
        total = paddings.cumsum(2) + tokens.sum(2, keepdim=True) - tokens.cumsum(2)
        count = (1 - token).cumsum(2) + token.sum(2, keepdim=True) - token.cumsum(2)
        mean = total / count.clamp_min(1)
    return torch.where(fully_masked_rows.rows[:, :, None, None], mean.transpose(1, 2), output)
