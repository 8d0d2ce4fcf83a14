"""Inputs that cannot be right get one message that says why."""

import pytest
import torch
from transformers import DynamicCache

from hf_cnllm.models.validation import check_cache, check_positions, check_token_ids


@pytest.mark.parametrize("token", [-1, 10, 99])
def test_token_ids_outside_the_vocabulary(token):
    check_token_ids(torch.tensor([[0, 9]]), 10)
    check_token_ids(torch.zeros(1, 0, dtype=torch.long), 10)
    with pytest.raises(ValueError, match=rf"input_ids\[1, 2\]` is {token}.*ids 0 to 9 \(`vocab_size`\)"):
        check_token_ids(torch.tensor([[1, 2, 3], [1, 2, token]]), 10)


def cache_of(layers=2, batch=2, heads=3, head_dim=4):
    cache = DynamicCache()
    states = torch.zeros(batch, heads, 5, head_dim)
    for layer in range(layers):
        cache.update(states, states, layer)
    return cache


def test_caches_that_fit():
    for cache in (None, DynamicCache(), cache_of(), cache_of(layers=1)):  # a growing cache may have fewer layers
        check_cache(cache, batch_size=2, num_layers=2, num_heads=3, head_dim=4)


@pytest.mark.parametrize(
    ("other", "complaint"),
    [
        ({"layers": 3}, "has 3 layers, but the model has 2"),
        ({"heads": 2}, "holds 2 heads of 4 dimensions, but the model has 3 of 4"),
        ({"head_dim": 8}, "holds 3 heads of 8 dimensions"),
        ({"batch": 1}, "holds 1 sequences, but the inputs are 2"),
    ],
)
def test_caches_of_another_model_or_batch(other, complaint):
    with pytest.raises(ValueError, match=complaint):
        check_cache(cache_of(**other), batch_size=2, num_layers=2, num_heads=3, head_dim=4)


def test_tuples_are_no_cache():
    with pytest.raises(ValueError, match="`cache` is of type tuple, but must be a transformers `Cache`"):
        check_cache(((torch.zeros(2, 3, 5, 4),) * 2,) * 2, batch_size=2, num_layers=2, num_heads=3, head_dim=4)


@pytest.mark.compiled
def test_positions_are_checked_in_one_graph_whatever_the_batch():
    def forward(positions):
        check_positions(positions, positions.shape[0], positions.shape[1])
        return positions + 1

    compiled = torch.compile(forward, backend="eager", fullgraph=True, dynamic=True)
    for batch in (3, 1, 4):
        assert compiled(torch.zeros(batch, 2, dtype=torch.long)).sum() == 2 * batch
