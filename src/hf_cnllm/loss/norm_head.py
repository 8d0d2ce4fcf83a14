"""NormHead: an output head whose rows are normalized (Baichuan 2, arXiv 2309.10305, section 2.4).

    logits = h · (W / ‖W‖)ᵀ,   with ‖·‖ the L2 norm of each row of W [vocab_size, hidden_size]

The published code normalized inside `forward` and, on the first call in evaluation mode, overwrote the weight. Here
nothing is ever overwritten:

- the *parameter* (state dict, optimizer, `named_parameters`, safetensors) is the raw W, under the name `weight`;
- the *attribute* `head.weight` reads as the effective, normalized matrix, with gradient to the raw one. Code that
  multiplies hidden states by `model.get_output_embeddings().weight` on its own, as TRL's fused heads do, gets right
  logits without knowing of NormHead.

The norms are computed in every forward pass: nothing tells that a weight was written to (`weight.data.mul_()`, as TRL updates
its reference models, leaves no trace). Only where it is known that nobody writes are they kept: [`weights_stay`].
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import nn
from torch.nn import functional as F

# The smallest norm divided by, as in `torch.nn.functional.normalize`.
NORM_EPSILON = 1e-12
# What products with raw rows may reach in fp16, which ends at 65,504.
FP16_REACH = 2.0**14

_kept_norms: ContextVar[dict[int, tuple[tuple, torch.Tensor]] | None] = ContextVar("kept_norms", default=None)


@contextmanager
def weights_stay() -> Iterator[None]:
    """While it lasts, nobody writes to a weight in this thread, as in `generate`: each NormHead computes its norms once."""
    if _kept_norms.get() is not None:
        yield
        return
    token = _kept_norms.set({})
    try:
        yield
    finally:
        _kept_norms.reset(token)


def normalize_rows(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [vocab_size, hidden_size] with every row scaled to length 1: the naive reference of [`NormHead`]."""
    if weight.dtype == torch.float16:  # which has neither room for large norms nor an ε as small
        return (weight * inverse_row_norms(weight)[:, None]).half()
    return F.normalize(weight, dim=-1, eps=NORM_EPSILON)


def inverse_row_norms(weight: torch.Tensor) -> torch.Tensor:
    """1 / ‖w_v‖, at least in fp32, [vocab_size]."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=-1, dtype=dtype).clamp_min(NORM_EPSILON).reciprocal()


def fit_into_fp16(hidden_states: torch.Tensor, inverse_norms: torch.Tensor) -> torch.Tensor:
    """Factors [..., 1] in fp16, at most 1, for `hidden_states` [..., hidden_size], whose products with raw rows then stay in fp16's
    range: |h·w| ≤ ‖h‖ ‖w‖. The logits, at most ‖h‖, are to be divided by them. Ordinary rows need none and get 1."""
    norms = torch.linalg.vector_norm(hidden_states.detach(), dim=-1, keepdim=True, dtype=torch.float32)
    return (FP16_REACH * inverse_norms.detach().min() / norms).clamp(max=1).half()


def rows_around_mean(weight: torch.Tensor, count: int) -> torch.Tensor:
    """`count` random new rows [count, hidden_size] for a NormHead's raw `weight`, fp32, as long as its rows on average.

    Normalized, their mean is that of the old rows, as `resize_token_embeddings` wants it: each is that mean plus a
    direction at right angles to it, and the directions cancel out, in pairs ±d, of an odd number three in a plane. (Rows
    drawn close to the mean itself would all be stretched to length 1 and outbid the old ones.) One row alone has nothing
    to cancel with.
    """
    weight = weight.float()
    mean = normalize_rows(weight).mean(dim=0)
    random = torch.randn(weight.shape[1], count // 2 + 2, device=weight.device)
    # Each column after the first at right angles to the mean; the last two also to each other.
    first, second = torch.linalg.qr(torch.stack([mean, *random[:, -2:].T], dim=1)).Q[:, 1:].T
    single = [first]
    triple = [first, (3**0.5 * second - first) / 2, (-(3**0.5) * second - first) / 2]
    odd = [] if count % 2 == 0 else single if count == 1 else triple
    pairs = random[:, : (count - len(odd)) // 2].T
    pairs = normalize_rows(pairs - (pairs @ mean)[:, None] * mean / mean.square().sum().clamp_min(NORM_EPSILON))
    directions = torch.cat([pairs, -pairs, *(direction[None] for direction in odd)])
    rows = mean + directions * (1 - mean.square().sum()).clamp_min(0).sqrt()
    return rows * torch.linalg.vector_norm(weight, dim=-1).mean()


class EffectiveWeight(torch.Tensor):
    """The row-normalized matrix as `NormHead.weight` gives it: computed afresh, so writing to it would be lost.

    Operations on it give plain tensors; what would change it in place raises.
    """

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        in_place = name in ("__set__", "__setitem__") or (name.endswith("_") and not name.endswith("__"))
        if in_place and isinstance(args[0], cls):
            raise RuntimeError(
                "NormHead.weight is the row-normalized form of NormHead.raw_weight and cannot be written to. "
                "Change `raw_weight` instead; a LoRA adapter on this head cannot be merged, so leave `lm_head` out of "
                "its target modules (`modules_to_save=['lm_head']` trains the head itself)."
            )
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))


class NormHead(nn.Linear):
    """Output projection with row-normalized weight, without bias."""

    def __init__(self, hidden_size: int, vocab_size: int, device=None, dtype=None):
        super().__init__(hidden_size, vocab_size, bias=False, device=device, dtype=dtype)

    def reset_parameters(self):
        nn.init.kaiming_uniform_(self.raw_weight, a=5**0.5)

    @property
    def raw_weight(self) -> nn.Parameter:
        """The stored parameter [vocab_size, hidden_size]."""
        if "weight" in self._parameters:
            return self._parameters["weight"]
        if "weight" not in self.__dict__:  # the setter below puts it there
            raise AttributeError("NormHead has no parameter `weight`")
        if torch.is_grad_enabled():  # in forward; by then FSDP1 has made the view a parameter, if it does so at all
            raise RuntimeError("NormHead works under FSDP2, and under FSDP1 only with use_orig_params=True")
        return self.__dict__["weight"]

    @property
    def weight(self) -> torch.Tensor:
        """The effective matrix [vocab_size, hidden_size], differentiable with respect to [`raw_weight`].

        While FSDP keeps only a shard in memory, that is, outside of forward, it is that raw shard: FSDP looks up the
        parameters that it manages by attribute, and would train and write back whatever it found. On the meta device, where
        there is nothing to normalize, it is the parameter too.
        """
        raw = self.raw_weight
        is_shard = hasattr(raw, "full_tensor") or getattr(raw, "_fsdp_flattened", False)  # FSDP2, FSDP1
        if is_shard or raw.is_meta or "weight" not in self._parameters or raw.untyped_storage().size() == 0:
            return raw
        effective = normalize_rows(raw)
        return effective.as_subclass(EffectiveWeight) if type(effective) is torch.Tensor else effective

    # FSDP1 exchanges the parameter for a view of the gathered one by `delattr` and `setattr`: nn.Module looks after
    # parameters, plain tensors come here.
    @weight.setter
    def weight(self, value: torch.Tensor) -> None:
        self.__dict__["weight"] = value

    @weight.deleter
    def weight(self) -> None:
        del self.__dict__["weight"]

    def get_parameter(self, target: str) -> nn.Parameter:
        return self.raw_weight if target == "weight" else super().get_parameter(target)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> logits [..., vocab_size]. The rows' norms scale the logits, not the matrix."""
        inverse_norms, device = self._inverse_row_norms(), hidden_states.device.type
        autocast = device != "meta" and torch.is_autocast_enabled(device)
        if (torch.get_autocast_dtype(device) if autocast else hidden_states.dtype) != torch.float16:
            raw_logits = F.linear(hidden_states, self.raw_weight)
            return (raw_logits * inverse_norms).to(raw_logits.dtype)
        factors = fit_into_fp16(hidden_states, inverse_norms)
        raw_logits = F.linear(hidden_states * factors, self.raw_weight)
        return (raw_logits * inverse_norms / factors).to(raw_logits.dtype)

    def _inverse_row_norms(self) -> torch.Tensor:
        weight = self.raw_weight
        needs_grad = torch.is_grad_enabled() and weight.requires_grad
        if torch.compiler.is_compiling() or needs_grad or weight.is_meta or weight.is_inference():
            return inverse_row_norms(weight)
        if (kept := _kept_norms.get()) is None:
            return inverse_row_norms(weight)
        # What is moved or loaded in the midst of it has another key.
        key = (weight._version, weight.data_ptr(), weight.device, weight.dtype, weight.shape)
        if id(self) not in kept or kept[id(self)][0] != key:
            kept[id(self)] = key, inverse_row_norms(weight)
        return kept[id(self)][1]

    def as_linear(self) -> nn.Linear:
        """A plain linear layer that shares the raw parameter."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = self.raw_weight
        return linear

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "NormHead":
        """A NormHead whose raw parameter is `linear.weight` itself."""
        head = cls(linear.in_features, linear.out_features, device="meta")
        head.register_parameter("weight", linear.get_parameter("weight"))
        return head
