"""The ChatGLM classes by the names everybody knows: each gives the architecture that the configuration says.

The original repositories of ChatGLM-6B and of ChatGLM2/3 define the same names for two different models, and so do
`modeling_chatglm.py` and `modeling_chatglm2.py`. The auto classes find theirs by the configuration's class. The classes
here are what they have in common, and doors to them: `isinstance` knows every ChatGLM by one class, and
`ChatGLMModel(config)` and `ChatGLMModel.from_pretrained(...)` return the `ChatGLMModel` of the module that the
configuration belongs to. Only `__new__` can do both for one name.

An architecture's module defines a `ChatGLMPreTrainedModel` with the architecture's `config_class` and flags, and the other
classes under the names here, each with that one and its door among its bases.
"""

from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import Cache, GenerationMixin, PreTrainedModel

from ..._compat.modeling import (
    BaseModelOutputWithPast,
    GenerationHooks,
    SequenceClassifierOutputWithPast,
    TransformersKwargs,
    Unpack,
    can_return_tuple,
    takes_cache,
)
from ...loss.head import MeanLoss
from ..loading import CheckpointLoadingMixin
from ..old_names import FromConfig, instead_use
from .chat import ChatGLMChatMixin
from .configuration_chatglm import ChatGLM1Config, ChatGLM2Config, ChatGLMConfig
from .prefix_encoder import PrefixEncoder
from .quantization import QUANT_METHOD, quantize
from .quantized_linear import QuantizedRows


def _modules() -> dict[type[ChatGLMConfig], ModuleType]:
    from . import modeling_chatglm, modeling_chatglm2  # which import this one

    return {ChatGLM1Config: modeling_chatglm, ChatGLM2Config: modeling_chatglm2}


class ChatGLMPreTrainedModel(CheckpointLoadingMixin, PreTrainedModel):
    """What every ChatGLM class shares; its subclasses in this module are the doors to the architectures."""

    config_class = ChatGLMConfig
    base_model_prefix = "transformer"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    get_masks = instead_use("masks are made inside; pass the tokenizer's `attention_mask`.")
    get_position_ids = instead_use("pass the tokenizer's `position_ids`, or none: the model finds its own.")
    get_masks_and_position_ids = get_position_ids

    def __init__(
        self, config: ChatGLMConfig, empty_init: bool | None = None, device: torch.device | str | None = None
    ):
        """`empty_init` is the originals': parameters are made as transformers makes them. `device`: only None."""
        if device is not None:
            raise ValueError(f"to make a model on {device}, write `with torch.device({str(device)!r}):` around it.")
        super().__init__(config)

    @classmethod
    def for_config(cls, config_class: type[ChatGLMConfig]) -> type["ChatGLMPreTrainedModel"]:
        """The class of this name among those of the configuration's architecture.

        Raises:
            TypeError: a subclass of a door belongs to no architecture.
            ValueError: an architecture's own class meets a configuration of the other one.
        """
        if cls.__module__ == __name__:
            for base, module in _modules().items():
                if issubclass(config_class, base):
                    return getattr(module, cls.__name__)
        if cls.config_class is ChatGLMConfig:
            raise TypeError(
                f"{cls.__name__} must derive from the classes of one architecture, those of "
                f"{' or '.join(module.__name__ for module in _modules().values())}, and have its configuration, not a "
                f"{config_class.__name__}"
            )
        if not issubclass(config_class, cls.config_class):
            raise ValueError(
                f"{cls.__module__}.{cls.__name__} is of another architecture, but this configuration's `architecture` is "
                f"{config_class().architecture!r}; hf_cnllm.{cls.__name__} takes both."
            )
        return cls

    def __new__(cls, config: ChatGLMConfig | None = None, *args, **kwargs):
        # Without a configuration it is copying or unpickling: the class is already the right one.
        return super().__new__(cls if config is None else cls.for_config(type(config)))

    def post_init(self):
        super().post_init()
        self._freeze_for_prefix_tuning()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, empty_init=None, device=None, **kwargs):
        """As in transformers; quantized weights without `quantization_bit` in the configuration are a ValueError. `device` is
        the originals' name for `device_map`, and `empty_init` has no effect."""
        if device is not None:
            kwargs.setdefault("device_map", device)
        model, loading_info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        if any(key.endswith(".weight_scale") for key in loading_info["unexpected_keys"]):
            raise ValueError(
                "the checkpoint holds quantized weights (`weight_scale`), but its configuration does not say so: set "
                "`quantization_bit` to 8 or 4"
            )
        model._freeze_for_prefix_tuning()  # loading replaces the parameters
        head_is_tied = any(name.endswith("weight") for name in model.all_tied_weights_keys)
        if model.config.tie_word_embeddings and model.get_output_embeddings() is not None and not head_is_tied:
            model.config.tie_word_embeddings = False  # the file holds two matrices, which transformers keeps apart
        return (model, loading_info) if output_loading_info else model

    def quantize(self, bits: int, quantize_embeddings: bool = False, **kwargs):
        """Weight-only quantization in place, as in the originals: `model = model.quantize(4)`.

        Args:
            bits: 8 or 4; 0 does nothing.
            quantize_embeddings: also the word embeddings, which then serve as the output projection (ChatGLM-6B only).
            kwargs: accepted for the originals' sake (`empty_init`, `device`, `use_quantization_cache`), unused.
        """
        return quantize(self, bits, quantize_embeddings) if bits else self

    def save_pretrained(self, save_directory, is_main_process: bool = True, state_dict=None, *args, **kwargs):
        """As in transformers, where quantized models save all of their weights, whatever `state_dict` says."""
        quantizer: Any = self.hf_quantizer if self._is_weight_only_quantized else None
        with quantizer.saving(state_dict) if quantizer else nullcontext():
            super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)

    @property
    def quantized(self) -> bool:
        """Whether the weights are ChatGLM's own INT8 or INT4."""
        return self._is_weight_only_quantized

    # transformers refuses these on every quantized model; here the integers stay and everything else may follow, as in
    # the originals' scripts (`from_pretrained(...).half().cuda()`, `.float()`).

    def half(self, *args):
        return self.to(torch.float16) if self._is_weight_only_quantized else super().half(*args)

    def float(self, *args):
        return self.to(torch.float32) if self._is_weight_only_quantized else super().float(*args)

    @property
    def _is_weight_only_quantized(self) -> bool:
        return getattr(self, "quantization_method", None) == QUANT_METHOD

    @property
    def _prefix_encoder(self) -> PrefixEncoder | None:
        return getattr(self.base_model, "prefix_encoder", None)

    def _freeze_for_prefix_tuning(self):
        """With `pre_seq_len`, as in the originals, the prefix encoder is all of the backbone that is trained."""
        if self._prefix_encoder is not None:
            self.base_model.requires_grad_(False)
            self._prefix_encoder.requires_grad_(True)

    def _init_weights(self, module: nn.Module):
        if isinstance(module, QuantizedRows):
            raise ValueError(f"quantized weights cannot be initialized, but some were not loaded: {module}")
        if self._prefix_encoder is not None and module in self._prefix_encoder.initialized_as_in_torch():
            module.reset_parameters()  # type: ignore[operator]
        else:
            super()._init_weights(module)


class ChatGLMModel(ChatGLMPreTrainedModel):
    """Door to the backbones."""

    num_layers, pre_seq_len, prefix_projection = FromConfig(), FromConfig(), FromConfig()
    get_prompt = instead_use("`prefix_encoder(batch_size, dtype)` gives the keys and values of each layer.")

    @property
    def prefix_tokens(self) -> torch.Tensor | None:
        return None if self.pre_seq_len is None else torch.arange(self.pre_seq_len)

    @property
    def dropout(self) -> nn.Module | None:
        """P-tuning's."""
        return None if self._prefix_encoder is None else self._prefix_encoder.dropout


class ChatGLMForConditionalGeneration(ChatGLMChatMixin, GenerationHooks, ChatGLMPreTrainedModel, GenerationMixin):
    """Door to the language models."""

    max_sequence_length = FromConfig("max_position_embeddings")


class ChatGLMForSequenceClassification(MeanLoss, ChatGLMPreTrainedModel):
    """Door to the sequence classifiers: a linear layer on the last real token of each sequence."""

    def __init__(self, config: ChatGLMConfig, empty_init: bool | None = None, device=None):
        super().__init__(config, empty_init, device)
        self.num_labels = config.num_labels
        self.transformer = ChatGLMModel(config)
        self.classifier_head = nn.Linear(config.hidden_size, config.num_labels)
        self.dropout = nn.Dropout(config.classifier_dropout or 0.0)
        self.post_init()

    @property
    def classifier(self) -> nn.Linear:
        """The head, by a name that PEFT looks for when it adapts all linear layers but this one."""
        return self.classifier_head

    def check_adapter(self, config):
        # PEFT trains and saves heads by the names that it knows, and passes over others in silence.
        saved = getattr(config, "modules_to_save", None)
        if saved and "classifier" in saved and "classifier_head" not in saved:
            saved.append("classifier_head")
        super().check_adapter(config)

    @takes_cache
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SequenceClassifierOutputWithPast:
        """
        Args:
            labels: (batch,) class indices, (batch,) values for regression, or (batch, num_labels) for several labels.

        Returns:
            Logits (batch, num_labels). The original reads the last column, which is a pad in a right-padded batch; here
            it is the last token that `attention_mask` keeps.
        """
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        if attention_mask is not None and attention_mask.ndim == 2:
            kept = attention_mask[:, -hidden_states.shape[1] :] != 0
            last = (kept * torch.arange(kept.shape[1], device=kept.device)).argmax(dim=-1).to(hidden_states.device)
            pooled = hidden_states[torch.arange(len(last), device=last.device), last]
        else:
            pooled = hidden_states[:, -1]
        logits = self.classifier_head(self.dropout(pooled))

        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, pooled_logits=logits, config=self.config)

        return SequenceClassifierOutputWithPast(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
