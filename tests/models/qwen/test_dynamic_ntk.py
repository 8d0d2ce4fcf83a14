"""Dynamic NTK: the table against the original's formula, true lengths, and factors that follow the rows of a cache."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import DynamicCache, LlamaConfig, StaticCache

from hf_cnllm.models.qwen.dynamic_ntk import (
    DOUBLINGS,
    DynamicNtkRotaryEmbedding,
    carry_inv_freq,
    inverse_frequencies,
    ntk_alpha,
    true_lengths,
)

CONFIG = LlamaConfig(num_hidden_layers=2, hidden_size=16, num_attention_heads=2, num_key_value_heads=2)


@given(seq_length=st.integers(1, 40_000), factor=st.floats(0.01, 300), dim=st.sampled_from([4, 8, 64, 128]))
def test_the_table_holds_the_originals_formula(seq_length, factor, dim):
    length = max(1, round(seq_length * factor))
    rotary = DynamicNtkRotaryEmbedding(dim, 10_000, seq_length)
    selected = rotary.inv_freq_for(torch.tensor([[length]]))
    base = 10_000 * ntk_alpha(length, seq_length) ** (dim / (dim - 2))
    assert torch.equal(selected[0, 0], 1.0 / (base ** (torch.arange(0, dim, 2).float() / dim)))


@pytest.mark.parametrize("doublings", range(DOUBLINGS))
def test_factors_change_right_after_each_doubling(doublings):
    rotary = DynamicNtkRotaryEmbedding(16, 10_000, 32)
    limit = 32 * 2**doublings
    below, above = rotary.inv_freq_for(torch.tensor([limit, limit + 1])[:, None])
    assert torch.equal(below[0], inverse_frequencies(16, 10_000, [2 ** (doublings + 1) - 1])[0])
    assert torch.equal(above[0], inverse_frequencies(16, 10_000, [2 ** (doublings + 2) - 1])[0])


def test_plain_frequencies_are_llamas():
    rotary = DynamicNtkRotaryEmbedding(16, 10_000)
    assert rotary.inv_freq.shape[0] == 1
    assert torch.equal(rotary.plain_inv_freq[0, 0], 1.0 / (10_000 ** (torch.arange(0, 16, 2).float() / 16)))


def test_the_table_stays_exact_whatever_happens_to_the_model():
    expected = DynamicNtkRotaryEmbedding(16, 10_000, 32).inv_freq
    for change in (torch.nn.Module.half, torch.nn.Module.bfloat16, lambda module: module.to(torch.float64)):
        assert torch.equal(change(DynamicNtkRotaryEmbedding(16, 10_000, 32)).inv_freq, expected)
    with torch.device("meta"):
        empty = DynamicNtkRotaryEmbedding(16, 10_000, 32)
    assert torch.equal(empty.to_empty(device="cpu").inv_freq, expected)


@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), side=st.sampled_from(["left", "right"]))
def test_true_lengths_of_every_kind_of_mask(lengths, side):
    width = max(lengths)
    embeds = torch.zeros(len(lengths), width, 1)
    columns = torch.arange(width)
    limits = torch.tensor(lengths)[:, None]
    mask = columns >= width - limits if side == "left" else columns < limits
    expected = [[length] for length in lengths]
    assert true_lengths(embeds, mask.long()).tolist() == expected
    assert true_lengths(embeds, mask.float()).tolist() == expected
    visible = (mask[:, None, :] & (columns[:, None] >= columns))[:, None]
    lowest = torch.finfo(torch.float32).min
    additive = (torch.where(visible, bias, hidden) for bias, hidden in [(0.0, lowest), (-0.5, lowest), (0.0, -1e4)])
    for form in (visible, visible.long(), visible.to(torch.uint8), *additive):
        assert true_lengths(embeds, form).tolist() == expected


@given(documents=st.lists(st.integers(1, 9), min_size=1, max_size=5))
def test_true_lengths_of_packed_documents(documents):
    positions = torch.cat([torch.arange(length) for length in documents])[None]
    embeds = torch.zeros(1, positions.shape[1], 1)
    expected = [length for length in documents for _ in range(length)]
    assert true_lengths(embeds, None, positions)[0].tolist() == expected
    assert true_lengths(embeds).tolist() == [[len(expected)]]


def test_a_mask_that_does_not_tell_lengths_is_refused():
    with pytest.raises(ValueError, match="prompt_lengths"):
        true_lengths(torch.zeros(1, 3, 1), attention_mask=object())


def filled_cache(kind: str):
    cache = {
        "dynamic": lambda: DynamicCache(config=CONFIG),
        "lazy": lambda: DynamicCache(),
        "static": lambda: StaticCache(config=CONFIG, max_cache_len=8),
    }[kind]()
    for layer in range(2):
        states = torch.arange(3.0)[:, None, None, None].expand(3, 2, 5, 8).clone()
        cache.update(states, states, layer)
    carry_inv_freq(cache, torch.arange(3.0)[:, None, None].expand(3, 1, 4))
    return cache


def assert_rows(cache, rows):
    """Keys and frequencies were both filled with the number of their row."""
    assert cache.ntk_inv_freq[:, 0, 0].tolist() == rows
    assert cache.layers[0].keys[:, 0, 0, 0].tolist() == rows


@pytest.mark.parametrize("kind", ["dynamic", "lazy", "static"])
def test_frequencies_are_copied_pickled_and_forgotten_with_the_cache(kind):
    """That they follow its rows in every way, test_long_context.py shows on a model's logits."""
    cache = filled_cache(kind)
    cache.reorder_cache(torch.tensor([2, 0, 0]))
    assert_rows(cache, [2, 0, 0])
    assert isinstance(cache, DynamicCache if kind != "static" else StaticCache)
    for duplicate in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
        assert type(duplicate) is type(cache)
        assert_rows(duplicate, [2, 0, 0])
        duplicate.reorder_cache(torch.tensor([1, 1, 1]))
    assert_rows(cache, [2, 0, 0])
    if kind != "static":
        cache.crop(-2)
        assert_rows(cache, [2, 0, 0])
        cache.crop(-3)
        assert cache.ntk_inv_freq is None
    cache.reset()
    assert cache.ntk_inv_freq is None


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_what_a_call_decides_is_carried_from_then_on(kind):
    rotary = DynamicNtkRotaryEmbedding(8, 10_000, 4)
    prompt = torch.zeros(2, 9, 1)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, :6] = 0
    cache = DynamicCache(config=CONFIG) if kind == "dynamic" else StaticCache(config=CONFIG, max_cache_len=20)
    decided = rotary.select_inv_freq(prompt, mask, cache=cache)
    assert torch.equal(decided, rotary.inv_freq_for(torch.tensor([[9], [3]])))
    step = torch.zeros(2, 1, 1)
    assert rotary.select_inv_freq(step, torch.ones(2, 10), cache=cache) is cache.ntk_inv_freq


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_cache_begun_within_the_trained_length_stays_plain(kind):
    rotary = DynamicNtkRotaryEmbedding(8, 10_000, 4)
    cache = DynamicCache(config=CONFIG) if kind == "dynamic" else StaticCache(config=CONFIG, max_cache_len=20)
    kind_of_cache = type(cache)
    assert torch.equal(rotary.select_inv_freq(torch.zeros(1, 4, 1), cache=cache), rotary.plain_inv_freq)
    states = torch.zeros(1, 2, 4, 8)
    cache.update(states, states, 0)
    cache.update(states, states, 1)
    assert type(cache) is kind_of_cache
    # Later calls, however long, continue what was begun; only a cache that carries `prompt_lengths` is told otherwise.
    assert torch.equal(rotary.select_inv_freq(torch.zeros(1, 9, 1), cache=cache), rotary.plain_inv_freq)
