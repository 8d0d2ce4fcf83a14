"""What models build on of transformers' insides; see the package."""

# ruff: noqa: F401  (others import these from here)

import copy
import functools
import inspect
import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import transformers
from packaging.version import Version
from torch import Tensor

from .._stack import installed_version
from . import CACHE, CACHE_NAMES, OLD_CACHE_NAME, insides

with insides():
    from transformers import ContinuousBatchingConfig, LogitsProcessor, LogitsProcessorList
    from transformers import GenerationMixin as _GenerationMixin
    from transformers import initialization as init
    from transformers.activations import ACT2FN
    from transformers.cache_utils import Cache, DynamicCache
    from transformers.generation.configuration_utils import GenerationMode
    from transformers.generation.continuous_batching.cache import PagedAttentionCache
    from transformers.integrations.flash_attention import get_target_dtype
    from transformers.integrations.flex_attention import compile_friendly_flex_attention
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.loss.loss_utils import ForCausalLMLoss, ForMaskedLMLoss
    from transformers.masking_utils import (
        and_masks,
        causal_mask_function,
        create_causal_mask,
        create_sliding_window_causal_mask,
        find_packed_sequence_indices,
        or_masks,
        padding_mask_function,
        sliding_window_overlay,
    )
    from transformers.modeling_layers import (
        GenericForQuestionAnswering,
        GenericForSequenceClassification,
        GenericForTokenClassification,
    )
    from transformers.modeling_outputs import MultipleChoiceModelOutput
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    from transformers.models.bloom.modeling_bloom import BloomAttention, dropout_add
    from transformers.models.llama.modeling_llama import (
        LlamaRMSNorm,
        LlamaRotaryEmbedding,
        apply_rotary_pos_emb,
        eager_attention_forward,
        repeat_kv,
        rotate_half,
    )
    from transformers.processing_utils import Unpack
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils import TransformersKwargs, can_return_tuple
    from transformers.utils.generic import is_flash_attention_requested, merge_with_config_defaults
    from transformers.utils.import_utils import is_tracing
    from transformers.utils.output_capturing import capture_outputs
    from transformers.utils.quantization_config import QuantizationConfigMixin

# --- the cache --------------------------------------------------------------------------------------------------------

# What PEFT's prompt learning calls it in the inputs of a step, until PEFT 0.21: no release knows the new name yet.
_PEFT_CACHE = OLD_CACHE_NAME if Version(installed_version("peft") or "0") < Version("0.22.dev0") else CACHE
_RENAMED = CACHE == OLD_CACHE_NAME


def pop_cache(arguments: dict[str, Any], cache: Any = None) -> Any:
    """The one cache among `cache` and what `arguments` hold by either name, which is taken out of them; a TypeError if there
    are two. From 5.24 on the old name warns, as it does on transformers' own models."""
    old_name_given = arguments.get(OLD_CACHE_NAME) is not None
    given = [value for value in (cache, *(arguments.pop(name, None) for name in CACHE_NAMES)) if value is not None]
    if len(given) > 1:
        raise TypeError("pass `cache` or `past_key_values`, which mean the same, not both")
    if old_name_given and not _RENAMED and not torch.compiler.is_compiling():
        warnings.warn(f"`{OLD_CACHE_NAME}` is deprecated: use `{CACHE}` instead.", FutureWarning, stacklevel=3)
    return given[0] if given else None


class _PagedCacheUntil523:
    """Until 5.23 the attention function updated a paged cache; here it is handed on to it."""

    def __init__(self, pages: PagedAttentionCache):
        self.pages = pages

    def update(self, key: Tensor, value: Tensor, layer_idx: int, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        kwargs["cache"] = self.pages
        return key, value


def update_as_others(pages: PagedAttentionCache) -> Any:
    """A paged cache that layers update like every other."""
    return _PagedCacheUntil523(pages) if _RENAMED else pages


# Continuous batching's caches (`generate_batch`), which pack the requests into one row.
PAGED_CACHES = (PagedAttentionCache, _PagedCacheUntil523)


def takes_cache(forward: Callable) -> Callable:
    """Says of a forward pass that ends in `validation.take_cache` that it knows both names: `generate` (until 5.23) and PEFT
    (until 0.21) look in the signature for the keyword they pass."""
    signature = inspect.signature(forward)
    parameters = [*signature.parameters.values()]
    parameters.insert(-1, inspect.Parameter(OLD_CACHE_NAME, inspect.Parameter.KEYWORD_ONLY, default=None))
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward


def drops_cache(module: Any) -> bool:
    """Whether gradient checkpointing keeps the cache from the layers. Without gradients, as in `generate`, nothing is checkpointed."""
    return module.gradient_checkpointing and module.training and torch.is_grad_enabled()


if _RENAMED:
    # Until 5.23 outputs and layers know the cache by its old name.
    from transformers import modeling_layers as _layers
    from transformers import modeling_outputs as _outputs

    class _CacheByItsNewName:
        def __init__(self, *args, cache: Cache | None = None, **kwargs):
            kwargs.setdefault("past_key_values", cache)
            super().__init__(*args, **kwargs)

        @property
        def cache(self) -> Cache | None:
            return self.past_key_values

    class BaseModelOutputWithPast(_CacheByItsNewName, _outputs.BaseModelOutputWithPast): ...

    class CausalLMOutputWithPast(_CacheByItsNewName, _outputs.CausalLMOutputWithPast): ...

    class SequenceClassifierOutputWithPast(_CacheByItsNewName, _outputs.SequenceClassifierOutputWithPast): ...

    class GradientCheckpointingLayer(_layers.GradientCheckpointingLayer):
        def __call__(self, *args, **kwargs):
            if drops_cache(self):
                kwargs["cache"] = None
            return super().__call__(*args, **kwargs)

else:
    from transformers.modeling_layers import GradientCheckpointingLayer  # type: ignore[assignment]
    from transformers.modeling_outputs import (  # type: ignore[assignment]
        BaseModelOutputWithPast,
        CausalLMOutputWithPast,
        SequenceClassifierOutputWithPast,
    )

# --- loading ----------------------------------------------------------------------------------------------------------


class LoadingHooks:
    """Stands in front of `PreTrainedModel`: its private hook, under a name of our own."""

    _skip_keys_device_placement = list(CACHE_NAMES)
    """The inputs that accelerate's hooks leave on their device: until 5.23 each class said so itself."""

    @classmethod
    def check_weight_files(cls, model, files: list[str], quantizer: HfQuantizer | None) -> None:
        """Sees the files that the weights of `model`, which is empty yet, are about to be read from."""

    @classmethod
    def _load_pretrained_model(cls, model, state_dict, checkpoint_files, load_config, expected_keys=None):
        if state_dict is None and checkpoint_files and expected_keys is None:  # an adapter names the keys it brings
            cls.check_weight_files(model, checkpoint_files, load_config.hf_quantizer)
        return super()._load_pretrained_model(model, state_dict, checkpoint_files, load_config, expected_keys)


class AdapterHooks:
    """Stands in front of `PreTrainedModel`: PEFT puts the configurations of its adapters on a model as soon as they are in."""

    def check_adapter(self, config: Any) -> None:
        """Sees the configuration of a PEFT adapter that was just put into the model."""

    @property
    def peft_config(self) -> dict[str, Any]:
        if "peft_config" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no adapter")
        return vars(self)["peft_config"]

    @peft_config.setter
    def peft_config(self, value: dict[str, Any]) -> None:
        for config in value.values():
            self.check_adapter(config)
        vars(self)["peft_config"] = value

    @peft_config.deleter
    def peft_config(self) -> None:
        del vars(self)["peft_config"]


# --- quantization -----------------------------------------------------------------------------------------------------


def registers_quantization(method: str) -> Callable[[type], type]:
    """Registers a configuration or quantizer; transformers' own decorators refuse it the second time, which is when the
    package is imported beside a checkpoint with a copy of it."""

    def register(cls: type) -> type:
        mapping: dict = AUTO_QUANTIZER_MAPPING if issubclass(cls, HfQuantizer) else AUTO_QUANTIZATION_CONFIG_MAPPING
        mapping[method] = cls
        return cls

    return register


# --- generation -------------------------------------------------------------------------------------------------------


class _LogitsCheck(LogitsProcessor):
    """Looks at what each step chooses from. A step is judged when the next one begins, and the last by `generate`: nothing
    waits for an accelerator."""

    def __init__(self) -> None:
        self._usable: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.judge()
        self._usable = (scores.amax(dim=-1) < math.inf).all()  # NaN is not less
        return scores

    def judge(self) -> None:
        if self._usable is not None and not self._usable:
            raise RuntimeError(
                "the model gives NaN or infinite logits, from which no token can be chosen. Either the checkpoint's weights "
                "are damaged, or they are too large for this dtype: load it with dtype=torch.float32 to find out."
            )


def _check_prompt_learning(inputs: dict[str, Any], virtual_tokens: int) -> None:
    """Cuts a step as PEFT is about to, which keeps the last token of as many as the cache holds or fewer, and leaves their
    positions alone.

    Raises:
        ValueError: more is new than what PEFT keeps, or the cache is static.
    """
    if inputs[CACHE].is_compileable:
        raise ValueError(
            "PEFT's prompt learning knows no static cache: leave out `cache_implementation`, or pass a `DynamicCache`."
        )
    cached, tokens, mask = int(inputs[CACHE].get_seq_length()), inputs.get("input_ids"), inputs.get("attention_mask")
    if cached == 0 or tokens is None or (mask is None and tokens.shape[1] == 1):
        return
    length = (tokens if mask is None else mask).shape[-1]  # `generate` drops a mask of ones
    if tokens.shape[1] <= cached:
        for name in ("input_ids", "position_ids"):
            if inputs.get(name) is not None:
                inputs[name] = inputs[name][..., -1:]
    if cached - virtual_tokens + inputs["input_ids"].shape[1] != length:
        raise ValueError(
            "PEFT's prompt learning generates one token at a time, behind a cache that it began itself: leave out "
            "`prefill_chunk_size`, assistants, prompt lookup and the cache of an earlier turn."
        )


class GenerationHooks:
    """Stands in front of `GenerationMixin`: its private hooks, under names of our own for models to override."""

    counts_positions = True
    """Whether `generate` makes the prompt's positions and counts them on by one; else the model finds its own."""

    def add_generation_arguments(self, input_ids: Tensor, arguments: dict[str, Any]) -> None:
        """Changes, in place, what goes into every step, while there is nothing but the prompts, one row each."""

    def before_prefill(self, input_ids: Tensor, arguments: dict[str, Any], generation_config) -> None:
        """As `add_generation_arguments`, but with a row for each beam or sample, and not in assisted decoding."""

    not_for_assistants: tuple[str, ...] = ()
    """Arguments of the steps that an assistant, which gets copies of all, might not know: they end where there is one."""

    def prepare_cache(self, arguments: dict[str, Any], is_assisted: bool) -> None:
        """Sees the cache, `arguments[CACHE]`, before the first step."""

    def before_generation(self, input_ids: Tensor | None, arguments: dict[str, Any]) -> None:
        """Sees what `generate` was given, as it was given."""

    def while_generating(self) -> AbstractContextManager:
        """What `generate` runs in."""
        return nullcontext()

    learned_keys = 0
    """Places that a cache needs besides those of the tokens."""

    def masks_for_generate(
        self, config, inputs_embeds: Tensor, attention_mask, cache: Cache, position_ids=None
    ) -> Any:
        """The mask of a step with a static cache, of a fixed shape, made outside of the compiled forward pass;
        `attention_mask` itself where the forward pass is to make it."""
        return attention_mask

    def check_continuous_batching(self, workload_hints: Any) -> None:
        """Refuses, with a ValueError, what continuous batching (`generate_batch`) would not serve right."""

    def is_continuous_with_flash(self) -> bool:
        """Whether flash attention computes the model right in continuous batching."""
        return True

    def init_continuous_batching(self, generation_config=None, continuous_batching_config=None, workload_hints=None):
        # transformers would turn an error of the forward pass into empty results.
        self.check_continuous_batching(workload_hints)
        if not self.is_continuous_with_flash():
            given = continuous_batching_config or getattr(generation_config, "continuous_batching_config", None)
            continuous_batching_config = self._keep_from_flash(given or ContinuousBatchingConfig())
        return super().init_continuous_batching(generation_config, continuous_batching_config, workload_hints)

    def _keep_from_flash(self, settings: ContinuousBatchingConfig) -> ContinuousBatchingConfig:
        """Continuous batching switches to flash attention by itself, where there is one."""
        backend = self.config._attn_implementation
        if is_flash_attention_requested(requested_attention_implementation=backend):
            raise ValueError(
                f"continuous batching (`generate_batch`) of {type(self).__name__} has no ALiBi with {backend!r}: "
                "load the model with attn_implementation='sdpa'"
            )
        if hasattr(settings, "auto_switch_to_flash"):
            settings = copy.copy(settings)
            settings.auto_switch_to_flash = False
        elif "|" not in backend:  # this keeps older releases from it
            self.set_attn_implementation(f"paged|{backend}")
        return settings

    @functools.wraps(_GenerationMixin.generate)
    def generate(self, inputs=None, generation_config=None, logits_processor=None, *args, **kwargs):
        if (cache := pop_cache(kwargs)) is not None:
            kwargs[CACHE] = cache
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.dtype != torch.bool and (mask > 1).any():
            raise ValueError(
                "`attention_mask` holds numbers of packed sequences, but `generate` continues one sequence in each row: "
                "give each a row of its own, padded on the left, with a mask of 0 and 1."
            )
        self.before_generation(kwargs.get("input_ids") if inputs is None else inputs, kwargs)
        check = _LogitsCheck()
        processors = LogitsProcessorList([check, *(logits_processor or ())])
        with self.while_generating():
            output = super().generate(inputs, generation_config, processors, *args, **kwargs)
        check.judge()
        return output

    def load_custom_generate(self, pretrained_model_name_or_path=None, trust_remote_code=None, **kwargs):
        """Refuses code for `generate` from a checkpoint or repository; `from_pretrained` takes the OSError for none there."""
        raise PermissionError(
            f"hf_cnllm runs no code of repositories, and so no `custom_generate` of {pretrained_model_name_or_path}, "
            "whatever `trust_remote_code` says. Read it, and pass the function itself: generate(custom_generate=function)."
        )

    @functools.wraps(_GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, input_ids, next_sequence_length=None, inputs_embeds=None, **kwargs):
        if self.learned_keys and next_sequence_length is not None and kwargs.get(CACHE) is not None:
            length = input_ids.shape[1] + (0 if inputs_embeds is None else inputs_embeds.shape[1])
            if next_sequence_length == length - int(kwargs[CACHE].get_seq_length()):
                next_sequence_length += self.learned_keys  # `generate` took the learned keys for tokens
        inputs = super().prepare_inputs_for_generation(
            input_ids, next_sequence_length=next_sequence_length, inputs_embeds=inputs_embeds, **kwargs
        )
        # PEFT's prompt learning puts a method of its own in this one's place, which calls it.
        peft_model = getattr(vars(self).get("prepare_inputs_for_generation"), "__self__", self)
        if peft_model is not self and CACHE in inputs:
            _check_prompt_learning(inputs, peft_model.active_peft_config.num_virtual_tokens)
            inputs[_PEFT_CACHE] = inputs.pop(CACHE)
        return inputs

    def _prepare_position_ids_for_generation(self, inputs_tensor, model_kwargs):
        if self.counts_positions:
            return super()._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        return None

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        self.add_generation_arguments(input_ids, model_kwargs)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def _prefill(self, input_ids, generation_config, model_kwargs, *args, **kwargs):
        self.before_prefill(input_ids, model_kwargs, generation_config)
        cache = model_kwargs.get(CACHE)
        if self.learned_keys and cache is not None and int(cache.get_seq_length()) > 0:
            # Where a prompt is cut is counted in keys, the learned ones among them: what continues a cache comes whole.
            generation_config = copy.copy(generation_config)
            generation_config.prefill_chunk_size = None
        return super()._prefill(input_ids, generation_config, model_kwargs, *args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, *args, **kwargs):
        super()._prepare_cache_for_generation(generation_config, model_kwargs, generation_mode, *args, **kwargs)
        is_assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        for name in self.not_for_assistants if is_assisted else ():
            model_kwargs.pop(name, None)
        self.prepare_cache(model_kwargs, is_assisted)

    def _prepare_static_cache(self, *args, max_cache_len: int, **kwargs) -> Cache:
        return super()._prepare_static_cache(*args, max_cache_len=max_cache_len + self.learned_keys, **kwargs)

    def create_masks_for_generate(self, config, inputs_embeds, attention_mask, position_ids=None, **kwargs):
        if config._attn_implementation == "flex_attention" or is_flash_attention_requested(config):
            return attention_mask  # until 5.23 `generate` cannot handle a BlockMask, and flash attention takes the 2-D mask
        return self.masks_for_generate(config, inputs_embeds, attention_mask, kwargs[CACHE], position_ids)


# --- the rest ---------------------------------------------------------------------------------------------------------

if hasattr(transformers.modeling_utils, "slice_logits_to_keep"):
    from transformers.modeling_utils import slice_logits_to_keep
else:  # until 5.20: the last positions and a list of positions only

    def slice_logits_to_keep(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return hidden_states[:, positions, :]


_Model = TypeVar("_Model", bound=type)


def shifts_labels(model_class: _Model) -> _Model:
    """Says of a model that its loss shifts the labels. Trainer's label smoothing, which takes the loss upon itself, shifts them
    for those classes only whose names are in this table."""
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.setdefault(model_class.__name__, model_class.__name__)
    return model_class
