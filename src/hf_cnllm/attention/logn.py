"""LogN attention: queries past the trained length are scaled up, so that softmax stays as sharp over more keys.

The query at 1-based position i of a model trained on S tokens is multiplied by (Su, kexue.fm/archives/8823; Chiang and
Cholak, arXiv 2202.12172; Qwen report, arXiv 2309.16609)::

    s(i) = max(1, log_S i)

A factor on the query is one on its row of scores, so every attention kernel can be used as it is.
"""

import math

import torch
from torch import Tensor


def logn_scale(position_ids: Tensor, seq_length: int) -> Tensor:
    """What to multiply rotated queries (batch, heads, length, head_dim) by: (batch or 1, 1, length, 1), fp32.

    Args:
        position_ids: (batch or 1, length), 0-based.
        seq_length: trained length S in tokens, at least 2.
    """
    lengths = position_ids[:, None, :, None] + 1
    return torch.where(lengths > seq_length, lengths.float().log() / math.log(seq_length), 1.0)


def reference_logn_scores(query: Tensor, key: Tensor, seq_length: int, offset: int = 0) -> Tensor:
    """Softmax attention with LogN written out on the scores, for the tests; queries start at position `offset`."""
    scores = query.double() @ key.double().transpose(-1, -2) / math.sqrt(query.shape[-1])
    for row in range(query.shape[-2]):
        position = offset + row + 1
        if position > seq_length:
            scores[..., row, :] *= math.log(position, seq_length)
    return scores
