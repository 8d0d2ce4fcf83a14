"""`generate` for prefix language models with GLM's 2-D positions.

transformers' loop counts positions up by one, row by row, which is not what a blank's tokens have. Here it carries none:
those of the prompts are worked out once, and each step continues them. The blank and the start token are those of the
prompt, whatever is generated later. An assistant gets all that the loop carries and might not know it, so in assisted
decoding each step works the positions out anew. Positions that the caller gives are always carried and continued.
"""

from typing import Any

import torch
from torch.nn import functional as F

from ..._compat import CACHE
from ..._compat.modeling import GenerationHooks
from ...attention.prefix_lm import create_prefix_lm_mask
from .blank_positions import NEED_POSITIONS, POSITIONS, find_positions


class PrefixLMGenerationMixin(GenerationHooks):
    """Stands in front of `GenerationMixin`; the backbone takes its positions from `positions_and_context`."""

    counts_positions = False
    not_for_assistants = ("found_position_ids",)

    def check_continuous_batching(self, workload_hints):
        raise ValueError(
            "continuous batching (`generate_batch`) is causal and has no place for the prefix of a prefix language model: use "
            "`generate` with a padded batch"
        )

    def positions_of_prompt(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, check: bool = False, more: int = 0
    ) -> torch.Tensor:
        """[batch, 1 or 2, length + more] position ids of a prompt, from its first token on.

        Args:
            attention_mask: [batch, length]; virtual tokens in front (PEFT's prefix tuning) have no positions.
            check: refuse a malformed prompt; off for what is generated after it, which may be anything.
            more: how many tokens follow, whatever they are.
        """
        if attention_mask is not None:
            attention_mask = F.pad(attention_mask[:, -input_ids.shape[1] :], (0, more), value=1)
        return find_positions(self.config, F.pad(input_ids, (0, more)), attention_mask, check)[0]

    def before_generation(self, input_ids, arguments):
        """Refuses new tokens alone behind a cache, whose positions follow from the text in front of them."""
        cache, mask = arguments.get(CACHE), arguments.get("attention_mask")
        if input_ids is None or cache is None or arguments.get("position_ids") is not None:
            return
        past, length = int(cache.get_seq_length()) - self.learned_keys, input_ids.shape[1]
        if past > 0 and (length <= past or (mask is not None and mask.shape[-1] > length)):
            raise ValueError(
                f"`input_ids` are {length} new tokens behind the {past} in `cache`, from which alone a prefix language model "
                "cannot tell their positions: pass all ids of the text, those in the cache too, or `position_ids`."
            )

    def add_generation_arguments(self, input_ids, arguments):
        position_ids, embeds = arguments.pop("position_ids", None), arguments.get("inputs_embeds")
        if position_ids is not None:
            # Out of the way of the loop, which would take the rows for a batch and count them up.
            if embeds is not None and input_ids.shape[1] > 0:
                raise ValueError("pass `input_ids` or `inputs_embeds` together with `position_ids`, not both")
            position_ids = position_ids.expand(input_ids.shape[0], *position_ids.shape[1:])
            length = input_ids.shape[1] if embeds is None else embeds.shape[1]
            if position_ids.shape[-1] < length:
                raise ValueError(
                    f"`position_ids` has shape {tuple(position_ids.shape)}, but the prompt has {length} tokens: give each "
                    "its positions."
                )
            if position_ids.ndim == 3 and position_ids.shape[1] == 2:
                step = torch.tensor([[0], [1]], device=position_ids.device)
            else:  # positions of one row go on as they ended: still, or counting
                step = (F.pad(position_ids, (1, 0), value=-1)[..., -2:].diff() == 1).long()
            arguments["prompt_position_ids"] = torch.cat([position_ids, position_ids[..., -1:] + step], dim=-1)
        elif embeds is not None:
            raise ValueError(NEED_POSITIONS)
        else:
            is_start = arguments.get(CACHE) is None or int(arguments[CACHE].get_seq_length()) == 0
            # The two after the prompt tell how the positions go on.
            found = self.positions_of_prompt(input_ids, arguments.get("attention_mask"), check=is_start, more=2)
            arguments["found_position_ids"] = found

    def before_prefill(self, input_ids, arguments, generation_config):
        if (generation_config.prefill_chunk_size or input_ids.shape[1]) < input_ids.shape[1]:
            raise ValueError(
                "`prefill_chunk_size` is not possible here: the context of a prefix language model sees all of itself, so "
                "it must be computed at once."
            )
        if generation_config.guidance_scale not in (None, 1) and generation_config.use_cache:
            raise ValueError(
                "`guidance_scale` continues its other prompt without positions, which is not possible here behind a cache: pass "
                "`use_cache=False`, and `negative_prompt_ids` that have a blank and a start token, as the prompt has."
            )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        attention_mask: torch.Tensor | None = None,
        generation_attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        prompt_position_ids: torch.Tensor | None = None,
        found_position_ids: torch.Tensor | None = None,
        **kwargs,
    ) -> dict[str, Any]:
        """Takes GLM's tokenizer's `build_inputs_for_generation` too: positions and a 0/1 mask,
        `generation_attention_mask` (batch, 1, n, n), of the prompt and what is to be generated."""
        length = input_ids.shape[1] + (inputs_embeds.shape[1] if inputs_embeds is not None else 0)
        prompt_position_ids = found_position_ids if prompt_position_ids is None else prompt_position_ids
        if prompt_position_ids is None:
            position_ids = self.positions_of_prompt(input_ids, attention_mask)
        else:
            position_ids = continue_positions(prompt_position_ids, length)
        if generation_attention_mask is not None:
            missing = length - generation_attention_mask.shape[-1]
            if missing > 0:
                raise ValueError(
                    f"`generation_attention_mask` ends {missing} tokens before the text does: build the inputs for at least "
                    "as many tokens (`max_gen_length`) as are generated"
                )
            first = 0 if next_sequence_length is None else length - next_sequence_length
            attention_mask = generation_attention_mask[:, :, first:length, :length] != 0
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,  # type: ignore[arg-type]  # mypy takes the wrapper for a function without self
            next_sequence_length=next_sequence_length,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            **kwargs,
        )
        model_inputs[POSITIONS] = model_inputs.pop("position_ids")
        return model_inputs

    def masks_for_generate(self, config, inputs_embeds, attention_mask, cache, position_ids=None):
        """For static caches: after the prompt the mask is causal and made outside the compiled step; the prompt's own is
        made in the forward pass, which is not compiled then."""
        if inputs_embeds.shape[1] > 1:
            return attention_mask
        mask = create_prefix_lm_mask(config, inputs_embeds, attention_mask, cache, None, self.learned_keys)
        # As bool: an additive mask of zeros could be taken for a 0/1 one.
        return mask == 0 if isinstance(mask, torch.Tensor) and mask.is_floating_point() else mask


def continue_positions(position_ids: torch.Tensor, length: int) -> torch.Tensor:
    """Positions [batch, rows, prompt length + some] of `length` tokens, which go on as the last two do."""
    more = length - position_ids.shape[-1]
    if more <= 0:
        return position_ids[..., :length]
    step = position_ids[..., -1:] - position_ids[..., -2:-1]
    steps = torch.arange(1, more + 1, device=position_ids.device)
    return torch.cat([position_ids, position_ids[..., -1:] + step * steps], dim=-1)
