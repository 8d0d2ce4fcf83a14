"""Sequences one by one, as flash attention's kernels for sequences of several lengths take them."""

from typing import NamedTuple

import torch
from torch.nn import functional as F


def find_sequences(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """The row, the start and the end of every sequence, on the CPU; None if one is in two places, as with padding inside.

    Args:
        numbers: [batch, length], 0 for padding, equal for the tokens of one sequence.
    """
    numbers = numbers.to("cpu", torch.long)
    border = F.pad(numbers, (1, 1), value=0).diff(dim=1) != 0  # [batch, length + 1]
    row, start = (border[:, :-1] & (numbers != 0)).nonzero(as_tuple=True)
    end = (border[:, 1:] & (numbers != 0)).nonzero(as_tuple=True)[1] + 1
    if torch.unique(torch.stack([row, numbers[row, start]]), dim=1).shape[1] != row.numel():
        return None
    return row, start, end


class Stretches(NamedTuple):
    """Stretches of tokens, one after the other, as flash attention's kernels for sequences of several lengths take them.

    Attributes:
        tokens: their indices.
        borders: [stretches + 1] int32, where each begins and ends among them.
        longest: length of the longest.
    """

    tokens: torch.Tensor
    borders: torch.Tensor
    longest: int

    @classmethod
    def between(cls, first: torch.Tensor, last: torch.Tensor, device: torch.device) -> "Stretches":
        """From `first` to before `last` of each."""
        lengths = last - first
        borders = F.pad(lengths.cumsum(0), (1, 0))
        tokens = torch.arange(int(borders[-1])) + torch.repeat_interleave(first - borders[:-1], lengths)
        return cls(tokens.to(device), borders.to(device, torch.int32), max(lengths.tolist(), default=0))
