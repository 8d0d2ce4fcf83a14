"""The naive truth every fast attention path is tested against: dense, in the precision it is given, one formula each."""

import torch


def attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """softmax(q·kᵀ·scaling + bias)·v with everything materialized.

    Args:
        query: [batch, heads, queries, head_dim].
        key, value: [batch, key_value_heads, keys, head_dim]; heads is a multiple of key_value_heads.
        bias: additive, broadcastable to [batch, heads, queries, keys]; −inf where a query may not look.
        scaling: factor on q·kᵀ.

    Returns:
        [batch, heads, queries, head_dim]; rows that may look nowhere are 0.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(-1, -2) * scaling + bias
    fully_masked = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.masked_fill(fully_masked, 0).softmax(-1).masked_fill(fully_masked, 0) @ value


def alibi_bias_reference(slopes: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
    """ALiBi with its causal mask, [heads, queries, keys]: slope·(j − i) for j ≤ i, else −inf.

    The queries are the last of the keys' positions (Press et al., arXiv 2108.12409, section 3).
    """
    i = torch.arange(keys - queries, keys, dtype=slopes.dtype)[:, None]
    j = torch.arange(keys, dtype=slopes.dtype)[None, :]
    return torch.where(j <= i, slopes[:, None, None] * (j - i), -torch.inf)


def prefix_lm_bias_reference(prefix: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
    """The prefix-LM mask, [batch, 1, length, length]: 0 where query i sees key j, else −inf (GLM, arXiv 2103.10360).

    Args:
        prefix: [batch, length], True for the tokens that all of their sequence sees.
        sequences: [batch, length], 0 for padding and one number for the tokens of each sequence.
    """
    positions = torch.arange(prefix.shape[1])
    causal = positions[None, :] <= positions[:, None]
    same = (sequences[:, :, None] == sequences[:, None, :]) & (sequences != 0)[:, None, :]
    mask = same & (causal | (prefix & (sequences != 0))[:, None, :])
    return torch.where(mask, 0.0, -torch.inf)[:, None]
