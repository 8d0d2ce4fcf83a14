"""GLM's 2-D positions (arXiv 2103.10360, section 2.2): every token has a place in the text and a place in the blank.

A text is a context with a blank (a mask token) in it, a start token, and what goes into the blank:

    tokens     x₁  x₂  [MASK]  x₄ │ start  y₁  y₂
    position    0   1     2     3 │   2     2   2      where the token, or the blank it fills, stands in the context
    block       0   0     0     0 │   1     2   3      how far into the blank it is
                  context, prefix │ generated, causal

Everything here is worked out for whole batches from the token ids, the padding and the packing, without a loop over rows.
What the models differ in, their configurations say: `block_position_encoding` (whether there is a row of block positions),
`sop_token_id` (the start token, in ChatGLM-6B another name of `bos_token_id`), and `has_kinds_of_blanks`: in GLM the first
mask token of any kind is the blank; the others look for them kind by kind, ChatGLM-6B for [gMASK], [MASK] and [sMASK],
GLM-130B for [MASK], [sMASK] and [gMASK] (`kinds_of_blanks`), and without block positions the answer to [gMASK], which stands
for all that follows, goes on counting.
"""

from typing import Any

import torch
from torch.nn import functional as F
from transformers import Cache, PreTrainedConfig

from ...attention.mask_values import check_mask, is_readable
from ..validation import cached_length

MASK_FIELDS = ("gmask_token_id", "mask_token_id", "smask_token_id")

# What `generate` calls `position_ids` on their way to the forward pass: PEFT's prefix tuning adds the number of its virtual
# tokens to whatever has that name, and of a context whose block positions are not 0 nothing would be left.
POSITIONS = "text_position_ids"
# What is wrong with a text, in the order in which it is looked for.
MALFORMED = (
    "has no start token ({start}): the context must end in a mask token ({masks}) or contain one, followed by the start "
    "token, as the tokenizer's special tokens do. A prompt cannot be given in parts.",
    "has more than one start token ({start}); a text has one, behind its context.",
    "has a mask token ({masks}) after the start token ({start}); it belongs in front.",
    "has no mask token ({masks}) before the start token ({start}): there is no blank to fill. Add one, e.g. with the "
    "tokenizer's special tokens.",
)
NOT_A_PROMPT = (
    "a compiled or exported step cannot see whether its cache is empty, and of a text that goes on, `input_ids` do not tell "
    "where its context ended: pass 2-row `position_ids`, as `generate` does."
)
NEED_POSITIONS = (
    "`inputs_embeds` do not tell where the context ends: pass 2-row `position_ids` with them. PEFT's prompt tuning, P-tuning "
    "and CPT cannot: use its PrefixTuningConfig, or LoRA, on a prefix language model."
)


def positions_and_context(
    config: PreTrainedConfig,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor,
    cache: Cache | None,
    kwargs: dict[str, Any],
    is_text: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What a forward pass needs to know of its texts: the positions, and which tokens are context.

    Args:
        attention_mask: in 2-D form it tells padding, and the texts of a packed row, from each other.
        position_ids: what the caller gave, as `check_positions` wants it.
        kwargs: the forward pass's other arguments; the positions that `generate` puts there come before `position_ids`.
        is_text: whether there is a context to be found. If not, missing positions count from the cache's length.

    Returns:
        Positions [batch or 1, rows, length], and context [batch, length], or None if nothing tells.

    Raises:
        ValueError: the positions cannot be worked out, or were shifted by PEFT's prefix tuning.
    """
    batch, length = inputs_embeds.shape[:2]
    rows = 2 if config.block_position_encoding else 1
    tokens = attention_mask[:, -length:] if attention_mask is not None and attention_mask.ndim == 2 else None
    if tokens is not None and tokens.shape != (batch, length):
        tokens = None  # a mask that does not fit is refused when masks are made
    from_generate = kwargs.pop(POSITIONS, None)
    position_ids = position_ids if from_generate is None else from_generate
    if position_ids is None and not is_text:
        position = torch.arange(length, device=inputs_embeds.device) + cached_length(cache)
        return torch.stack([position, torch.zeros_like(position)])[None, :rows], None
    if position_ids is None:
        if input_ids is None:
            raise ValueError(NEED_POSITIONS)
        past, checkable = cached_length(cache, getattr(config, "pre_seq_len", None)), is_readable(input_ids)
        if not checkable and not (isinstance(past, int) and past == 0):
            raise ValueError(NOT_A_PROMPT)
        check_mask(attention_mask, batch, past, length)
        # In GLM a text need not have a start token, unless it is behind a cache and may be the rest of another one.
        start_needed = config.has_kinds_of_blanks or (checkable and int(past) > 0)
        return find_positions(config, input_ids, tokens, checkable, start_needed)
    if rows == 1 and position_ids.ndim == 2:
        position_ids = position_ids[:, None]
    context = None
    if rows == 2:
        if from_generate is None and input_ids is not None and cache is not None and length > 1:
            _refuse_shifted(config, input_ids, position_ids, cache)
        if is_text:
            context = (position_ids[:, 1] == 0).expand(batch, length)
            context = context if tokens is None else context & (tokens != 0)
    elif is_text and length > 1 and not (attention_mask is not None and attention_mask.ndim == 4):
        if input_ids is None:
            raise ValueError(
                "with one row of positions only `input_ids` tell where the context ends: pass them instead of `inputs_embeds`"
            )
        context = find_positions(config, input_ids, tokens, check=False)[1]
    return position_ids, context


def texts_of_packed_row(
    config: PreTrainedConfig,
    input_ids: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: Cache | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Mask and positions, with the numbers of its texts as the mask of a row that TRL or a collator of transformers packed:
    its positions, `[batch, length]`, only say that each text begins at 0, so the model's own are left to be found."""
    is_alone = attention_mask is None and cache is None and isinstance(input_ids, torch.Tensor)
    if is_alone and isinstance(position_ids, torch.Tensor) and _count_texts(config, input_ids, position_ids):
        return (position_ids == 0).long().cumsum(dim=1), None
    return attention_mask, position_ids


def _count_texts(config: PreTrainedConfig, input_ids: torch.Tensor, position_ids: torch.Tensor) -> bool:
    """Whether positions count every text of a row from 0."""
    if position_ids.ndim != 2 or position_ids.shape != input_ids.shape:
        return False
    is_start = position_ids == 0
    counts_on = F.pad(position_ids, (1, 0), value=-1).diff() == 1
    if not torch.compiler.is_compiling() and not (is_start | counts_on).all():
        return False
    if config.block_position_encoding:
        return True
    # One row may as well be the model's own positions, where a blank at 0 has several tokens: a text has one start.
    if config.sop_token_id is None or not is_readable(position_ids):
        return False
    starts, zeros = (input_ids == config.sop_token_id).sum(dim=1), is_start.sum(dim=1)
    return int(zeros.max()) > 1 and torch.equal(starts, zeros)


def _refuse_shifted(
    config: PreTrainedConfig, input_ids: torch.Tensor, position_ids: torch.Tensor, cache: Cache
) -> None:
    if config.sop_token_id is None or not is_readable(input_ids) or int(cache.get_seq_length()) == 0:
        return
    block = position_ids[:, 1].expand_as(input_ids)[(input_ids == config.sop_token_id) & (position_ids[:, 1] > 1)]
    if block.numel():
        raise ValueError(
            f"the start token has block position {int(block[0])} in `position_ids`, but must have 1: PEFT's prefix "
            "tuning adds its virtual tokens to them. Leave `position_ids` out with it."
        )


def find_positions(
    config: PreTrainedConfig,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    check: bool,
    start_needed: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions [batch, rows, length], 0 for padding, and context [batch, length] of texts.

    Args:
        input_ids: [batch, length].
        attention_mask: [batch, length], 0 for padding and 1 for tokens, or equal numbers from 1 for the tokens of one
            packed text; None: all are tokens of one text.
        check: refuse a text that is not context with a blank, one start token, and what fills the blank.
        start_needed: whether a text without a start token is refused by `check`; if not, all of it is context.

    Raises:
        ValueError: see `check`; or the configuration does not know the start token or any mask token.
    """
    masks, start_id = _mask_tokens(config), config.sop_token_id
    batch, length = input_ids.shape
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids, dtype=torch.bool)
    text = attention_mask.to(input_ids.device, torch.long)
    token = text != 0
    texts = 1
    if not is_readable(text):
        texts = length
    elif attention_mask.dtype != torch.bool:
        smallest, texts = (int(value) for value in text.aminmax())
        if smallest < 0 or texts > 1 or attention_mask.is_floating_point():
            check_mask(attention_mask, batch, 0, length)
    missing = length + 1  # larger than any index

    def first(where: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        """For every token the smallest `index` of its text `where`."""
        smallest = index.new_full((batch, texts + 1), missing)
        smallest = smallest.scatter_reduce(1, text, torch.where(where & token, index, missing), "amin")
        return smallest.gather(1, text)

    # Of every token, seen from its own text: its index, that of the (first) start token, and that of the blank.
    count = token.cumsum(1)
    index = count - first(token, count)
    start = first(input_ids == start_id, index)
    is_mask = torch.stack([input_ids == mask_id for mask_id in masks.values()]).any(dim=0)
    blank, is_gmask = first(is_mask & (index < start), index), torch.zeros_like(token)
    if config.has_kinds_of_blanks:
        for name in reversed(masks):  # the first kind has the last word
            found = first((input_ids == masks[name]) & (index < start), index)
            is_found = found != missing
            blank = torch.where(is_found, found, blank)
            is_gmask = torch.where(is_found, name == "gmask_token_id", is_gmask)
    started = start != missing

    if check:
        checked = token if start_needed else token & started
        again, behind = (input_ids == start_id) & (index > start), is_mask & (index > start)
        _refuse(config, [wrong & checked for wrong in (~started, again, behind, blank == missing)])

    position = torch.where(index < start, index, blank)
    if not config.block_position_encoding:
        position_ids = torch.where(is_gmask, index, position)[:, None]
    else:
        if getattr(config, "early_positions", False):
            # The first revision left the start token of [gMASK] at its own index; what follows is as ever.
            position = torch.where(is_gmask & (index == start), index, position)
        position_ids = torch.stack([position, (index - start + 1).clamp(min=0)], dim=1)
    context = token & (index < start)
    return position_ids * token[:, None], context & started if start_needed else context


def _mask_tokens(config: PreTrainedConfig) -> dict[str, int]:
    """Names and ids of the mask tokens, in the order in which they are looked for.

    Raises:
        ValueError: the configuration knows none, or not the start token.
    """
    masks = {name: getattr(config, name) for name in config.kinds_of_blanks if getattr(config, name) is not None}
    if not masks or config.sop_token_id is None:
        raise ValueError(
            f"to find context and blanks in `input_ids` the configuration needs `{_start_field(config)}` and at least one of "
            f"{', '.join(f'`{name}`' for name in MASK_FIELDS)}: let `hf_cnllm.infill` or the tokenizer's "
            "`build_inputs_for_generation` make the inputs, or set the ids"
            + (", or pass 2-row `position_ids`" if config.block_position_encoding else "")
        )
    return masks


def _start_field(config: PreTrainedConfig) -> str:
    return config.attribute_map.get("sop_token_id", "sop_token_id")


def _refuse(config: PreTrainedConfig, faults: list[torch.Tensor]) -> None:
    """Refuses texts of which any token [batch, length] has one of the `faults`, those of `MALFORMED`."""
    for message, wrong in zip(MALFORMED, faults, strict=True):
        if (rows := wrong.any(dim=1)).any():
            start = f"{_start_field(config)}={config.sop_token_id}"
            masks = ", ".join(f"{name}={mask_id}" for name, mask_id in _mask_tokens(config).items())
            message = message.format(start=start, masks=masks)
            if config.block_position_encoding:
                message += " Or pass 2-row `position_ids`, which say where the context ends."
            raise ValueError(f"row {int(rows.nonzero()[0])} of `input_ids` {message}")
