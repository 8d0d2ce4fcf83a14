"""`generate` for prefix language models with GLM's 2-D positions.

transformers' loop counts positions up by one, row by row, which is not what a blank's tokens have. Here the loop carries
no positions: each step works them out anew from all token ids so far, which travel with the generation through beams,
assistants and caches of any kind. The blank and the start token are those of the prompt, whatever is generated later.
Positions that the caller gives for the prompt are carried along and continued.
"""

from typing import Any

import torch
from torch.nn import functional as F
from transformers import Cache

from ..._compat import CACHE, PAGED_CACHES, GenerationHooks
from ...attention.prefix_lm import create_prefix_lm_mask
from ..validation import cached_length

# What `generate` calls `position_ids` on their way to the forward pass: PEFT's prefix tuning adds the number of its virtual
# tokens to whatever has that name, and of a context whose block positions are not 0 nothing would be left.
POSITIONS = "text_position_ids"


def take_positions(
    kwargs: dict[str, Any],
    position_ids: torch.Tensor | None,
    input_ids: torch.Tensor | None,
    start_id: int | None,
    cache: Cache | None,
) -> torch.Tensor | None:
    """The positions of a forward pass, from `generate` (which are taken out of `kwargs`) or else the caller's own.

    Raises:
        ValueError: the caller's own were shifted by PEFT's prefix tuning; or continuous batching asks, which knows neither
            2-D positions nor a prefix.
    """
    if isinstance(cache, PAGED_CACHES):
        raise ValueError(
            "continuous batching (`generate_batch`) is causal and has no place for the prefix of a prefix language model; "
            "use `generate`"
        )
    if (generated := kwargs.pop(POSITIONS, None)) is not None:
        return generated
    if position_ids is None or position_ids.ndim != 3 or position_ids.shape[1] != 2 or input_ids is None:
        return position_ids
    if start_id is None or cache is None or input_ids.shape[1] == 1 or torch.compiler.is_compiling():
        return position_ids
    shifted = (input_ids == start_id) & (position_ids[:, -1] > 1)
    if int(cache.get_seq_length()) > 0 and shifted.any():
        raise ValueError(
            "the start token has block position "
            f"{int(position_ids[:, -1].expand_as(shifted)[shifted][0])} in `position_ids`, but must have 1: PEFT's prefix "
            "tuning adds its virtual tokens to them. Leave `position_ids` out with it."
        )
    return position_ids


class PrefixLMGenerationMixin(GenerationHooks):
    """Stands in front of `GenerationMixin`; the model defines `positions_of_prompt`, and its backbone calls
    [`take_positions`]."""

    def positions_of_prompt(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, check: bool
    ) -> torch.Tensor:
        """[batch, 2, length] (or [batch, length]) position ids of a prompt and what has been generated after it.

        Args:
            input_ids, attention_mask: [batch, length], from the first token on.
            check: refuse a malformed prompt; off for what is generated after it, which may be anything.
        """
        raise NotImplementedError

    def prompt_position_ids(self, inputs, arguments):
        if inputs.is_floating_point():
            raise ValueError(
                "`inputs_embeds` do not tell where the context ends: pass 2-row `position_ids` with them."
            )
        if int(cached_length(arguments.get(CACHE))) == 0:
            self.positions_of_prompt(inputs, arguments.get("attention_mask"), check=True)
        return None

    def add_generation_arguments(self, input_ids, arguments):
        # Out of the way of the loop, which would take the rows for a batch and count them up.
        if (position_ids := arguments.pop("position_ids", None)) is not None:
            if arguments.get("inputs_embeds") is not None and input_ids.shape[1] > 0:
                raise ValueError("pass `input_ids` or `inputs_embeds` together with `position_ids`, not both")
            arguments["prompt_position_ids"] = position_ids.expand(input_ids.shape[0], *position_ids.shape[1:])

    def check_prefill(self, input_ids, generation_config):
        if (generation_config.prefill_chunk_size or input_ids.shape[1]) < input_ids.shape[1]:
            raise ValueError(
                "`prefill_chunk_size` is not possible here: the context of a prefix language model sees all of itself, so "
                "it must be computed at once."
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        prompt_position_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        length = input_ids.shape[1] + (inputs_embeds.shape[1] if inputs_embeds is not None else 0)
        if prompt_position_ids is not None:
            position_ids = continue_positions(prompt_position_ids, length)
        else:
            # The mask may cover virtual tokens in front (PEFT's prefix tuning), which have no positions.
            tokens = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
            position_ids = self.positions_of_prompt(input_ids, tokens, check=False)
        kwargs["position_ids"] = position_ids
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,  # type: ignore[arg-type]  # mypy takes the wrapper for a function without self
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        model_inputs[POSITIONS] = model_inputs.pop("position_ids")
        return model_inputs

    def masks_for_generate(self, config, inputs_embeds, attention_mask, cache, position_ids=None):
        """For static caches: after the prompt the mask is causal and made outside the compiled step; the prompt's own is
        made in the forward pass, which is not compiled then. So is every one of flex attention, whose BlockMask
        `generate` cannot handle, and of flash attention, which takes the 2-D mask."""
        if inputs_embeds.shape[1] > 1 or config._attn_implementation not in ("eager", "sdpa"):
            return attention_mask
        learned_keys = getattr(config, "pre_seq_len", None) or 0
        mask = create_prefix_lm_mask(config, inputs_embeds, attention_mask, cache, None, learned_keys)
        # As bool: an additive mask of zeros could be taken for a 0/1 one.
        return mask == 0 if isinstance(mask, torch.Tensor) and mask.is_floating_point() else mask


def continue_positions(position_ids: torch.Tensor, length: int) -> torch.Tensor:
    """Positions of a prompt, [batch, 2, prompt length] or [batch, prompt length], for `length` tokens.

    The tokens after it stay at the last position and go on in the block. Positions of one row go on as they ended:
    still, or counting.
    """
    more = length - position_ids.shape[-1]
    if more <= 0:
        return position_ids[..., :length]
    last = position_ids[..., -1:]
    if position_ids.ndim == 3:
        step = torch.tensor([[0], [1]], device=position_ids.device)
    else:
        before = F.pad(position_ids, (1, 0), value=-1)[..., -2:-1]
        step = (last - before == 1).long()
    steps = torch.arange(1, more + 1, device=position_ids.device)
    return torch.cat([position_ids, last + step * steps], dim=-1)
