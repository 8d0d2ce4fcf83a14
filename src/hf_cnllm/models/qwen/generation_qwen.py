"""What Qwen needs of `generate`: positions as the original counts them, and an NTK factor that belongs to the prompt; and
stop words."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from ..._compat import CACHE
from ..._compat.modeling import GenerationHooks
from ...attention.masks import create_window_masks
from .dynamic_ntk import carry_inv_freq


class QWenGenerationMixin(GenerationHooks):
    """Stands before `GenerationMixin` among the bases of a model whose backbone is `transformer`."""

    # Without `position_ids` the model counts columns, as the original does, also in padded rows.
    counts_positions = False

    def add_generation_arguments(self, input_ids, arguments):
        """How long each prompt is, from which dynamic NTK takes its factor."""
        cache = arguments.get(CACHE)
        starts = cache is None or int(cache.get_seq_length()) == 0
        if self.config.use_dynamic_ntk and starts and arguments.get("prompt_lengths") is None:
            mask, prompts = arguments.get("attention_mask"), arguments.get("inputs_embeds")
            if mask is None:
                mask = input_ids.new_ones((input_ids if prompts is None else prompts).shape[:2])
            arguments["prompt_lengths"] = (mask != 0).sum(-1)

    def prepare_cache(self, arguments, is_assisted):
        """The cache takes the prompts' NTK factors.

        If all prompts are within the trained length, it needs to be told only where the first step holds more than the
        prompt, as with the candidates of assisted decoding, or where the caller gives the lengths for a cache that holds
        tokens already. `prompt_lengths` goes into every step where there is no cache, or may soon be another (PEFT's
        prefix tuning); an assistant, which gets copies of all arguments, might not know it.
        """
        cache = arguments.get(CACHE)
        if cache is None or (prompt_lengths := arguments.pop("prompt_lengths", None)) is None:
            return
        if self.training or not self.config.use_dynamic_ntk:
            return
        rotary_emb = self.transformer.rotary_emb
        lengths = torch.as_tensor(prompt_lengths, device=rotary_emb.inv_freq.device).reshape(-1, 1)
        is_long = int(lengths.max()) > rotary_emb.seq_length
        if is_long or is_assisted or int(cache.get_seq_length()):
            carry_inv_freq(cache, rotary_emb.inv_freq_for(lengths))
        if is_long and not is_assisted:
            arguments["prompt_lengths"] = prompt_lengths

    def masks_for_generate(self, config, inputs_embeds, attention_mask, cache, position_ids=None):
        return create_window_masks(config, inputs_embeds, attention_mask, cache, position_ids)

    def check_continuous_batching(self, workload_hints):
        """It packs requests into one row and does not say where their prompts end, so dynamic NTK cannot follow prompts past
        the trained length, nor masks more than one window."""
        if self.config.use_dynamic_ntk:
            longest = getattr(workload_hints, "max_prompt_length", None)
            seq_length = self.transformer.rotary_emb.seq_length
            if longest is None:
                raise ValueError(
                    "Continuous batching cannot apply dynamic NTK, and no limit for the prompts is known. Pass "
                    f"`workload_hints=WorkloadHints(max_prompt_length=...)` of at most `seq_length` "
                    f"({seq_length}), or load the model with `use_dynamic_ntk=False`."
                )
            if longest > seq_length:
                raise ValueError(
                    f"Continuous batching cannot apply dynamic NTK, which a prompt of {longest} tokens needs: it is "
                    f"longer than `seq_length` ({seq_length}). Use `generate`, shorten the prompt, or load "
                    "the model with `use_dynamic_ntk=False`."
                )
        if len({window for window in self.config.window_sizes or () if window is not None}) > 1:
            raise ValueError(
                "Continuous batching knows one window for all windowed layers, but `window_sizes` holds several."
            )

    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor=None,
        stopping_criteria: StoppingCriteriaList | None = None,
        *args,
        stop_words_ids: Sequence[Sequence[int]] | None = None,
        **kwargs,
    ):
        """As [`~GenerationMixin.generate`], and a row also ends after any of `stop_words_ids` (lists of ids).

        They stay at the end of the output. By default those of the generation configuration count.
        """
        if stop_words_ids is None:
            stop_words_ids = setting(self, "stop_words_ids", generation_config)
        words = checked_stop_words(stop_words_ids)
        ends = end_token_ids(self, generation_config, kwargs)
        if more_ends := [word[0] for word in words if len(word) == 1 and word[0] not in ends]:
            if generation_config is None:
                kwargs["eos_token_id"] = ends + more_ends
            else:  # transformers wants either a configuration or arguments
                generation_config = copy.deepcopy(generation_config)
                generation_config.eos_token_id = ends + more_ends
                kwargs.pop("eos_token_id", None)
        if longer := [word for word in words if len(word) > 1]:
            prompt = kwargs.get("input_ids") if inputs is None else inputs
            criterion = StopWordsCriteria(longer, 0 if prompt is None else prompt.shape[1])
            stopping_criteria = StoppingCriteriaList([*(stopping_criteria or []), criterion])
        arguments: tuple[Any, ...] = (inputs, generation_config, logits_processor, stopping_criteria, *args)
        return super().generate(*arguments, **kwargs)


class StopWordsCriteria(StoppingCriteria):
    """Ends a row when its tokens after the prompt end in one of `stop_words_ids`."""

    def __init__(self, stop_words_ids: Sequence[Sequence[int]], prompt_length: int):
        self.stop_words_ids = stop_words_ids
        self.prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        generated = input_ids[:, self.prompt_length :]
        done = torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        for word in self.stop_words_ids:
            if len(word) <= generated.shape[1]:
                done |= (generated[:, -len(word) :] == generated.new_tensor(word)).all(dim=-1)
        return done


def checked_stop_words(stop_words_ids: Any) -> list[list[int]]:
    """`stop_words_ids`, or nothing for None. Raises ValueError if they are no lists of ids, or empty ones."""
    words = [list(word) if isinstance(word, (list, tuple)) else [] for word in stop_words_ids or []]
    if not all(word and all(isinstance(token, int) for token in word) for word in words):
        raise ValueError(f"stop_words_ids must be a list of non-empty lists of token ids, but is {stop_words_ids!r}.")
    return words


def setting(model: Any, name: str, config: GenerationConfig | None, arguments: Mapping[str, Any] | None = None) -> Any:
    """What `generate(generation_config=config, **arguments)` goes by: what a configuration leaves out, the model's own says."""
    if arguments and name in arguments:
        return arguments[name]
    value = getattr(config, name, None)
    return getattr(model.generation_config, name, None) if value is None else value


def end_token_ids(model: Any, config: GenerationConfig | None, arguments: Mapping[str, Any]) -> list[int]:
    """The ids that end a row of `model.generate(generation_config=config, **arguments)`."""
    ids = setting(model, "eos_token_id", config, arguments)
    return [] if ids is None else torch.as_tensor(ids).flatten().tolist()
