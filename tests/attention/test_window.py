"""Masks for windows of several sizes, against the definition, on a full cache, a sliding one and none."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from hf_cnllm import QWenConfig
from hf_cnllm.attention.masks import create_window_masks, mask_name
from hf_cnllm.attention.reference import attention_reference

WINDOWS = [3, None, 5, 3]


def config_with(windows, backend="eager"):
    config = QWenConfig(
        num_hidden_layers=4, hidden_size=16, num_attention_heads=2, intermediate_size=16, window_sizes=windows
    )
    config._attn_implementation = backend
    return config


def who_sees_whom(mask, batch: int, queries: int, keys: int) -> torch.Tensor:
    """[batch, 1, queries, keys], True where a query sees a key."""
    if not isinstance(mask, torch.Tensor):
        indices = torch.meshgrid(torch.arange(batch), torch.arange(queries), torch.arange(keys), indexing="ij")
        return mask.mask_mod(indices[0], 0, *indices[1:])[:, None]
    return mask if mask.dtype == torch.bool else mask == 0


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize(
    ("cache_kind", "seen", "length"),
    [(None, 0, 9)]
    + [(kind, *lengths) for kind in ("sliding", "full", "static") for lengths in ((0, 9), (4, 1), (6, 3), (2, 7))],
)
def test_each_query_sees_its_window(backend, cache_kind, seen, length):
    config = config_with(WINDOWS, backend)
    cache = {
        None: lambda: None,
        "sliding": lambda: DynamicCache(config=config),
        "full": lambda: DynamicCache(),
        "static": lambda: StaticCache(config=config, max_cache_len=12),
    }[cache_kind]()
    # Keys say their position, so that what a layer attends to can be read off.
    positions = torch.arange(1.0, 20.0)[None, None, :, None].expand(2, 2, -1, 8)
    if seen:
        for layer in range(4):
            cache.update(positions[:, :, :seen], positions[:, :, :seen], layer)
    padding = torch.ones(2, seen + length, dtype=torch.long)
    padding[1, :2] = 0
    masks = create_window_masks(
        config,
        inputs_embeds=torch.zeros(2, length, 16),
        attention_mask=padding,
        cache=cache,
    )
    assert set(masks) == {"full_attention", "sliding_attention", "sliding_attention_3"}
    new = positions[:, :, seen : seen + length]
    for layer, window in enumerate(WINDOWS):
        keys = new if cache is None else cache.update(new, new, layer)[0]
        mask = who_sees_whom(masks[mask_name(config, layer)], 2, length, keys.shape[2])
        for row, first in ((0, 0), (1, 2)):
            for query in range(length):
                position = seen + query
                if position < first:
                    continue
                oldest = first if window is None else max(first, position - window + 1)
                attended = keys[row, 0, :, 0][mask[row, 0, query]].tolist()
                assert attended == [float(key + 1) for key in range(oldest, position + 1)], (layer, row, query)


def test_without_windows_there_is_one_causal_mask():
    config = config_with(None, "sdpa")
    masks = create_window_masks(config, inputs_embeds=torch.zeros(1, 4, 16), attention_mask=None, cache=None)
    assert masks == {"full_attention": None}  # the kernel's own causal mode
    assert {mask_name(config, layer) for layer in range(4)} == {"full_attention"}


@pytest.mark.parametrize("window", [1, 3, 40])
def test_flex_attention_and_its_gradients_match_reference(window, monkeypatch):
    # torch refuses its backward pass on CPUs, where it computes what it does elsewhere.
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *states: None)
    config = config_with([window, None, None, None], "flex_attention")
    states = [torch.randn(2, 2, 9, 8, requires_grad=True) for _ in range(3)]
    padding = torch.ones(2, 9, dtype=torch.long)
    padding[1, :2] = 0
    masks = create_window_masks(config, torch.empty(2, 9, 16), padding, None)
    attend = torch.nn.attention.flex_attention.flex_attention
    output = attend(*states, block_mask=masks[mask_name(config, 0)], scale=0.3)
    mask = torch.ones(9, 9, dtype=torch.bool).tril().triu(1 - window) & (padding != 0)[:, None, None, :]
    exact = [state.detach().double().requires_grad_() for state in states]
    expected = attention_reference(*exact, torch.where(mask, 0.0, -torch.inf), 0.3)
    torch.testing.assert_close(output.double(), expected, atol=3e-6, rtol=0)
    weight = torch.randn(output.shape)
    gradients = torch.autograd.grad((output * weight).sum(), states)
    for got, want in zip(gradients, torch.autograd.grad((expected * weight).sum(), exact), strict=True):
        torch.testing.assert_close(got.double(), want, atol=5e-6, rtol=0)
