"""Linear layers that add their bias to the rounded product, as Megatron's row-parallel ones do, which sum the products of several
processes first. In half precision that is a sum of its own."""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F


def row_parallel(linear: nn.Linear) -> nn.Linear:
    """Makes the layer one of these, and returns it: by functions of this one layer, since quantization passes over subclasses.
    Copies of it are the same, also pickled ones and the replicas of DataParallel."""
    linear.forward = partial(_forward, linear)  # type: ignore[method-assign]  # which pickle knows, unlike a method
    linear._replicate_for_data_parallel = partial(_replica, linear)  # type: ignore[method-assign]
    linear.is_row_parallel = True  # type: ignore[assignment]
    return linear


def _forward(linear: nn.Linear, hidden_states: torch.Tensor) -> torch.Tensor:
    output = F.linear(hidden_states, linear.weight)
    return output if linear.bias is None else output + linear.bias.to(output.dtype)


def _replica(linear: nn.Linear) -> nn.Linear:
    # torch's copies what is in __dict__, and with it the layer that `forward` is for.
    return row_parallel(nn.Linear._replicate_for_data_parallel(linear))
