"""The integer layers against their definition: packing, rounding, outputs and gradients."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hf_cnllm.models.chatglm.quantized_linear import (
    QuantizedEmbedding,
    QuantizedLinear,
    dequantize_rows,
    pack_int4,
    quantize_rows,
    refuse_unfit_weights,
    unpack_int4,
)


def reference_unpack(byte: int) -> tuple[int, int]:
    """Two's complement of the high and of the low nibble, the slow way."""
    nibbles = (byte >> 4) & 15, byte & 15
    return tuple(nibble - 16 if nibble > 7 else nibble for nibble in nibbles)


def test_every_byte_unpacks_by_definition():
    packed = torch.arange(-128, 128, dtype=torch.int8)
    expected = torch.tensor([reference_unpack(byte) for byte in range(-128, 128)], dtype=torch.int8)
    assert torch.equal(unpack_int4(packed[:, None]), expected)
    assert torch.equal(pack_int4(expected)[:, 0], packed)


@given(st.lists(st.integers(-8, 7), min_size=2, max_size=20).filter(lambda values: len(values) % 2 == 0))
def test_packing_round_trips(values):
    integers = torch.tensor([values], dtype=torch.int8)
    assert torch.equal(unpack_int4(pack_int4(integers)), integers)


def original_rows(weight: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What the originals make of a float weight."""
    scale = (weight.abs().max(dim=-1).values / (2 ** (bits - 1) - 1)).half()
    integers = torch.round(weight / scale[:, None]).to(torch.int8)
    return (pack_int4(integers) if bits == 4 else integers), scale


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
any_bits, any_dtype = st.sampled_from([4, 8]), st.sampled_from(DTYPES)


@settings(max_examples=300)
@given(st.integers(0, 10_000), any_bits, any_dtype, st.floats(-8, 5))
def test_no_weight_is_off_by_more_than_about_half_a_step_over_13_magnitudes(seed, bits, dtype, magnitude):
    weight = torch.randn(5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 10**magnitude
    weight = weight.clamp(-65504, 65504).to(dtype)
    quantized, scale = quantize_rows(weight, bits)
    assert quantized.dtype == torch.int8 and quantized.shape == (5, 8 * bits // 8) and scale.dtype == dtype
    found, exact = dequantize_rows(quantized, scale, bits, torch.float64), weight.double()
    largest = exact.abs().amax(dim=-1, keepdim=True)
    bound = 0.54 * largest / (2 ** (bits - 1) - 1) + (2**-25 if dtype == torch.float16 else 0)
    assert ((found - exact).abs() <= bound * (1 + 1e-6)).all()
    assert (found * exact >= 0).all()
    assert (found[(exact.abs() == largest) & (exact != 0)] != 0).all()


@given(st.integers(0, 10_000), any_bits, st.sampled_from([torch.float16, torch.float32]), st.floats(-2, 3))
def test_ordinary_rows_become_what_the_originals_make_of_them(seed, bits, dtype, magnitude):
    weight = (torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)) * 10**magnitude).to(dtype)
    for found, expected in zip(quantize_rows(weight, bits), original_rows(weight, bits), strict=True):
        assert torch.equal(found, expected.to(found.dtype))


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused_by_name(wrong):
    weight = torch.randn(5, 8)
    refuse_unfit_weights({"a": weight})
    weight[3, 2] = wrong
    with pytest.raises(ValueError, match=r"`a` holds NaN or infinite values \(in row 3\), which cannot be quantized"):
        refuse_unfit_weights({"a": weight})


@pytest.mark.parametrize("bits", [4, 8])
def test_a_row_of_zeros_stays_zero(bits):
    weight = torch.zeros(2, 4)
    weight[1] = 1.0
    quantized, scale = quantize_rows(weight, bits)
    assert torch.equal(dequantize_rows(quantized, scale, bits, torch.float32)[0], torch.zeros(4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_dequantizing_rounds_the_exact_product_once(bits, dtype):
    quantized, scale = quantize_rows(torch.randn(6, 8).half(), bits)
    integers = unpack_int4(quantized) if bits == 4 else quantized
    exact = integers.double() * scale.double()[:, None]
    assert torch.equal(dequantize_rows(quantized, scale, bits, dtype), exact.to(dtype))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_layer_is_a_linear_layer_with_the_dequantized_weight(bits, bias):
    linear = nn.Linear(16, 6, bias=bias).double()
    layer = QuantizedLinear.like(linear, bits).quantize_from(linear)
    naive = layer.dequantize(torch.float64)
    inputs = torch.randn(2, 3, 16, dtype=torch.float64, requires_grad=True)
    expected = naive(inputs)
    torch.testing.assert_close(layer(inputs), expected, atol=1e-12, rtol=0)
    (grad_expected,) = torch.autograd.grad(expected.square().sum(), inputs)
    (grad,) = torch.autograd.grad(layer(inputs).square().sum(), inputs)
    torch.testing.assert_close(grad, grad_expected, atol=1e-12, rtol=0)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    if bias:  # frozen by default, yet right if somebody trains it
        layer.bias.requires_grad_(True)
        layer(inputs).square().sum().backward()
        naive(inputs).square().sum().backward()
        torch.testing.assert_close(layer.bias.grad, naive.bias.grad, atol=1e-12, rtol=0)


@pytest.mark.parametrize("bits", [4, 8])
def test_half_precision_adds_the_bias_to_the_rounded_product_as_the_originals_do(bits):
    torch.manual_seed(0)
    linear = nn.Linear(16, 24).half()
    layer = QuantizedLinear.like(linear, bits).quantize_from(linear)
    inputs = torch.randn(50, 16).half()
    weight = dequantize_rows(layer.weight, layer.weight_scale, bits, torch.float16)
    assert torch.equal(layer(inputs), nn.functional.linear(inputs, weight) + layer.bias)
    assert not torch.equal(layer(inputs), nn.functional.linear(inputs, weight, layer.bias))


def test_backward_keeps_the_integers_and_not_the_floats():
    layer = QuantizedLinear.like(nn.Linear(64, 64), 4).quantize_from(nn.Linear(64, 64))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor
    ):
        layer(torch.randn(1, 64, requires_grad=True))
    assert sum(tensor.numel() * tensor.element_size() for tensor in saved) < 64 * 64


def test_under_autocast_forward_and_backward():
    layer = QuantizedLinear.like(nn.Linear(8, 4), 8).quantize_from(nn.Linear(8, 4))
    inputs = torch.randn(2, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(inputs)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16 and inputs.grad.dtype == torch.float32


@pytest.mark.parametrize("bits", [4, 8])
def test_the_embedding_looks_up_the_dequantized_rows(bits):
    embedding = nn.Embedding(10, 8)
    layer = QuantizedEmbedding.like(embedding, bits).quantize_from(embedding)
    ids = torch.tensor([[3, 0, 9]])
    assert torch.equal(layer(ids), layer.dequantize(torch.float32)(ids))
    assert layer.half()(ids).dtype == torch.float16


def test_an_odd_number_of_inputs_does_not_pack():
    with pytest.raises(ValueError, match="INT4 packs 2 inputs into a byte, but the layer has 7"):
        QuantizedLinear.like(nn.Linear(7, 3), 4)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bits", [4, 8])
def test_cuda_dequantizes_as_the_cpu_does(bits, dtype):
    quantized, scale = quantize_rows(torch.randn(64, 32).half(), bits)
    on_cpu = dequantize_rows(quantized, scale, bits, dtype)
    assert torch.equal(dequantize_rows(quantized.cuda(), scale.cuda(), bits, dtype).cpu(), on_cpu)
