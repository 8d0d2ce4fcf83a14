"""Qwen v1's windows, a size of its own for each layer: masks, kernels, caches and training."""

import pytest
import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask

from goldens import BACKENDS, assert_close
from hf_cnllm import QWenConfig, QWenLMHeadModel
from hf_cnllm._compat import CACHE
from qwen_models import NEW_TOKENS, WAYS_OF_GENERATING, WIDTH, generate, load


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("windows", [[8, None], [None, 8], [8, 16], [5, 5]])
@torch.no_grad()
def test_windows_hide_what_is_behind_them(windows, backend, batch):
    model = load(backend=backend, window_sizes=windows)
    ids, mask = batch
    real = mask.bool()
    reference = load(backend="eager")
    distance = torch.arange(WIDTH)[:, None] - torch.arange(WIDTH)
    for block, window in zip(reference.transformer.h, windows, strict=True):
        if window is not None:
            hidden = torch.zeros(WIDTH, WIDTH).masked_fill(distance >= window, torch.finfo(torch.float32).min)
            block.attn.register_forward_pre_hook(
                lambda module, args, kwargs, hidden=hidden: (args, kwargs | {"attention_mask": kwargs["attention_mask"] + hidden}),
                with_kwargs=True,
            )  # fmt: skip
    assert_close(model(ids, attention_mask=mask).logits[real], reference(ids, attention_mask=mask).logits[real])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("windows", [[8, None], [16, 8], [5, 5]])
def test_windows_in_every_way_of_generating(windows, backend, batch):
    model = load(backend=backend, window_sizes=windows)
    expected = generate(model, *batch, use_cache=False)
    cache = generate(model, *batch, return_dict_in_generate=True)[CACHE]
    kept = max(window for window in windows if window)
    assert [layer.keys.shape[-2] for layer in cache.layers] == [
        kept - 1 if window else WIDTH + NEW_TOKENS - 1 for window in windows
    ]
    for way in ({}, *WAYS_OF_GENERATING.values()):
        assert torch.equal(generate(model, *batch, **way), expected), way
    prompt = batch[0][:1, :41]
    assert torch.equal(generate(model, prompt, prompt_lookup_num_tokens=4), generate(model, prompt))


def test_kernels_that_take_a_window_get_each_layers_own(batch):
    """Flash attention needs a GPU; what it is called with does not."""
    calls = []

    def recording(module, query, key, value, attention_mask, scaling, sliding_window=None, **kwargs):
        calls.append((module.layer_idx, sliding_window, query.clone(), attention_mask, scaling))
        return torch.zeros_like(query).transpose(1, 2), None

    AttentionInterface.register("recording", recording)
    AttentionMaskInterface.register("recording", flash_attention_mask)
    ids, mask = batch
    load(backend="recording", window_sizes=[8, None], use_dynamic_ntk=False)(ids, attention_mask=mask)
    load(backend="recording", use_logn_attn=False, use_dynamic_ntk=False)(ids, attention_mask=mask)
    (layer, window, scaled, given, scaling), (_, none, *_), (_, off, plain, *_) = calls[0], calls[1], calls[2]
    assert (layer, window, none, off, scaling) == (0, 8, None, None, 16**-0.5)
    assert torch.equal(given, mask.bool())
    factor = torch.log(torch.arange(1, WIDTH + 1)) / torch.log(torch.tensor(32.0))
    torch.testing.assert_close(scaled, plain * factor.clamp(min=1)[:, None])


@pytest.mark.parametrize("windows", [[8, None], [8, 8], [8, 16]])
@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@torch.no_grad()
def test_a_mask_of_four_dimensions_needs_all_keys(windows, kind, batch):
    """It replaces windows, as in transformers' models; so nothing may have left the cache."""
    model, ids = load(window_sizes=windows), batch[0][:1]
    seen = torch.ones(WIDTH, WIDTH, dtype=torch.bool).tril()[None, None]
    mask = seen if kind is torch.bool else torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(kind).min)
    whole = model(ids[:, :20], attention_mask=mask[..., :20, :20], use_cache=False).logits
    cache = model(ids[:, :6], attention_mask=mask[..., :6, :6]).cache
    assert_close(model(ids[:, 6:20], attention_mask=mask[..., 6:20, :20], cache=cache).logits, whole[:, 6:])
    with pytest.raises(ValueError, match=r"layers with a window .* keep only the last"):
        model(ids[:, 20:22], attention_mask=mask[..., 20:22, :22], cache=cache)


def test_a_windowed_model_trains_from_scratch():
    torch.manual_seed(0)
    model = QWenLMHeadModel(
        QWenConfig(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                   seq_length=16, window_sizes=[4, None], no_bias=False)
    )  # fmt: skip
    assert model.config.use_dynamic_ntk and model.config.use_logn_attn
    ids = torch.randint(0, 50, (2, 24))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
