"""Filling the blanks of texts with GLM, GLM-130B or ChatGLM-6B."""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..models.chat import generated_tokens
from ..models.glm_line.blank_positions import MASK_FIELDS
from .blank_infilling import ControlTokens, Example, restore_text


def either_of(names: Sequence[str]) -> str:
    """Names as a sentence has them: `a, b or c`."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def context_with_blanks(tokenizer: Any, text: str, control: ControlTokens) -> tuple[Example, list[int]]:
    """A text as `infill` fills it, and the places of its mask tokens.

    Raises:
        ValueError: it has none.
    """
    if hasattr(tokenizer, "encode_blanks"):  # in whose texts names of control tokens are text
        tokens = tokenizer.encode_blanks(text)["input_ids"]
    else:
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    row = Example.of_context([*control.before, *tokens, *control.after])
    places = [place for place, token in enumerate(row.input_ids) if token in control.masks.values()]
    if not places:
        blanks = either_of(tokenizer.convert_ids_to_tokens([*dict.fromkeys(control.masks.values())]))
        raise ValueError(f"{text!r} has no blank: mark what is to be filled by {blanks}")
    return row, places


@torch.no_grad()
def infill(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    max_new_tokens: int = 64,
    **generate_kwargs: Any,
) -> str | list[str]:
    """Fills every blank of a text, from left to right; what fills one is seen when the next is filled.

    Args:
        model: GLM, GLM-130B or ChatGLM-6B. Models without block positions fill `[MASK]`, `[sMASK]` and `[gMASK]` in the
            order in which they look for them.
        text: with `[MASK]`, `[sMASK]` or `[gMASK]` in it, as often as wanted; or several such texts.
        max_new_tokens: for each blank.
        generate_kwargs: for `generate`, e.g. `num_beams=4`; one answer for each blank.

    Returns:
        The text or texts without blanks, as the tokenizer writes its tokens. A warning names what it has no token for.

    Raises:
        TypeError: the model fills no blanks.
        ValueError: a text has no blank, or the model's configuration does not know the tokenizer's control tokens.
    """
    if not hasattr(model, "positions_of_prompt"):
        raise TypeError(
            f"{type(model).__name__} fills no blanks: GLM, GLM-130B and ChatGLM-6B do, ChatGLM2 and ChatGLM3 are causal"
        )
    if not isinstance(text, str):
        return [infill(model, tokenizer, single, max_new_tokens, **generate_kwargs) for single in text]
    control = ControlTokens.of(tokenizer)
    row, places = context_with_blanks(tokenizer, text, control)
    _tell_what_is_lost(tokenizer, text, row.input_ids, control)
    if not model.config.block_position_encoding:
        _check_ids(model.config, control, {row.input_ids[place] for place in places})
        filled = fill_in_turn(model, row.input_ids, max_new_tokens=max_new_tokens, **generate_kwargs)
        return str(tokenizer.decode(filled, skip_special_tokens=True))
    arguments = {"max_new_tokens": max_new_tokens, "eos_token_id": control.end, "pad_token_id": control.end}
    arguments |= generate_kwargs
    for place in places:
        row.fill(place, [control.start])
        position_ids = torch.tensor([[row.positions, row.block_positions]], device=model.device)
        span = generated_tokens(model, row.input_ids, {control.end}, position_ids=position_ids, **arguments)
        row.fill(place, span, done=1)
    filled = restore_text(row.input_ids, row.positions, row.block_positions)
    filled = filled[len(control.before) : len(filled) - len(control.after)]
    return str(tokenizer.decode(filled, skip_special_tokens=True))


def _tell_what_is_lost(tokenizer: Any, text: str, ids: Sequence[int], control: ControlTokens) -> None:
    """Warns of what the vocabulary has no token for: the model does not see it, and the filled text is without it."""
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown not in ids:
        return
    for blank in tokenizer.convert_ids_to_tokens([*dict.fromkeys(control.masks.values())]):
        text = text.replace(blank, " ")

    def lacking(parts: Iterable[str]) -> list[str]:
        return [part for part in parts if unknown in tokenizer(part, add_special_tokens=False)["input_ids"]]

    # WordPiece may know the letters of a word that it lacks.
    lost = lacking(dict.fromkeys(text)) or lacking(dict.fromkeys(text.split()))
    names = ", ".join(map(repr, lost[:10]))
    warnings.warn(
        f"the vocabulary has no token for {names}: the model does not see it, and the text comes back without it",
        stacklevel=3,
    )


def _check_ids(config: PreTrainedConfig, control: ControlTokens, blanks: set[int]) -> None:
    if not _ends(config) or config.sop_token_id != control.start or not blanks <= {*_mask_ids(config)}:
        start = config.attribute_map.get("sop_token_id", "sop_token_id")
        end = "eos_token_id" if config.has_kinds_of_blanks else "eop_token_id"
        fields = ", ".join(f"`{field}`" for field in (start, end, *MASK_FIELDS))
        raise ValueError(f"the model's configuration does not know the tokenizer's control tokens: set its {fields}")


def _mask_ids(config: PreTrainedConfig) -> list[int]:
    return [index for field in config.kinds_of_blanks if (index := getattr(config, field)) is not None]


def _ends(config: PreTrainedConfig) -> list[int]:
    """What ends the text of a blank; GLM has a token of its own for it."""
    fields = ("eos_token_id", "text_end_token_id") if config.has_kinds_of_blanks else ("eop_token_id",)
    ends = [end for field in fields if (end := getattr(config, field, None)) is not None]
    return [index for end in ends for index in (end if isinstance(end, list) else [end])]


def fill_in_turn(model: PreTrainedModel, context: Sequence[int], **generate_kwargs: Any) -> list[int]:
    """A context whose blanks are filled, for models without block positions, whose text holds one blank at a time: what
    fills one takes its place, and the next is filled in that text.

    Args:
        context: token ids with mask tokens among them, without a start token.
    """
    config, filled = model.config, [*context]
    ends = _ends(config)
    arguments = {"eos_token_id": ends, "pad_token_id": ends[0]} | generate_kwargs
    mask_ids = _mask_ids(config)
    for looked_for in [{mask_id} for mask_id in mask_ids] if config.has_kinds_of_blanks else [{*mask_ids}]:
        while (place := next((at for at, token in enumerate(filled) if token in looked_for), None)) is not None:
            span = generated_tokens(model, [*filled, config.sop_token_id], ends, **arguments)
            # What is written is text: another blank or start in it would be one in the next prompt.
            filled[place : place + 1] = [token for token in span if token not in (*mask_ids, config.sop_token_id)]
    return filled
