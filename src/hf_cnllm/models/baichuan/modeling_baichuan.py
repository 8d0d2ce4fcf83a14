"""Baichuan 1 and 2 (arXiv 2309.10305): a Llama with one packed q | k | v projection, and, by configuration, ALiBi
instead of RoPE (the 13B models) and a row-normalized output head (Baichuan2)."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel

from ..._compat.modeling import (
    ACT2FN,
    ALL_ATTENTION_FUNCTIONS,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    GenerationHooks,
    GenericForQuestionAnswering,
    GenericForSequenceClassification,
    GenericForTokenClassification,
    GradientCheckpointingLayer,
    LlamaRMSNorm,
    TransformersKwargs,
    Unpack,
    apply_rotary_pos_emb,
    can_return_tuple,
    capture_outputs,
    eager_attention_forward,
    init,
    merge_with_config_defaults,
    shifts_labels,
    takes_cache,
)
from ...attention.alibi import ALIBI_ATTENTION, ALIBI_MASKS, AlibiMask, create_alibi_mask, prepare_alibi_mask
from ...attention.fully_masked_rows import FullyMaskedRows, fill_fully_masked_rows, find_padding_in_front
from ...attention.mask_values import is_packed, is_readable
from ...attention.masks import create_causal_mask
from ...loss.causal_lm import causal_lm_loss
from ...loss.head import MeanLoss, causal_lm_output
from ...loss.norm_head import NormHead, rows_around_mean, weights_stay
from ..loading import CheckpointLoadingMixin
from ..old_names import QUANTIZE_WHILE_LOADING, FromConfig, instead_use
from ..rotary import RotaryEmbedding
from ..validation import cached_length, validate_inputs
from .chat import BaichuanChatMixin
from .configuration_baichuan import BaichuanConfig


class BaichuanMLP(nn.Module):
    def __init__(self, config: BaichuanConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))


class BaichuanAttention(nn.Module):
    """Multi-headed attention with one projection for q | k | v, and RoPE or ALiBi."""

    num_key_value_groups = 1

    def __init__(self, config: BaichuanConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.W_pack = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        attention_mask: torch.Tensor | AlibiMask | None = None,
        cache: Cache | None = None,
        fully_masked_rows: FullyMaskedRows | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        packed = self.W_pack(hidden_states).view(*input_shape, 3, -1, self.head_dim)
        query_states, key_states, value_states = (states.transpose(1, 2) for states in packed.unbind(-3))

        if position_embeddings is not None:
            query_states, key_states = apply_rotary_pos_emb(query_states, key_states, *position_embeddings)
        if cache is not None:
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx, kwargs=kwargs)

        backend = self.config._attn_implementation
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
        if isinstance(attention_mask, ALIBI_MASKS):
            attention_interface = ALIBI_ATTENTION[backend]
        attn_output, attn_weights = attention_interface(
            self, query_states, key_states, value_states, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs
        )
        if fully_masked_rows is not None:
            attn_output = fill_fully_masked_rows(attn_output, value_states, fully_masked_rows)
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        return self.o_proj(attn_output), attn_weights


class BaichuanDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config: BaichuanConfig, layer_idx: int):
        super().__init__()
        self.self_attn = BaichuanAttention(config, layer_idx)
        self.mlp = BaichuanMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | AlibiMask | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attn_output, _ = self.self_attn(
            self.input_layernorm(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            cache=cache,
            **kwargs,
        )
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


class BaichuanPreTrainedModel(CheckpointLoadingMixin, PreTrainedModel):
    config: BaichuanConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["BaichuanDecoderLayer"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": BaichuanDecoderLayer, "attentions": BaichuanAttention}
    # Baichuan-7B stored a buffer that the configuration determines.
    _keys_to_ignore_on_load_unexpected = [r"\.self_attn\.rotary_emb\.inv_freq$"]

    def _init_weights(self, module: nn.Module):
        if isinstance(module, NormHead):
            init.kaiming_uniform_(module.raw_weight, a=5**0.5)
        else:
            super()._init_weights(module)


class BaichuanModel(BaichuanPreTrainedModel):
    padding_idx, n_head = FromConfig("pad_token_id"), FromConfig("num_attention_heads")
    max_cache_pos = FromConfig("model_max_length")
    get_alibi_mask = instead_use("attention.alibi.alibi_slopes has the slopes; the mask is made inside.")

    def __init__(self, config: BaichuanConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(
            [BaichuanDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = None
        if config.position_embedding == "rope":
            self.rotary_emb = RotaryEmbedding(config)  # type: ignore[arg-type]  # it reads what Llama shares
        self.gradient_checkpointing = False
        self.post_init()

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        attention_mask (`torch.Tensor`, *optional*):
            `[batch, length]`: 0 for padding, 1 for tokens; or numbers from 1, one for each sequence packed into the
            row, whose tokens see each other only. With ALiBi also `[batch, queries, keys]`, 0/1. With a cache it covers the
            cached tokens too.
        position_ids (`torch.LongTensor`, *optional*):
            `[batch, length]`. RoPE rotates by them; by default they count from the cache's length, which is right for
            padded rows too, the rotation being relative. ALiBi has no use for them, except that without mask and cache
            a restart begins a packed sequence, as everywhere in transformers.
        """
        cache = validate_inputs(self.config, input_ids, inputs_embeds, attention_mask, position_ids, cache, kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        length = inputs_embeds.shape[1]
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        if self.config.position_embedding == "alibi":
            position_embeddings = None
            mask: AlibiMask | BlockMask | None = create_alibi_mask(
                self.config, inputs_embeds, attention_mask, cache, position_ids, kwargs.get("cu_seq_lens_k")
            )
        else:
            if position_ids is None:
                position_ids = torch.arange(length, device=inputs_embeds.device) + cached_length(cache)
                position_ids = position_ids.unsqueeze(0)
            mask = create_causal_mask(self.config, inputs_embeds, attention_mask, cache, position_ids)
            position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)
        fully_masked_rows = self._find_fully_masked_rows(attention_mask, length)

        hidden_states = inputs_embeds
        for decoder_layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = decoder_layer(
                hidden_states,
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                fully_masked_rows=fully_masked_rows,
                cache=cache,
                use_cache=use_cache,
                **kwargs,
            )

        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), cache=cache)

    def _find_fully_masked_rows(self, attention_mask: object, queries: int) -> FullyMaskedRows | None:
        """The rows that look nowhere, as the originals treated them, when a prompt or a training batch has any."""
        if not isinstance(attention_mask, torch.Tensor) or queries == 1:
            return None
        if attention_mask.shape[1:] not in ((queries,), (queries, queries)):
            return None
        tokens = attention_mask != 0
        if tokens.ndim == 3:
            tokens = tokens.tril().any(-1)
        if is_readable(tokens) and tokens.all():
            return None
        if self.config.position_embedding == "alibi" or is_packed(attention_mask):
            return FullyMaskedRows(~tokens)
        padding = find_padding_in_front(attention_mask, queries)  # RoPE knows padding as keys only
        return padding._replace(tokens=tokens) if padding is not None and self.config.norm_head else padding


@shifts_labels
class BaichuanForCausalLM(BaichuanChatMixin, GenerationHooks, BaichuanPreTrainedModel, GenerationMixin):
    quantize = QUANTIZE_WHILE_LOADING
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: BaichuanConfig):
        super().__init__(config)
        self.model = BaichuanModel(config)
        if config.norm_head:
            self.lm_head = NormHead(config.hidden_size, config.vocab_size)
        else:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.post_init()

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
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        labels (`torch.LongTensor` of shape `(batch, length)`, *optional*):
            Token ids, −100 where nothing is to be learned. The loss is cross entropy plus `config.z_loss_weight` times
            the max-z loss, see [`~hf_cnllm.loss.causal_lm.causal_lm_loss`].
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        loss_kwargs = {"z_loss_weight": self.config.z_loss_weight} | kwargs
        return causal_lm_output(self, self.lm_head, outputs, labels, logits_to_keep, **loss_kwargs)

    def while_generating(self):
        return weights_stay()

    def is_continuous_with_flash(self):
        return self.config.position_embedding != "alibi"

    @classmethod
    def check_weight_files(cls, model, files, quantizer):
        super().check_weight_files(model, files, quantizer)
        is_quantized = not isinstance(model.lm_head, NormHead) or (
            quantizer is not None and quantizer.param_needs_quantization(model, "lm_head.weight")
        )
        if model.config.norm_head and is_quantized:
            raise ValueError(
                "NormHead, this model's `lm_head`, cannot be quantized: its rows would no longer be normalized. Name it among "
                "the modules that stay as they are (`modules_to_not_convert`, in BitsAndBytesConfig `llm_int8_skip_modules`), "
                "or leave that list out."
            )

    def masks_for_generate(self, config, inputs_embeds, attention_mask, cache, position_ids=None):
        if config.position_embedding == "alibi":
            return prepare_alibi_mask(config, inputs_embeds, attention_mask, cache)
        return create_causal_mask(config, inputs_embeds, attention_mask, cache, position_ids)

    def get_parameter(self, target: str) -> nn.Parameter:
        # torch reads the attribute, which on a NormHead is the effective matrix.
        module_path, _, name = target.rpartition(".")
        module = self.get_submodule(module_path)
        return module.get_parameter(name) if isinstance(module, NormHead) else super().get_parameter(target)

    def _get_resized_lm_head(self, old_lm_head: nn.Linear | NormHead, *args, **kwargs) -> nn.Linear | NormHead:
        if not isinstance(old_lm_head, NormHead):
            return super()._get_resized_lm_head(old_lm_head, *args, **kwargs)
        head = NormHead.from_linear(super()._get_resized_lm_head(old_lm_head.as_linear(), *args, **kwargs))
        # As the plain head that transformers makes: `post_init` leaves it alone.
        head._is_hf_initialized = True  # type: ignore[assignment]
        return head

    def _init_added_lm_head_weights_with_mean(
        self, old_lm_head, new_lm_head, old_lm_head_dim, old_num_tokens, added_num_tokens, transposed=False
    ):
        if not self.config.norm_head:
            return super()._init_added_lm_head_weights_with_mean(
                old_lm_head, new_lm_head, old_lm_head_dim, old_num_tokens, added_num_tokens, transposed
            )
        new_lm_head.weight.data[-added_num_tokens:] = rows_around_mean(old_lm_head.weight.data, added_num_tokens)


@shifts_labels
class BaiChuanForCausalLM(BaichuanForCausalLM):
    """The spelling in Baichuan-7B's files."""


class BaichuanForSequenceClassification(MeanLoss, GenericForSequenceClassification, BaichuanPreTrainedModel): ...


class BaichuanForTokenClassification(MeanLoss, GenericForTokenClassification, BaichuanPreTrainedModel): ...


class BaichuanForQuestionAnswering(MeanLoss, GenericForQuestionAnswering, BaichuanPreTrainedModel): ...
