"""LogN as a factor on queries, against LogN written out on the scores."""

import math

import pytest
import torch

from hf_cnllm.attention.logn import logn_scale, reference_logn_scores


@pytest.mark.parametrize(("length", "offset"), [(5, 0), (8, 0), (20, 0), (3, 17), (1, 8)])
def test_scaled_queries_give_logn_scores_and_gradients(length, offset):
    torch.manual_seed(0)
    query = torch.randn(2, 3, length, 4, dtype=torch.float64, requires_grad=True)
    key = torch.randn(2, 3, offset + length, 4, dtype=torch.float64)
    positions = torch.arange(offset, offset + length)[None]
    scores = (query * logn_scale(positions, 8).double()) @ key.transpose(-1, -2) / 2
    expected = reference_logn_scores(query, key, 8, offset)
    torch.testing.assert_close(scores, expected, atol=1e-6, rtol=0)
    weight = torch.randn_like(scores)
    (gradient,) = torch.autograd.grad((scores * weight).sum(), query)
    (reference,) = torch.autograd.grad((expected * weight).sum(), query)
    torch.testing.assert_close(gradient, reference, atol=1e-6, rtol=0)


def test_the_factor_is_one_up_to_the_trained_length_and_then_the_logarithm():
    scale = logn_scale(torch.arange(200)[None], 32).flatten()
    assert (scale[:32] == 1).all()
    expected = torch.tensor([math.log(position, 32) for position in range(33, 201)])
    torch.testing.assert_close(scale[32:], expected)


def test_rows_may_have_positions_of_their_own():
    scale = logn_scale(torch.tensor([[0, 63], [40, 7]]), 32)
    assert scale.shape == (2, 1, 2, 1)
    torch.testing.assert_close(scale.flatten(), torch.tensor([1.0, math.log(64, 32), math.log(41, 32), 1.0]))
