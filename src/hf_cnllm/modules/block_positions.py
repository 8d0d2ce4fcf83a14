"""GLM's 2-D positions (arXiv 2103.10360, section 2.2): every token has a place in the text and a place in the blank.

A text is a context with a blank (a mask token) in it, a start token, and what goes into the blank:

    tokens     x₁  x₂  [MASK]  x₄ │ start  y₁  y₂
    position    0   1     2     3 │   2     2   2      where the token, or the blank it fills, stands in the context
    block       0   0     0     0 │   1     2   3      how far into the blank it is
                  context, prefix │ generated, causal

Everything here is worked out for whole batches from the token ids, the padding and the packing, without a loop over rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch


class Blanks(NamedTuple):
    """Where each token is, seen from its own text; all [batch, length], undefined for padding.

    Attributes:
        index: number of tokens of its text before it.
        start: index of its text's first start token; `missing` if there is none.
        blank: index of its text's blank in the context; `missing` if there is none.
        kind: which of `mask_token_ids` the blank is.
        token: True for tokens, False for padding.
        missing: larger than any index.
    """

    index: torch.Tensor
    start: torch.Tensor
    blank: torch.Tensor
    kind: torch.Tensor
    token: torch.Tensor
    missing: int

    @property
    def context(self) -> torch.Tensor:
        """True for what stands before the start token."""
        return self.token & (self.index < self.start)

    def position_ids(self) -> torch.Tensor:
        """[batch, 2, length]: positions and block positions; 0 for padding."""
        position = torch.where(self.index < self.start, self.index, self.blank)
        block = (self.index - self.start + 1).clamp(min=0)
        return torch.stack([position, block], dim=1) * self.token[:, None]


def find_blanks(
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    start_token_id: int,
    mask_token_ids: Sequence[tuple[int, ...]],
) -> Blanks:
    """Finds the start token and the blank of every text.

    Args:
        input_ids: [batch, length].
        attention_mask: [batch, length], 0 for padding and 1 for tokens, or equal numbers from 1 for the tokens of one
            packed text; None: all are tokens of one text.
        start_token_id: begins what is generated; only the first of a text counts.
        mask_token_ids: kinds of blanks, the preferred one first; of several blanks of the preferred kind that is in the
            context, the first counts.
    """
    batch, length = input_ids.shape
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
    text = attention_mask.to(input_ids.device, torch.long)
    token = text != 0
    if attention_mask.dtype == torch.bool:
        texts = 1
    else:
        texts = length if torch.compiler.is_compiling() else int(text.max())
    missing = length + 1

    def first(where: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """For every token the smallest `index` of its text `where`."""
        smallest = index.new_full((batch, texts + 1), missing)
        smallest = smallest.scatter_reduce(1, text, torch.where(where & token, index, missing), "amin")
        return smallest.gather(1, text)

    count = token.cumsum(1)
    index = count - first(token, count)
    start = first(input_ids == start_token_id, index)
    blank = torch.full_like(index, missing)
    kind = torch.full_like(index, len(mask_token_ids))
    for number, kind_ids in enumerate(mask_token_ids):
        found = first(_is_any(input_ids, kind_ids) & (index < start), index)
        better = (blank == missing) & (found != missing)
        blank, kind = torch.where(better, found, blank), torch.where(better, number, kind)
    return Blanks(index, start, blank, kind, token, missing)


def check_blanks(
    blanks: Blanks,
    input_ids: torch.Tensor,
    start: tuple[str, int],
    masks: dict[str, int],
) -> None:
    """Refuses a batch in which some text is not context with a blank, one start token, and what fills the blank.

    Args:
        start, masks: the tokens that `find_blanks` looked for, by their names in the configuration.

    Raises:
        ValueError: no start token, or several; no mask token before the start token; a mask token after it.
    """
    name, start_id = start
    mask_ids = tuple(masks.values())
    mask_names = ", ".join(f"{mask}={token}" for mask, token in masks.items())
    is_mask = _is_any(input_ids, mask_ids) & blanks.token
    again = (input_ids == start_id) & (blanks.index > blanks.start)
    explicit = " Or pass 2-row `position_ids`, which say where the context ends."
    for wrong, message in (
        (
            blanks.start == blanks.missing,
            f"has no start token ({name}={start_id}): the context must end in a mask token ({mask_names}) or contain one, "
            f"followed by the start token, as the tokenizer's special tokens do. A prompt cannot be given in parts.{explicit}",
        ),
        (again, f"has more than one start token ({name}={start_id}); a text has one, behind its context.{explicit}"),
        (
            is_mask & (blanks.index > blanks.start),
            f"has a mask token ({mask_names}) after the start token ({name}={start_id}); it belongs in front.{explicit}",
        ),
        (
            blanks.blank == blanks.missing,
            f"has no mask token ({mask_names}) before the start token ({name}={start_id}): there is no blank to fill. "
            f"Add one, e.g. with the tokenizer's special tokens.{explicit}",
        ),
    ):
        rows = (wrong & blanks.token).any(dim=1)
        if rows.any():
            raise ValueError(f"row {int(rows.nonzero()[0])} of `input_ids` {message}")


def _is_any(input_ids: torch.Tensor, token_ids: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([input_ids == token for token in token_ids]).any(dim=0)
