"""Weight-only INT8 and INT4 layers in the format of the ChatGLM line's quantized checkpoints.

A row of the weight is stored as integers with one scale::

    scale = max|row| / (2^(bits - 1) - 1),    q = round(row / scale),    row ~ scale * q

The originals round the scale to half precision first, which for ordinary rows costs nothing: its 11 bits leave q within its
range. Half precision ends, though, at 6e-8 and 65,504, and has few bits below 6e-5: there the largest q would be 128, which
is -128 in a byte, or the scale 0 or infinite. A scale that half precision holds only roughly is kept as it is, or rounded up
where the layer itself is in half precision.

GLM-130B was quantized after its columns were split among processes: its rows have a scale for each of some equal groups of
columns, (rows, groups).

INT4 packs two neighboring inputs into a byte, the even one in the high nibble, both in two's complement. The layers
dequantize on the fly, in the dtype of their input, and once more in the backward pass instead of keeping the result.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..row_parallel import row_parallel

# How far rounding may move a scale, relatively: 127 times this is less than half, which leaves q within its range.
ROUNDING = 2.0**-9
# The distance between half precision's smallest numbers.
HALF_STEP = 2.0**-24


def quantize_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(rows, columns) floats -> integers (rows, columns * bits / 8) in int8 and scales (rows,) in the weight's dtype.

    No weight is off by more than 0.54 times max|row| / (2^(bits - 1) - 1), plus `HALF_STEP / 2` in half precision, and none
    changes its sign. Weights must be finite, see [`refuse_unfit_weights`].
    """
    largest, dtype = 2 ** (bits - 1) - 1, weight.dtype
    maximum = weight.abs().amax(dim=-1)
    exact = maximum.to(torch.promote_types(dtype, torch.float32)) / largest
    scale = (maximum / largest).half().to(dtype)
    kept = torch.where(scale < exact, scale + HALF_STEP, scale) if dtype == torch.float16 else exact.to(dtype)
    scale = torch.where((scale - exact).abs() <= ROUNDING * exact, scale, kept)
    if dtype == torch.bfloat16:
        weight = weight.float()  # its quotients around 127 would be halves
    quantized = torch.round(weight / scale[:, None]).nan_to_num(nan=0.0).clamp(-largest, largest).to(torch.int8)
    return (pack_int4(quantized) if bits == 4 else quantized), scale


def refuse_unfit_weights(weights: dict[str, Tensor]) -> None:
    """Refuses, with a ValueError, weights that no integers with one scale can stand for."""
    for name, weight in weights.items():
        if not weight.is_meta and not weight.isfinite().all():
            row = int((~weight.isfinite().all(dim=-1)).nonzero()[0])
            raise ValueError(
                f"`{name}` holds NaN or infinite values (in row {row}), which cannot be quantized: is the checkpoint damaged?"
            )


def dequantize_rows(weight: Tensor, scale: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Integers (..., columns * bits / 8) and scales (...,) or (..., groups) -> (..., columns) in `dtype`, rounded once."""
    integers = unpack_int4(weight) if bits == 4 else weight
    if scale.ndim == weight.ndim:
        return dequantize_rows(integers.unflatten(-1, (scale.shape[-1], -1)), scale, 8, dtype).flatten(-2)
    if dtype in (torch.float16, torch.bfloat16) and scale.dtype != dtype:
        return (integers * scale.float()[..., None]).to(dtype)
    return integers * scale.to(dtype)[..., None]


def pack_int4(integers: Tensor) -> Tensor:
    """(..., columns) int8 in [-8, 7] -> (..., columns / 2): even columns in the high nibble."""
    return (integers[..., 0::2] << 4) | (integers[..., 1::2] & 0xF)


def unpack_int4(packed: Tensor) -> Tensor:
    """(..., columns / 2) bytes -> (..., columns) int8 in [-8, 7]."""
    high = packed >> 4
    low = ((packed & 0xF) ^ 0x8) - 0x8
    return torch.stack((high, low), dim=-1).flatten(-2)


def packed_size(columns: int, bits: int) -> int:
    if columns * bits % 8:
        raise ValueError(f"INT{bits} packs {8 // bits} inputs into a byte, but the layer has {columns} inputs")
    return columns * bits // 8


class _DequantizedLinear(torch.autograd.Function):
    """`linear(inputs, dequantized weight)` that keeps the integers for its backward pass, not the floats."""

    @staticmethod
    def forward(ctx, inputs: Tensor, weight: Tensor, scale: Tensor, bits: int) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.bits, ctx.input_dtype = bits, inputs.dtype
        return nn.functional.linear(inputs, dequantize_rows(weight, scale, bits, inputs.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        weight, scale = ctx.saved_tensors
        grad_inputs = None
        if ctx.needs_input_grad[0]:
            grad_inputs = grad_output @ dequantize_rows(weight, scale, ctx.bits, grad_output.dtype)
            grad_inputs = grad_inputs.to(ctx.input_dtype)
        return grad_inputs, None, None, None


class QuantizedRows(nn.Module):
    """What the layers share: `weight` (rows, columns * bits / 8) int8 and `weight_scale` (rows,) or (rows, groups), both
    frozen."""

    bits: int
    weight: nn.Parameter
    weight_scale: nn.Parameter

    def _make_rows(self, rows: int, columns: int, bits: int, device, dtype, groups: int = 1):
        self.bits = bits
        size = (rows, packed_size(columns, bits))
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.int8, device=device), requires_grad=False)
        scales = (rows,) if groups == 1 else (rows, groups)
        self.weight_scale = nn.Parameter(torch.empty(scales, dtype=dtype, device=device), requires_grad=False)

    @torch.no_grad()
    def quantize_from(self, module: nn.Linear | nn.Embedding) -> "QuantizedRows":
        """Takes over the float weights of a layer of this shape."""
        weight, scale = quantize_rows(module.weight, self.bits)
        self.weight.copy_(weight)
        self.weight_scale.copy_(scale)
        if (bias := getattr(module, "bias", None)) is not None:
            self.get_parameter("bias").copy_(bias)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, bits={self.bits}"


class QuantizedLinear(QuantizedRows, nn.Linear):
    """A frozen linear layer with integer weights, whose bias is added to the rounded product, as the originals'.

    It is an `nn.Linear`, so that PEFT puts LoRA on it; merging an adapter needs `model.dequantize()` first.
    """

    is_row_parallel = False  # which says what it is made of, and becomes again

    def __init__(
        self, in_features: int, out_features: int, bias: bool, bits: int, device=None, dtype=None, groups: int = 1
    ):
        super().__init__(in_features, out_features, bias, device="meta", dtype=dtype)
        self._make_rows(out_features, in_features, bits, device, dtype, groups)
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype, device=device), requires_grad=False)

    @classmethod
    def like(cls, linear: nn.Linear, bits: int, groups: int = 1) -> "QuantizedLinear":
        """An empty layer of the same shape, on the device and in the dtype of `linear`."""
        form = (linear.in_features, linear.out_features, linear.bias is not None)
        quantized = cls(*form, bits, linear.weight.device, linear.weight.dtype, groups)
        quantized.is_row_parallel = getattr(linear, "is_row_parallel", False)
        return quantized

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype) -> nn.Linear:
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta")
        linear.weight = nn.Parameter(dequantize_rows(self.weight, self.weight_scale, self.bits, dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.to(dtype))
        return row_parallel(linear) if self.is_row_parallel else linear

    def forward(self, inputs: Tensor) -> Tensor:
        output = _DequantizedLinear.apply(inputs, self.weight, self.weight_scale, self.bits)
        return output if self.bias is None else output + self.bias.to(output.dtype)


class QuantizedEmbedding(QuantizedRows, nn.Embedding):
    """A frozen embedding with integer rows."""

    def __init__(self, num_embeddings: int, embedding_dim: int, bits: int, device=None, dtype=None):
        super().__init__(num_embeddings, embedding_dim, device="meta", dtype=dtype)
        self._make_rows(num_embeddings, embedding_dim, bits, device, dtype)

    @classmethod
    def like(cls, embedding: nn.Embedding, bits: int) -> "QuantizedEmbedding":
        weight = embedding.weight
        return cls(embedding.num_embeddings, embedding.embedding_dim, bits, weight.device, weight.dtype)

    @torch.no_grad()
    def dequantize(self, dtype: torch.dtype) -> nn.Embedding:
        weight = dequantize_rows(self.weight, self.weight_scale, self.bits, dtype)
        return nn.Embedding.from_pretrained(weight, freeze=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        scale = self.weight_scale
        return dequantize_rows(self.weight[input_ids], scale[input_ids], self.bits, scale.dtype)
