"""Prefix-LM attention on every backend against the dense reference, in outputs and gradients."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, StaticCache, modeling_flash_attention_utils

import flash_stand_in
from hf_cnllm.attention import prefix_lm
from hf_cnllm.attention.prefix_lm import (
    PrefixLMLayout,
    create_prefix_lm_mask,
    find_layout,
    prefix_lm_attention,
)
from hf_cnllm.attention.reference import attention_reference, prefix_lm_bias_reference

HEADS, HEAD_DIM = 4, 8
SCALING = HEAD_DIM**-0.5

# Name -> for every row its sequences, (number of the sequence, tokens before the start token, tokens after), and padding 0.
BATCHES = {
    "one text": [[(1, 5, 8)]],
    "no prefix": [[(1, 0, 13)]],
    "all prefix": [[(1, 13, 0)]],
    "one token": [[(1, 12, 1)]],
    "rows that differ": [[(1, 3, 14)], [(1, 11, 6)], [(1, 17, 0)], [(1, 0, 17)]],
    "left padding": [[0, 0, 0, (1, 3, 4)], [(1, 6, 4)], [0, (1, 1, 8)]],
    "right padding": [[(1, 3, 4), 0, 0, 0], [(1, 6, 4)]],
    "a row of padding": [[0, 0, 0, 0], [(1, 2, 2)]],
    "packed": [[(1, 3, 4), (2, 2, 1), (3, 0, 3)], [(1, 1, 1), (2, 5, 4), 0, 0]],
    "long": [[(1, 40, 61)], [(1, 70, 31)]],
    "long and ragged": [[(1, 100, 200)], [(1, 260, 40)], [0, (1, 20, 279)]],
}


def batch_of(rows):
    """prefix and sequences, [batch, length]."""
    sequences, prefix = [], []
    for row in rows:
        document, context = [], []
        for text in row:
            number, before, after = text if text else (0, 0, 1)
            document += [number] * (before + after)
            context += [True] * before + [False] * after
        sequences.append(document)
        prefix.append(context)
    return torch.tensor(prefix), torch.tensor(sequences)


def make_states(batch, length, past=0, kv_heads=HEADS, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    shapes = [(batch, HEADS, length, HEAD_DIM)] + 2 * [(batch, kv_heads, past + length, HEAD_DIM)]
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def attend(backend, states, prefix, sequences, past=0, learned_keys=0):
    """What a model does: one mask for the forward pass, then the attention function. The cache holds `past` keys."""
    query, key, value = states
    config = LlamaConfig(attn_implementation=backend)
    cache = None
    if past:
        cache = DynamicCache()
        cache.update(key[:, :, :past], value[:, :, :past], 0)
    mask = None if (sequences == 1).all() else sequences
    if past and mask is not None and not learned_keys:
        mask = torch.cat([torch.ones(mask.shape[0], past, dtype=mask.dtype), mask], dim=1)
    embeds = torch.empty(*prefix.shape, 1, dtype=query.dtype)
    mask = create_prefix_lm_mask(config, embeds, mask, cache, prefix, learned_keys)
    module = torch.nn.Module()
    module.config, module.is_causal, module.num_key_value_groups = config, True, query.shape[1] // key.shape[1]
    output, _ = prefix_lm_attention(backend)(module, query, key, value, mask, scaling=SCALING, dropout=0.0)
    return output, mask


def reference(states, prefix, sequences, past=0):
    bias = prefix_lm_bias_reference(prefix, sequences).double()
    front = torch.zeros(*bias.shape[:3], past, dtype=bias.dtype)
    front.masked_fill_((sequences == 0)[:, None, :, None], -torch.inf)
    return attention_reference(*states, torch.cat([front, bias], dim=-1), SCALING).transpose(1, 2)


def assert_equal(states, output, truth, sequences, atol):
    real = sequences != 0
    torch.testing.assert_close(output[real], truth[real].to(output.dtype), atol=atol, rtol=0)
    weight = torch.randn_like(truth) * real[..., None, None]
    grads, expected = (torch.autograd.grad((result * weight).sum(), states) for result in (output, truth))
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, atol=atol, rtol=0)


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize("name", BATCHES)
def test_two_calls_are_exact(name, kv_heads, monkeypatch):
    monkeypatch.setattr(prefix_lm, "BLOCK", 16)
    monkeypatch.setattr(prefix_lm, "DENSE_LENGTH", 0)
    prefix, sequences = batch_of(BATCHES[name])
    states = make_states(*prefix.shape, kv_heads=kv_heads)
    output, mask = attend("sdpa", states, prefix, sequences)
    if name != "no prefix":
        assert isinstance(mask, PrefixLMLayout)
    assert_equal(states, output, reference(states, prefix, sequences), sequences, atol=1e-12)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 4e-3)]
)
@pytest.mark.parametrize("name", ["rows that differ", "left padding", "packed", "long"])
def test_two_calls_in_lower_precision(name, dtype, tolerance, monkeypatch):
    monkeypatch.setattr(prefix_lm, "BLOCK", 16)
    monkeypatch.setattr(prefix_lm, "DENSE_LENGTH", 0)
    prefix, sequences = batch_of(BATCHES[name])
    exact = make_states(*prefix.shape, kv_heads=2)
    states = [state.detach().to(dtype).requires_grad_() for state in exact]
    exact = [state.detach().double().requires_grad_() for state in states]
    real = (sequences != 0)[..., None, None]
    output, truth = attend("sdpa", states, prefix, sequences)[0], reference(exact, prefix, sequences)
    torch.testing.assert_close(output.double() * real, truth * real, atol=tolerance, rtol=tolerance)
    weight = (torch.randn_like(truth) * real).to(dtype)
    gradients = torch.autograd.grad((output * weight).sum(), states)
    expected = torch.autograd.grad((truth * weight.double()).sum(), exact)
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got.double(), want, atol=tolerance * want.abs().max().item(), rtol=0)


@pytest.mark.slow
def test_two_calls_are_exact_at_4096_tokens():
    prefix, sequences = batch_of([[(1, 1500, 2596)]])
    states = [state[:, :1] for state in make_states(1, 4096)]
    output, mask = attend("sdpa", states, prefix, sequences)
    assert isinstance(mask, PrefixLMLayout)
    assert_equal(states, output, reference(states, prefix, sequences), sequences, atol=1e-12)


def test_strides_make_no_difference(monkeypatch):
    monkeypatch.setattr(prefix_lm, "DENSE_LENGTH", 0)
    prefix, sequences = batch_of(BATCHES["left padding"])
    states = [state.detach() for state in make_states(*prefix.shape)]
    strided = [torch.stack([state, state], dim=-1)[..., 0] for state in states]
    assert not any(state.is_contiguous() for state in strided)
    output, expected = (attend("sdpa", given, prefix, sequences)[0] for given in (strided, states))
    torch.testing.assert_close(output, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["one text", "rows that differ", "left padding", "packed", "long"])
def test_learned_keys_in_front_are_seen_by_all(name, monkeypatch):
    monkeypatch.setattr(prefix_lm, "BLOCK", 16)
    monkeypatch.setattr(prefix_lm, "DENSE_LENGTH", 0)
    prefix, sequences = batch_of(BATCHES[name])
    states = make_states(*prefix.shape, past=5)
    output, _ = attend("sdpa", states, prefix, sequences, past=5, learned_keys=5)
    assert_equal(states, output, reference(states, prefix, sequences, past=5), sequences, atol=1e-12)


@pytest.mark.parametrize("name", BATCHES)
def test_dense_masks_say_the_same(name):
    prefix, sequences = batch_of(BATCHES[name])
    states = make_states(*prefix.shape)
    output, _ = attend("eager", [states[0].float(), states[1].float(), states[2].float()], prefix, sequences)
    real = sequences != 0
    torch.testing.assert_close(output[real], reference(states, prefix, sequences)[real].float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["rows that differ", "left padding", "packed", "long"])
@torch.no_grad()
def test_flex_attention_says_the_same(name):
    prefix, sequences = batch_of(BATCHES[name])
    states = make_states(*prefix.shape)
    output, _ = attend("flex_attention", [state.float() for state in states], prefix, sequences)
    real = sequences != 0
    torch.testing.assert_close(output[real], reference(states, prefix, sequences)[real].float(), atol=1e-5, rtol=0)


texts = st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(lambda text: sum(text) > 0)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.tuples(st.lists(texts, min_size=1, max_size=3), st.integers(0, 4)), min_size=1, max_size=4),
    left=st.booleans(),
)
def test_any_batch_is_exact(rows, left):
    length = max(sum(map(sum, row)) + padding for row, padding in rows)
    layout = []
    for row, _ in rows:
        filled = [(number, *text) for number, text in enumerate(row, 1)]
        padding = [0] * (length - sum(map(sum, row)))
        layout.append(padding + filled if left else filled + padding)
    prefix, sequences = batch_of(layout)
    states = make_states(*prefix.shape)
    output = prefix_lm.two_sdpa_calls(*states, find_layout(prefix, sequences), scaling=SCALING)
    assert_equal(states, output, reference(states, prefix, sequences), sequences, atol=1e-12)
    assert (output[sequences == 0] == 0).all()


@pytest.mark.parametrize(
    ("prefix", "sequences"),
    [
        ([[1, 1, 0, 0, 0]], [[1, 1, 0, 1, 1]]),  # padding inside a text
        ([[0, 1, 1, 0, 0]], [[1, 1, 1, 1, 1]]),  # a prefix that does not come first
        ([[1, 0, 1, 0, 0]], [[1, 1, 2, 2, 1]]),  # a document in two places
    ],
)
def test_other_patterns_get_a_dense_mask(prefix, sequences):
    prefix, sequences = torch.tensor(prefix).bool(), torch.tensor(sequences)
    assert find_layout(prefix, sequences) is None
    states = make_states(1, 5)
    output, mask = attend("sdpa", states, prefix, sequences)
    assert isinstance(mask, torch.Tensor)
    real = sequences != 0
    torch.testing.assert_close(output[real], reference(states, prefix, sequences)[real])
    with pytest.raises(ValueError, match="flash attention takes no prefix-LM mask"):
        attend("flash_attention_2", states, prefix, sequences)


def test_after_the_prefix_all_is_plain_causal():
    config = LlamaConfig(attn_implementation="sdpa")
    embeds = torch.empty(2, 1, 8)
    assert create_prefix_lm_mask(config, embeds, None, DynamicCache(), None) is None
    none_is_prefix = torch.zeros(2, 6, dtype=torch.bool)
    assert create_prefix_lm_mask(config, embeds.expand(2, 6, 8), None, None, none_is_prefix) is None


@pytest.mark.parametrize("backend", ["paged|sdpa", "sdpa_of_my_own", "paged|flash_attention_2"])
def test_backends_that_would_be_causal_are_refused(backend):
    config = SimpleNamespace(_attn_implementation=backend)
    with pytest.raises(ValueError, match="has no prefix-LM form"):
        create_prefix_lm_mask(config, torch.empty(1, 4, 8), None, None, torch.ones(1, 4, dtype=torch.bool))


def test_masks_that_do_not_fit_are_refused():
    prefix = torch.ones(2, 4, dtype=torch.bool)
    for backend, mask, message in (
        ("sdpa", torch.ones(2, 3), r"Pass a mask of shape \[2, 4\]"),
        ("sdpa", torch.ones(2, 1, 4, 5).bool(), r"or \[2, 1, 4, 4\]"),
        ("flash_attention_2", torch.ones(2, 1, 4, 4).bool(), "takes no mask for single queries and keys"),
    ):
        config = LlamaConfig(attn_implementation=backend)
        with pytest.raises(ValueError, match=message):
            create_prefix_lm_mask(config, torch.empty(2, 4, 8), mask, None, prefix)


@pytest.mark.parametrize("backend", ["eager", "sdpa", "flex_attention"])
@torch.no_grad()
def test_a_given_mask_says_everything(backend):
    prefix, sequences = batch_of(BATCHES["left padding"])
    states = [state.float() for state in make_states(*prefix.shape)]
    visible = prefix_lm_bias_reference(prefix, sequences) == 0
    config = LlamaConfig(attn_implementation=backend)
    mask = create_prefix_lm_mask(config, torch.empty(*prefix.shape, 8), visible, None, None)
    module = torch.nn.Module()
    module.config, module.num_key_value_groups = config, 1
    output, _ = prefix_lm_attention(backend)(module, *states, mask, scaling=SCALING, dropout=0.0)
    truth = attention_reference(*states, prefix_lm_bias_reference(prefix, sequences), SCALING).transpose(1, 2)
    real = sequences != 0
    torch.testing.assert_close(output[real], truth[real], atol=1e-5, rtol=0)


def test_a_static_cache_has_more_room_than_keys():
    prefix, sequences = batch_of(BATCHES["left padding"])
    batch, length = prefix.shape
    states = make_states(batch, length)
    room = [torch.cat([state, torch.full_like(state, 1e3)], dim=2) for state in states[1:]]
    config = LlamaConfig(attn_implementation="sdpa", num_hidden_layers=1)
    cache = StaticCache(config=config, max_cache_len=2 * length)
    mask = create_prefix_lm_mask(config, torch.empty(batch, length, 8), sequences, cache, prefix)
    layout = mask if isinstance(mask, PrefixLMLayout) else find_layout(prefix, sequences)
    output = prefix_lm.two_sdpa_calls(states[0], *room, layout, scaling=SCALING)
    assert_equal(states, output, reference(states, prefix, sequences), sequences, atol=1e-12)
    assert mask is layout or mask.shape == (batch, 1, length, 2 * length)


class LargestTensor(TorchDispatchMode):
    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_memory_is_linear(share, monkeypatch):
    """No tensor of length × length, forward or backward: the largest grows with the length."""
    monkeypatch.setattr(prefix_lm, "BLOCK", 64)  # a block's mask is BLOCK × length, reached at these lengths
    largest = []
    for length in (1024, 2048):
        prefix = (torch.arange(length) < share * length)[None]
        states = make_states(1, length, dtype=torch.float32)
        with LargestTensor() as mode:
            output, mask = attend("sdpa", states, prefix, torch.ones(1, length, dtype=torch.long))
            output.sum().backward()
        assert isinstance(mask, PrefixLMLayout)
        largest.append(mode.numel)
    assert largest[1] <= 2.1 * largest[0] and largest[1] < 2048 * 2048 / 2


@pytest.fixture
def flash(monkeypatch):
    """transformers' flash attention on the stand-in."""
    utils = modeling_flash_attention_utils
    functions = (
        flash_stand_in.flash_attn_func,
        flash_stand_in.flash_attn_varlen_func,
        None,
        utils._pad_input,
        utils._unpad_input,
    )
    process = utils._lazy_define_process_function(flash_stand_in.flash_attn_varlen_func)
    monkeypatch.setattr(utils, "lazy_import_flash_attention", lambda *_, **__: (functions, (process, None)))


@pytest.mark.parametrize("kv_heads", [HEADS, 2])
@pytest.mark.parametrize("name", BATCHES)
def test_flash_attention_gets_two_calls(name, kv_heads, flash):
    prefix, sequences = batch_of(BATCHES[name])
    states = make_states(*prefix.shape, kv_heads=kv_heads)
    output, _ = attend("flash_attention_2", [state.half() for state in states], prefix, sequences)
    truth = reference(states, prefix, sequences)
    real = sequences != 0
    torch.testing.assert_close(output[real].double(), truth[real], atol=5e-3, rtol=0)


def test_flash_attention_sees_learned_keys(flash):
    prefix, sequences = batch_of(BATCHES["left padding"])
    states = make_states(*prefix.shape, past=3)
    half = [state.half() for state in states]
    output, _ = attend("flash_attention_2", half, prefix, sequences, past=3, learned_keys=3)
    truth = reference(states, prefix, sequences, past=3)
    real = sequences != 0
    torch.testing.assert_close(output[real].double(), truth[real], atol=5e-3, rtol=0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["long", "long and ragged", "packed"])
def test_cuda(name, dtype, monkeypatch):
    monkeypatch.setattr(prefix_lm, "DENSE_LENGTH", 0)
    prefix, sequences = batch_of(BATCHES[name])
    states = make_states(*prefix.shape)
    layout = find_layout(prefix, sequences)
    on_gpu = [state.detach().to("cuda", dtype).requires_grad_() for state in states]
    output = prefix_lm.two_sdpa_calls(*on_gpu, layout, scaling=SCALING)
    truth = reference(states, prefix, sequences)
    atol = 1e-5 if dtype == torch.float32 else 5e-2
    torch.testing.assert_close(output.double().cpu(), truth, atol=atol, rtol=0)
    weight = torch.randn_like(truth)
    grads = torch.autograd.grad((output * weight.to("cuda", dtype)).sum(), on_gpu)
    for got, want in zip(grads, torch.autograd.grad((truth * weight).sum(), states), strict=True):
        torch.testing.assert_close(got.double().cpu(), want, atol=20 * atol, rtol=0)
