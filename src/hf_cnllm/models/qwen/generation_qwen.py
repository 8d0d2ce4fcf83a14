"""What Qwen needs of `generate`: positions as the original counts them, and an NTK factor that belongs to the prompt."""

import torch

from ..._compat import CACHE, GenerationHooks
from ...attention.masks import create_window_masks
from ..validation import cached_length
from .dynamic_ntk import carry


class QWenGenerationMixin(GenerationHooks):
    """Stands before `GenerationMixin` among the bases of a model whose backbone is `transformer`."""

    counts_positions = (
        False  # without `position_ids` the model counts columns, as the original does, also in padded rows
    )

    def add_generation_arguments(self, input_ids, arguments):
        """How long each prompt is, from which dynamic NTK takes its factor."""
        starts = int(cached_length(arguments.get(CACHE))) == 0
        if not (self.config.use_dynamic_ntk and starts and arguments.get("prompt_lengths") is None):
            return
        prompts = arguments.get("inputs_embeds")
        batch_size, length = (input_ids if prompts is None else prompts).shape[:2]
        mask = arguments.get("attention_mask")
        if mask is None:
            arguments["prompt_lengths"] = torch.full((batch_size,), length, device=input_ids.device)
        else:
            arguments["prompt_lengths"] = (mask != 0).sum(-1)

    def prepare_cache(self, arguments, is_assisted):
        """The cache takes the prompts' NTK factors.

        If all prompts are within the trained length, it needs to be told only where the first step holds more than the
        prompt, as with the candidates of assisted decoding. `prompt_lengths` goes into every step where there is no
        cache, or may soon be another (PEFT's prefix tuning); an assistant, which gets copies of all arguments, might
        not know it.
        """
        cache = arguments.get(CACHE)
        if cache is None or (prompt_lengths := arguments.pop("prompt_lengths", None)) is None or self.training:
            return
        is_long = int(prompt_lengths.max()) > self.config.seq_length
        if is_long or is_assisted:
            rotary_emb = self.transformer.rotary_emb
            carry(cache, rotary_emb.for_lengths(prompt_lengths[:, None].to(rotary_emb.inv_freq.device)))
        if is_long and not is_assisted:
            arguments["prompt_lengths"] = prompt_lengths

    def masks_for_generate(self, config, inputs_embeds, attention_mask, cache, position_ids=None):
        return create_window_masks(
            config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
        )

    def init_continuous_batching(self, *args, workload_hints=None, **kwargs):
        """As transformers', for what it can serve right: it packs requests into one row and does not say where their
        prompts end, so dynamic NTK cannot follow prompts past the trained length, nor masks more than one window.

        Raises:
            ValueError: naming what to change.
        """
        if self.config.use_dynamic_ntk:
            longest = getattr(workload_hints, "max_prompt_length", None)
            if longest is None:
                raise ValueError(
                    "Continuous batching cannot apply dynamic NTK, and no limit for the prompts is known. Pass "
                    f"`workload_hints=WorkloadHints(max_prompt_length=...)` of at most `seq_length` "
                    f"({self.config.seq_length}), or set `model.config.use_dynamic_ntk = False` before loading."
                )
            if longest > self.config.seq_length:
                raise ValueError(
                    f"Continuous batching cannot apply dynamic NTK, which a prompt of {longest} tokens needs: it is "
                    f"longer than `seq_length` ({self.config.seq_length}). Use `generate`, shorten the prompt, or load "
                    "the model with `use_dynamic_ntk=False`."
                )
        if len({window for window in self.config.window_sizes or () if window is not None}) > 1:
            raise ValueError(
                "Continuous batching knows one window for all windowed layers, but `window_sizes` holds several."
            )
        return super().init_continuous_batching(*args, workload_hints=workload_hints, **kwargs)
