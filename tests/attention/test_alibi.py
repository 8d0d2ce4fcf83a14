"""Every way ALiBi is computed against the dense reference: outputs and gradients, dtypes, masks, lengths, heads."""

import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.cache_utils import DynamicCache, StaticCache

import flash_stand_in
from hf_cnllm import BaichuanConfig
from hf_cnllm.attention import alibi
from hf_cnllm.attention.alibi import alibi_attention, alibi_slopes, create_alibi_mask, fold_alibi
from hf_cnllm.attention.reference import alibi_bias_reference, attention_reference

BACKENDS = ("eager", "sdpa", "flex_attention", "flash_attention_2")
FULL, HALF = (torch.float64, torch.float32), (torch.bfloat16, torch.float16)
# The dense reference in the same precision is about this far from fp64.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@pytest.fixture(autouse=True)
def flash_attn():
    with flash_stand_in.installed():
        yield


@pytest.fixture(autouse=True)
def fold_short_prompts_too(monkeypatch):
    monkeypatch.setattr(alibi, "DENSE_PAIRS", 1)


def dtypes(*backends):
    """Each backend with each dtype that it computes in."""
    return [(backend, dtype) for backend in backends for dtype in (*FULL, *HALF) if runs_in(backend, dtype)]


def runs_in(backend, dtype):
    return dtype in HALF if backend == "flash_attention_2" else backend != "flex_attention" or dtype != torch.float64


def precise(backend):
    """The most precise dtype that all of a test's backends can be compared in, and what to expect of it."""
    dtype = torch.float16 if backend == "flash_attention_2" else torch.float32
    return dtype, TOLERANCE[dtype]


class Layer(nn.Module):
    """What attention functions read of a layer."""

    num_key_value_groups = 1
    is_causal = True


def config_of(heads: int, head_dim: int, backend: str) -> BaichuanConfig:
    config = BaichuanConfig(hidden_size=heads * head_dim, num_attention_heads=heads, position_embedding="alibi")
    config._attn_implementation = backend
    return config


def attend(query, key, value, backend, attention_mask=None, cache=None, position_ids=None):
    heads, head_dim = query.shape[1], query.shape[3]
    config = config_of(heads, head_dim, backend)
    inputs = query.new_empty(query.shape[0], query.shape[2], 0)
    mask = create_alibi_mask(config, inputs, attention_mask, cache, position_ids)
    layer = Layer().eval()
    layer.num_key_value_groups = heads // key.shape[1]
    output, _ = alibi_attention(backend)(layer, query, key, value, mask, scaling=head_dim**-0.5)
    return output.transpose(1, 2)


def reference(query, key, value, allowed=None):
    """In fp64; `allowed` [batch, 1, queries, keys] on top of causality."""
    query, key, value = query.double(), key.double(), value.double()
    bias = alibi_bias_reference(alibi_slopes(query.shape[1]).double(), query.shape[2], key.shape[2])[None]
    if allowed is not None:
        bias = bias.masked_fill(~allowed, -math.inf)
    return attention_reference(query, key, value, bias, query.shape[3] ** -0.5)


def random_qkv(batch, heads, length, head_dim, dtype=torch.float32, keys=None):
    generator = torch.Generator().manual_seed(length + heads)
    shapes = ((batch, heads, n, head_dim) for n in (length, keys or length, keys or length))
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


@pytest.mark.parametrize("heads", [1, 4, 5, 12, 40])
def test_slopes_follow_the_papers_rule(heads):
    slopes = alibi_slopes(heads)
    power = 2 ** math.floor(math.log2(heads))
    assert slopes[:power].tolist() == pytest.approx([2 ** (-8 * (k + 1) / power) for k in range(power)])
    assert len(set(slopes.tolist())) == heads


@pytest.mark.parametrize(("backend", "dtype"), dtypes(*BACKENDS))
@pytest.mark.parametrize(("heads", "length", "head_dim"), [(5, 129, 12), (4, 64, 64), (12, 300, 20), (2, 2, 8)])
def test_prefill_matches_reference(backend, dtype, heads, length, head_dim):
    query, key, value = random_qkv(2, heads, length, head_dim, dtype)
    output = attend(query, key, value, backend)
    assert output.dtype == dtype
    tolerance = max(TOLERANCE[dtype], 1e-6)  # slopes are fp32, and so is eager attention's softmax
    torch.testing.assert_close(output.double(), reference(query, key, value), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_folded_error_does_not_grow_with_length(dtype):
    """At 4,096 tokens the bias reaches thousands; the error of the last ones stays that of a short input."""
    query, key, value = random_qkv(1, 5, 4096, 16, dtype)
    output = attend(query, key, value, "sdpa")[:, :, -512:]
    expected = reference(query[:, :, -512:], key, value)
    torch.testing.assert_close(output.double(), expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


MASKS = {
    # name: (padding and sequences of a batch of two rows, 37 tokens each)
    "none": None,
    "left padding": torch.tensor([[1] * 37, [0] * 5 + [1] * 32]),
    "right padding": torch.tensor([[1] * 37, [1] * 32 + [0] * 5]),
    "packed": torch.tensor([[1] * 20 + [2] * 17, [1] + [2] * 8 + [3] * 28]),
    "packed and padded": torch.tensor([[1] * 20 + [2] * 10 + [0] * 7, [1] * 37]),
    "a row of padding": torch.tensor([[1] * 37, [0] * 37]),
}


@pytest.mark.parametrize(("backend", "dtype"), dtypes(*BACKENDS))
@pytest.mark.parametrize("kv_heads", [8, 2])
@pytest.mark.parametrize("name", MASKS)
def test_outputs_and_gradients_match_reference(backend, name, kv_heads, dtype, monkeypatch):
    # torch refuses flex attention's backward pass on CPUs, where it computes what it does elsewhere.
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_validate_device", lambda *states: None)
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(2, heads, 37, 12, generator=generator).to(dtype).requires_grad_()
        for heads in (8, kv_heads, kv_heads)
    ]
    mask = MASKS[name]
    sequences = torch.ones(2, 37, dtype=torch.long) if mask is None else mask
    allowed = ((sequences[:, :, None] == sequences[:, None, :]) & (sequences != 0)[:, None, :])[:, None]
    real = (sequences != 0)[:, None, :, None]
    weights = torch.randn(2, 8, 37, 12, generator=generator).to(dtype) * real
    output, expected = attend(*inputs, backend, mask), reference(*inputs, allowed)
    assert output.isfinite().all()
    # Slopes are fp32, and so is the softmax of eager and of the stand-in.
    tolerance = max(TOLERANCE[dtype], 1e-6 if backend == "sdpa" else 5e-6)
    torch.testing.assert_close(output.double() * real, expected * real, atol=tolerance, rtol=tolerance)
    actual = torch.autograd.grad((output * weights).sum(), inputs)
    wanted = torch.autograd.grad((expected * weights.double()).sum(), inputs)
    for got, want in zip(actual, wanted, strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want.double(), atol=tolerance * want.abs().max().item(), rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_make_no_difference(backend):
    dtype, _ = precise(backend)
    query = torch.randn(2, 33, 8, 12, dtype=dtype).transpose(1, 2)
    key, value = (torch.randn(1, 8, 33, 24, dtype=dtype)[..., ::2].expand(2, -1, -1, -1) for _ in range(2))
    contiguous = (tensor.contiguous() for tensor in (query, key, value))
    torch.testing.assert_close(attend(query, key, value, backend), attend(*contiguous, backend), atol=1e-6, rtol=0)


@pytest.mark.parametrize("heads", [5, 12])
def test_folded_gradients_are_as_exact_as_a_dense_bias(heads):
    """In fp32 too, where a backward kernel that scales k' would lose the far end of the position column."""
    inputs = [tensor.requires_grad_() for tensor in random_qkv(1, heads, 1500, 32)]
    weights = torch.randn(1, heads, 1500, 32)
    folded = torch.autograd.grad((attend(*inputs, "sdpa") * weights).sum(), inputs)
    exact = torch.autograd.grad((reference(*inputs) * weights).sum(), inputs)
    for got, want in zip(folded, exact, strict=True):
        torch.testing.assert_close(got, want, atol=3e-6 * want.abs().max().item(), rtol=0)


@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_autocast_folds_for_the_dtype_of_the_queries(backend):
    inputs = torch.empty(1, 700, 0)
    query, key, value = random_qkv(1, 5, 700, 32, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mask = create_alibi_mask(config_of(5, 32, backend), inputs, None, None)
        output, _ = alibi_attention(backend)(Layer(), query, key, value, mask, scaling=32**-0.5)
    tolerance = TOLERANCE[torch.bfloat16]
    torch.testing.assert_close(
        output.transpose(1, 2).double(), reference(query, key, value), atol=tolerance, rtol=tolerance
    )


def test_queries_of_another_dtype_than_the_cache_are_refused():
    query, key, value = random_qkv(1, 5, 9, 16)
    mask = create_alibi_mask(config_of(5, 16, "sdpa"), torch.empty(1, 9, 0), None, None)
    with pytest.raises(ValueError, match="one dtype"):
        alibi_attention("sdpa")(Layer(), query, key.bfloat16(), value.bfloat16(), mask, scaling=0.25)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_padding_and_packing_matches_reference(backend, data):
    length = data.draw(st.integers(2, 24), label="length")
    rows = st.lists(st.integers(0, min(3, length)), min_size=length, max_size=length)
    mask = torch.tensor([data.draw(rows, label="sequences") for _ in range(2)])
    if backend == "flash_attention_2":
        mask = mask.sort(dim=1, descending=data.draw(st.booleans(), label="padding on the right")).values
    dtype, tolerance = precise(backend)
    query, key, value = random_qkv(2, 3, length, 8, dtype)
    output = attend(query, key, value, backend, mask)
    assert output.isfinite().all()
    allowed = ((mask[:, None, :] == mask[:, :, None]) & (mask != 0)[:, None, :])[:, None]
    real = (mask != 0)[:, None, :, None]
    expected = reference(query, key, value, allowed)
    torch.testing.assert_close(output.double() * real, expected * real, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_restarting_positions_separate_sequences(backend):
    dtype, tolerance = precise(backend)
    query, key, value = random_qkv(1, 5, 9, 12, dtype)
    packed = attend(query, key, value, backend, position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2, 0, 1]]))
    for start, stop in ((0, 4), (4, 7), (7, 9)):
        alone = attend(query[:, :, start:stop], key[:, :, start:stop], value[:, :, start:stop], backend)
        torch.testing.assert_close(packed[:, :, start:stop], alone, atol=tolerance, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("chunk", [1, 4])
def test_continuing_a_cache_matches_reference(backend, kind, chunk):
    heads, head_dim, length, room = 5, 12, 20, 32
    dtype, tolerance = precise(backend)
    query, key, value = random_qkv(2, heads, length, head_dim, dtype)
    config = config_of(heads, head_dim, backend)
    config.num_hidden_layers = 1
    cache = DynamicCache() if kind == "dynamic" else StaticCache(config=config, max_cache_len=room)
    past = length - chunk
    cache.update(key[:, :, :past], value[:, :, :past], 0)
    inputs = query.new_empty(2, chunk, 0)
    mask = create_alibi_mask(config, inputs, torch.ones(2, length, dtype=torch.long), cache)
    keys, values = cache.update(key[:, :, past:], value[:, :, past:], 0)
    output, _ = alibi_attention(backend)(
        Layer().eval(), query[:, :, past:], keys, values, mask, scaling=head_dim**-0.5
    )
    expected = reference(query[:, :, past:], key, value)
    torch.testing.assert_close(output.transpose(1, 2).double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS[:3])
def test_bool_and_additive_4d_masks_are_taken_as_they_are(backend):
    query, key, value = random_qkv(1, 5, 6, 12)
    allowed = torch.rand(1, 1, 6, 6, generator=torch.Generator().manual_seed(0)) > 0.4
    allowed |= torch.eye(6, dtype=torch.bool)
    bias = alibi_slopes(5)[:, None, None] * (torch.arange(6) - torch.arange(6)[:, None])
    expected = attention_reference(query, key, value, bias.masked_fill(~allowed, -math.inf), 12**-0.5)
    additive = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)
    for mask in (allowed, additive):
        torch.testing.assert_close(attend(query, key, value, backend, mask), expected, atol=3e-6, rtol=0)


def test_flash_continues_a_padded_batch_and_refuses_padding_inside():
    dtype, tolerance = precise("flash_attention_2")
    query, key, value = random_qkv(2, 5, 10, 12, dtype)
    mask = torch.ones(2, 10, dtype=torch.long)
    mask[1, :4] = 0
    cache = DynamicCache()
    cache.update(key[:, :, :7], value[:, :, :7], 0)
    config = config_of(5, 12, "flash_attention_2")
    plan = create_alibi_mask(config, query.new_empty(2, 3, 0), mask, cache)
    output, _ = alibi_attention("flash_attention_2")(Layer(), query[:, :, 7:], key, value, plan, scaling=12**-0.5)
    expected = reference(query, key, value, (mask != 0)[:, None, None, :])[:, :, 7:]
    torch.testing.assert_close(output.transpose(1, 2).double(), expected, atol=tolerance, rtol=tolerance)
    mask[0, 3] = 0
    with pytest.raises(ValueError, match="padding inside a sequence"):
        create_alibi_mask(config, query.new_empty(2, 3, 0), mask, cache)
    with pytest.raises(ValueError, match="2-D `attention_mask`"):
        create_alibi_mask(config, query.new_empty(2, 10, 0), torch.ones(2, 10, 10), None)


def test_flash_casts_queries_of_norms_kept_in_fp32():
    """As transformers' own path does: QLoRA keeps norms in fp32, and the queries with them."""
    query, key, value = random_qkv(1, 5, 9, 16, torch.bfloat16)
    layer = Layer()
    layer.config, layer.proj = config_of(5, 16, "flash_attention_2"), nn.Linear(2, 2, dtype=torch.bfloat16)
    mask = create_alibi_mask(layer.config, torch.empty(1, 9, 0), None, None)
    attention = alibi_attention("flash_attention_2")
    output, _ = attention(layer, query.float(), key.float(), value.float(), mask, scaling=0.25)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, attention(layer, query, key, value, mask, scaling=0.25)[0])
    layer.config._is_quantized, layer.config.dtype = True, torch.float16
    assert attention(layer, query.float(), key.float(), value.float(), mask, scaling=0.25)[0].dtype == torch.float16


@pytest.mark.parametrize(("setting", "expected"), [(None, False), ("0", False), ("1", True)])
@pytest.mark.parametrize("mask", [None, MASKS["left padding"]], ids=["whole rows", "padding"])
def test_flash_is_deterministic_when_transformers_is_told_so(mask, setting, expected, monkeypatch):
    monkeypatch.delenv("FLASH_ATTENTION_DETERMINISTIC", raising=False)
    if setting is not None:
        monkeypatch.setenv("FLASH_ATTENTION_DETERMINISTIC", setting)
    seen = []
    for name in ("flash_attn_func", "flash_attn_varlen_func"):
        function = getattr(flash_stand_in, name)

        def recording(*args, function=function, **kwargs):
            seen.append(kwargs["deterministic"])
            return function(*args, **kwargs)

        monkeypatch.setattr(sys.modules["flash_attn"], name, recording)
    attend(*random_qkv(2, 5, 37, 12, torch.bfloat16), "flash_attention_2", mask)
    assert seen == [expected]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["sdpa", "flex_attention", "flash_attention_2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernels_on_a_gpu_match_reference(backend, dtype, monkeypatch):
    if backend == "flash_attention_2":
        monkeypatch.delitem(sys.modules, "flash_attn")
        monkeypatch.delitem(sys.modules, "flash_attn.bert_padding")
        pytest.importorskip("flash_attn")
    for length in (257, 4096):
        tensors = random_qkv(1, 5, length, 64, dtype)
        output = attend(*(tensor.cuda() for tensor in tensors), backend).cpu()
        torch.testing.assert_close(output.double(), reference(*tensors), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("backend", ["flash_attention_3", "flash_attention_4", "paged|sdpa", "sdpaa"])
def test_a_backend_without_the_bias_is_refused(backend):
    with pytest.raises(ValueError, match="has no ALiBi bias"):
        alibi_attention(backend)


@pytest.mark.parametrize(
    ("shape", "complaint"),
    [((2, 5), r"Pass a mask of shape \[2, 6\]"), ((2, 4, 5), r"or \[2, 6, 6\]"), ((6,), r"or \[2, 1, 6, 6\]")],
)
def test_a_mask_that_does_not_fit_is_refused(shape, complaint):
    config = config_of(4, 8, "sdpa")
    with pytest.raises(ValueError, match=complaint):
        create_alibi_mask(config, torch.empty(2, 6, 0), torch.ones(shape, dtype=torch.long), None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_more_keys_than_half_precision_can_count_are_refused(dtype):
    slopes, keys = alibi_slopes(2), 2**16
    fold_alibi(slopes, torch.arange(2), torch.arange(keys), None, 0.5, dtype)
    with pytest.raises(ValueError, match="flash_attention_2"):
        fold_alibi(slopes, torch.arange(2), torch.arange(keys + 1), None, 0.5, dtype)
