"""NormHead: an output head whose rows are normalised (Baichuan 2, arXiv 2309.10305, section 2.4).

    logits = h · (W / ‖W‖)ᵀ,   with ‖·‖ the L2 norm of each row of W [vocab_size, hidden_size]

The published code normalised inside `forward` and, on the first call in evaluation mode, overwrote the weight. Here
nothing is ever overwritten:

- the *parameter* (state dict, optimizer, `named_parameters`, safetensors) is the raw W, under the name `weight`;
- the *attribute* `head.weight` reads as the effective, normalised matrix, with gradient to the raw one. Code that
  multiplies hidden states by `model.get_output_embeddings().weight` on its own, as TRL's fused heads do, gets right
  logits without knowing of NormHead.
"""

import torch
from torch import nn
from torch.nn import functional as F


# The smallest norm divided by, as in `torch.nn.functional.normalize`.
NORM_EPSILON = 1e-12


def normalize_rows(weight: torch.Tensor) -> torch.Tensor:
    """`weight` [vocab_size, hidden_size] with every row scaled to length 1: the naive reference of [`NormHead`]."""
    return F.normalize(weight, dim=-1, eps=NORM_EPSILON)


def inverse_row_norms(weight: torch.Tensor) -> torch.Tensor:
    """1 / ‖w_v‖, at least in fp32, [vocab_size]."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight, dim=-1, dtype=dtype).clamp_min(NORM_EPSILON).reciprocal()


class NormHead(nn.Module):
    """Output projection with row-normalised weight, without bias.

    Not a subclass of `nn.Linear` on purpose: a LoRA delta merged into the raw weight would be normalised with it, so
    PEFT must refuse this module as a LoRA target (`modules_to_save=["lm_head"]` works).

    Args:
        hidden_size: width of the input.
        vocab_size: number of rows.
    """

    bias = None  # what code that handles `nn.Linear` heads looks for

    def __init__(self, hidden_size: int, vocab_size: int, device=None, dtype=None):
        super().__init__()
        self.in_features = hidden_size
        self.out_features = vocab_size
        self.register_parameter("weight", nn.Parameter(torch.empty(vocab_size, hidden_size, device=device, dtype=dtype)))
        nn.init.kaiming_uniform_(self.raw_weight, a=5**0.5)
        self._memo: tuple[tuple, torch.Tensor] | None = None

    @property
    def raw_weight(self) -> nn.Parameter:
        """The stored parameter [vocab_size, hidden_size]."""
        try:
            return self._parameters["weight"]
        except KeyError:
            raise AttributeError("NormHead has no parameter `weight`") from None

    @property
    def weight(self) -> torch.Tensor:
        """The effective matrix [vocab_size, hidden_size], differentiable with respect to [`raw_weight`]."""
        return normalize_rows(self.raw_weight)

    def get_parameter(self, target: str) -> nn.Parameter:
        return self.raw_weight if target == "weight" else super().get_parameter(target)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> logits [..., vocab_size].

        The rows' norms scale the logits, not the matrix: besides the matmul itself there is no work of size
        [vocab_size, hidden_size] while the weight does not change.
        """
        raw_logits = F.linear(hidden_states, self.raw_weight)
        return (raw_logits * self._inverse_row_norms()).to(raw_logits.dtype)

    def _inverse_row_norms(self) -> torch.Tensor:
        weight = self.raw_weight
        needs_grad = torch.is_grad_enabled() and weight.requires_grad
        if self.training or needs_grad or weight.is_meta or weight.is_inference() or torch.compiler.is_compiling():
            return inverse_row_norms(weight)
        # Memoised for one version of the weight: an in-place change, a move or a replacement makes a new key. Writes
        # through `raw_weight.data` have no version; `train()` and `eval()` forget the memo for their sake.
        key = (weight._version, weight.data_ptr(), weight.device, weight.dtype, weight.shape)
        if self._memo is None or self._memo[0] != key:
            self._memo = (key, inverse_row_norms(weight.detach()))
        return self._memo[1]

    def train(self, mode: bool = True) -> "NormHead":
        self._memo = None
        return super().train(mode)

    def as_linear(self) -> nn.Linear:
        """A plain linear layer that shares the raw parameter."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = self.raw_weight
        return linear

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "NormHead":
        """A NormHead whose raw parameter is `linear.weight` itself."""
        head = cls(linear.in_features, linear.out_features, device="meta")
        head.register_parameter("weight", linear.weight)
        return head

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"
