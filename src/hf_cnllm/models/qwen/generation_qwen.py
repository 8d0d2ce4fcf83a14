"""What Qwen needs of `generate`: positions as the original counts them, and an NTK factor that belongs to the prompt."""

from typing import Any

import torch
from transformers.generation.configuration_utils import GenerationMode

from .dynamic_ntk import carry


class QWenGenerationMixin:
    """Stands before `GenerationMixin` among the bases of a model whose backbone is `transformer`."""

    def _prepare_position_ids_for_generation(self, inputs_tensor: torch.Tensor, model_kwargs: dict[str, Any]) -> None:
        """None: without `position_ids` the model counts columns, as the original does, also in padded rows."""

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.Tensor | None = None,
        **model_kwargs,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Besides: how long each prompt is, while there is nothing but the prompt."""
        cache = model_kwargs.get("cache")
        starts = cache is None or int(cache.get_seq_length()) == 0
        if self.config.use_dynamic_ntk and starts and model_kwargs.get("prompt_lengths") is None:
            prompts = model_kwargs.get("inputs_embeds")
            batch_size, length = (input_ids if prompts is None else prompts).shape[:2]
            mask = model_kwargs.get("attention_mask")
            if mask is None:
                model_kwargs["prompt_lengths"] = torch.full((batch_size,), length, device=input_ids.device)
            else:
                model_kwargs["prompt_lengths"] = (mask != 0).sum(-1)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        """Besides: the cache takes the prompts' NTK factors.

        If all prompts are within the trained length, it needs to be told only where the first step holds more than the
        prompt, as with the candidates of assisted decoding. `prompt_lengths` goes into every step where there is no
        cache, or may soon be another (PEFT's prefix tuning); an assistant, which gets copies of all arguments, might
        not know it.
        """
        prepared = super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, *args, **kwargs
        )
        cache = model_kwargs.get("cache")
        if cache is None or (prompt_lengths := model_kwargs.pop("prompt_lengths", None)) is None or self.training:
            return prepared
        is_long = int(prompt_lengths.max()) > self.config.seq_length
        is_assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        if is_long or is_assisted:
            rotary_emb = self.transformer.rotary_emb
            carry(cache, rotary_emb.for_lengths(prompt_lengths[:, None].to(rotary_emb.inv_freq.device)))
        if is_long and not is_assisted:
            model_kwargs["prompt_lengths"] = prompt_lengths
        return prepared

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
