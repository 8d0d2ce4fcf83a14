"""GLM's 2-D positions (arXiv 2103.10360, section 2.2): every token has a place in the text and a place in the blank.

A text is a context with a blank (a mask token) in it, a start token, and what goes into the blank:

    tokens     x₁  x₂  [MASK]  x₄ │ start  y₁  y₂
    position    0   1     2     3 │   2     2   2      where the token, or the blank it fills, stands in the context
    block       0   0     0     0 │   1     2   3      how far into the blank it is
                  context, prefix │ generated, causal

Everything here is worked out for whole batches from the token ids, the padding and the packing, without a loop over rows.
"""

from typing import NamedTuple

import torch
from transformers import PreTrainedConfig

MASK_FIELDS = ("gmask_token_id", "mask_token_id", "smask_token_id")


class BlankTokens(NamedTuple):
    """The control tokens by their names in the configuration: the start token, and the kinds of mask tokens that it
    knows, [gMASK] first."""

    start: str
    start_id: int
    masks: dict[str, int]

    @classmethod
    def of(cls, config: PreTrainedConfig, start: str) -> "BlankTokens":
        """
        Raises:
            ValueError: the configuration does not know the start token, named `start` there, or any mask token.
        """
        masks = {name: getattr(config, name) for name in MASK_FIELDS if getattr(config, name) is not None}
        if not masks or getattr(config, start) is None:
            raise ValueError(
                f"to find context and blanks in `input_ids` the configuration needs `{start}` and at least one of "
                f"{', '.join(f'`{name}`' for name in MASK_FIELDS)}: set them (the tokenizer knows the ids), or pass "
                "2-row `position_ids`"
            )
        return cls(start, getattr(config, start), masks)


class Blanks(NamedTuple):
    """Where each token is, seen from its own text; all [batch, length], undefined for padding.

    Attributes:
        index: number of tokens of its text before it.
        start: index of its text's first start token; `missing` if there is none.
        blank: index of its text's blank in the context; `missing` if there is none.
        kind: number of the blank's kind among the mask tokens, if they are ranked.
        token: True for tokens, False for padding.
        missing: larger than any index.
    """

    index: torch.Tensor  # type: ignore[assignment]  # hides `tuple.index`, which nobody needs here
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
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, tokens: BlankTokens, ranked: bool
) -> Blanks:
    """Finds the start token and the blank of every text.

    Args:
        input_ids: [batch, length].
        attention_mask: [batch, length], 0 for padding and 1 for tokens, or equal numbers from 1 for the tokens of one
            packed text; None: all are tokens of one text.
        tokens: the control tokens. Of several start tokens in a text the first counts.
        ranked: of several blanks in a context, the first of the first kind counts; else the first of any kind.
    """
    mask_ids = list(tokens.masks.values())
    kinds = [[mask_id] for mask_id in mask_ids] if ranked else [mask_ids]
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
    start = first(input_ids == tokens.start_id, index)
    blank = torch.full_like(index, missing)
    kind = torch.full_like(index, len(kinds))
    for number, mask_ids in enumerate(kinds):
        found = first(_is_any(input_ids, mask_ids) & (index < start), index)
        better = (blank == missing) & (found != missing)
        blank, kind = torch.where(better, found, blank), torch.where(better, number, kind)
    return Blanks(index, start, blank, kind, token, missing)


def check_blanks(blanks: Blanks, input_ids: torch.Tensor, tokens: BlankTokens) -> None:
    """Refuses a batch in which some text is not context with a blank, one start token, and what fills the blank.

    Args:
        blanks: what `find_blanks` found in `input_ids`.

    Raises:
        ValueError: no start token, or several; no mask token before the start token; a mask token after it.
    """
    name, start_id = tokens.start, tokens.start_id
    mask_ids = list(tokens.masks.values())
    mask_names = ", ".join(f"{mask}={mask_id}" for mask, mask_id in tokens.masks.items())
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


def _is_any(input_ids: torch.Tensor, token_ids: list[int]) -> torch.Tensor:
    return torch.stack([input_ids == token for token in token_ids]).any(dim=0)
