"""Qwen (v1): a Llama-like decoder with dynamic NTK and LogN for inputs past the trained length (arXiv 2309.16609)."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel

from ..._compat import logging
from ..._compat.modeling import (
    ALL_ATTENTION_FUNCTIONS,
    PAGED_CACHES,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
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
    is_tracing,
    merge_with_config_defaults,
    shifts_labels,
    takes_cache,
)
from ...attention.fully_masked_rows import FullyMaskedRows, fill_fully_masked_rows, find_padding_in_front
from ...attention.logn import logn_scale
from ...attention.mask_values import is_packed
from ...attention.masks import create_window_masks, mask_name, positions_in_sequences
from ...loss.causal_lm import causal_lm_loss
from ...loss.head import MeanLoss, causal_lm_output
from ..loading import CheckpointLoadingMixin
from ..old_names import QUANTIZE_WHILE_LOADING, FromConfig
from ..validation import cached_length, validate_inputs
from .chat import QWenChatMixin
from .configuration_qwen import QWenConfig
from .dynamic_ntk import DynamicNtkRotaryEmbedding, ntk_alpha
from .generation_qwen import QWenGenerationMixin

logger = logging.get_logger(__name__)


class QWenMLP(nn.Module):
    def __init__(self, config: QWenConfig):
        super().__init__()
        width = config.intermediate_size // 2
        self.w1 = nn.Linear(config.hidden_size, width, bias=not config.no_bias)
        self.w2 = nn.Linear(config.hidden_size, width, bias=not config.no_bias)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=not config.no_bias)
        self.c_proj.adds_to_residual = True  # type: ignore[assignment]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.c_proj(self.w1(hidden_states) * nn.functional.silu(self.w2(hidden_states)))


class QWenAttention(nn.Module):
    """Multi-headed attention with one projection for q | k | v, partial RoPE, LogN, and a window of the layer's own."""

    num_key_value_groups = 1

    def __init__(self, config: QWenConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.kv_channels
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.sliding_window = config.window_sizes[layer_idx] if config.window_sizes else None
        self.attention_dropout = config.attn_dropout_prob
        width = config.kv_channels * config.num_attention_heads
        self.c_attn = nn.Linear(config.hidden_size, 3 * width)
        self.c_proj = nn.Linear(width, config.hidden_size, bias=not config.no_bias)
        self.c_proj.adds_to_residual = True  # type: ignore[assignment]

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        query_scale: torch.Tensor | None = None,
        fully_masked_rows: FullyMaskedRows | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        packed = self.c_attn(hidden_states).view(*input_shape, 3, -1, self.head_dim)
        query_states, key_states, value_states = (states.transpose(1, 2) for states in packed.unbind(-3))

        query_states, key_states = self._rotate(query_states, key_states, *position_embeddings)
        if query_scale is not None:
            query_states = query_states * query_scale
        if cache is not None:
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx, kwargs=kwargs)

        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attn_output, attn_weights = attention_interface(
            self,
            query_states,
            key_states,
            value_states,
            attention_mask,
            dropout=0.0 if not self.training else self.attention_dropout,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        if fully_masked_rows is not None:
            attn_output = fill_fully_masked_rows(attn_output, value_states, fully_masked_rows)
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        return self.c_proj(attn_output), attn_weights

    def _rotate(self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor):
        rotated = cos.shape[-1]
        if rotated == self.head_dim:
            return apply_rotary_pos_emb(query, key, cos, sin)
        rotated_query, rotated_key = apply_rotary_pos_emb(query[..., :rotated], key[..., :rotated], cos, sin)
        query = torch.cat((rotated_query, query[..., rotated:]), dim=-1)
        return query, torch.cat((rotated_key, key[..., rotated:]), dim=-1)


class QWenBlock(GradientCheckpointingLayer):
    def __init__(self, config: QWenConfig, layer_idx: int):
        super().__init__()
        self.mask_name = mask_name(config, layer_idx)
        self.ln_1 = LlamaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attn = QWenAttention(config, layer_idx)
        self.ln_2 = LlamaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = QWenMLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        attn_output, _ = self.attn(
            self.ln_1(hidden_states),
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            cache=cache,
            **kwargs,
        )
        hidden_states = hidden_states + attn_output
        return hidden_states + self.mlp(self.ln_2(hidden_states))


class QWenPreTrainedModel(CheckpointLoadingMixin, PreTrainedModel):
    config: QWenConfig
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    supports_gradient_checkpointing = True
    _no_split_modules = ["QWenBlock"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    _supports_attention_backend = True
    _can_record_outputs = {"hidden_states": QWenBlock, "attentions": QWenAttention}
    # Buffers that the originals registered and the configuration determines.
    _keys_to_ignore_on_load_unexpected = [r"(^|\.)rotary_emb\.inv_freq$", r"\.attn\.(logn_tensor|masked_bias|bias)$"]

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, DynamicNtkRotaryEmbedding):
            init.copy_(module.inv_freq, module.compute_inv_freq())
        elif isinstance(module, nn.Linear) and getattr(module, "adds_to_residual", False):  # scaled as in GPT-2
            std = self.config.initializer_range / math.sqrt(2 * self.config.num_hidden_layers)
            init.normal_(module.weight, mean=0.0, std=std)  # type: ignore[arg-type]


class QWenModel(QWenPreTrainedModel):
    embed_dim, num_hidden_layers = FromConfig("hidden_size"), FromConfig()
    seq_length, use_dynamic_ntk = FromConfig(), FromConfig()
    use_flash_attn, use_cache_quantization = FromConfig(), FromConfig()
    is_fp32 = property(lambda model: model.dtype == torch.float32)

    def __init__(self, config: QWenConfig):
        super().__init__(config)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.drop = nn.Dropout(config.emb_dropout_prob)
        self.rotary_emb = DynamicNtkRotaryEmbedding(config.rotary_dim, config.rotary_emb_base, config.seq_length)
        self.h = nn.ModuleList([QWenBlock(config, layer_idx) for layer_idx in range(config.num_hidden_layers)])
        self.ln_f = LlamaRMSNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def get_ntk_alpha(self, true_seq_len: int) -> int:
        """The factor that dynamic NTK stretches a prompt of this length with."""
        return ntk_alpha(true_seq_len, self.rotary_emb.seq_length)

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
        prompt_lengths: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> BaseModelOutputWithPast:
        r"""
        attention_mask (`torch.Tensor`, *optional*):
            `[batch, past + length]`, 0 for padding, 1 for tokens; or numbers from 1, one for each sequence packed into the
            row, which then see, and dynamic NTK and LogN then count, their own tokens only.
        position_ids (`torch.LongTensor`, *optional*):
            `[batch, length]`, 0-based. RoPE rotates by them and LogN counts by them. By default they count columns,
            padding included, as in the original; RoPE is relative, so only LogN can tell the difference.
        prompt_lengths (`torch.LongTensor` or `int`, *optional*):
            `[batch]`, tokens in the prompt of each row, from which dynamic NTK takes its factor. By default the number
            of tokens at prefill. `generate` sets it; a loop without a cache should.
        """
        cache = validate_inputs(self.config, input_ids, inputs_embeds, attention_mask, position_ids, cache, kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.wte(input_ids)
        length = inputs_embeds.shape[1]
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        past_length, by_columns = cached_length(cache), position_ids is None
        # How far the positions reach, where that is known without looking at tensors and is more than an example's.
        is_known = by_columns and isinstance(past_length, int) and not is_tracing(inputs_embeds)
        reach = int(past_length) + length if is_known else None
        if by_columns:
            position_ids = (torch.arange(length, device=inputs_embeds.device) + past_length).unsqueeze(0)
        masks: Any = attention_mask
        if not isinstance(masks, dict):  # made by `create_masks_for_generate`, or by continuous batching
            masks = create_window_masks(self.config, inputs_embeds, attention_mask, cache, position_ids)
        fully_masked_rows = find_padding_in_front(attention_mask, length)

        inv_freq = self.rotary_emb.plain_inv_freq
        # Continuous batching and vLLM pack requests into one row and do not say how long the prompts were, so dynamic NTK
        # stays off there; the former lets no prompt in that would need it.
        is_served = isinstance(cache, PAGED_CACHES) or kwargs.get("attention_instances") is not None
        if self.config.use_dynamic_ntk and not self.training and not is_served:
            inv_freq = self.rotary_emb.select_inv_freq(
                inputs_embeds, attention_mask, position_ids, cache, prompt_lengths
            )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids, inv_freq)
        query_scale = self._query_scale(inputs_embeds.dtype, attention_mask, position_ids, by_columns, reach)
        if reach is not None and reach > self.config.max_position_embeddings and not self.config.use_dynamic_ntk:
            logger.warning_once(
                f"The input goes past `max_position_embeddings` ({self.config.max_position_embeddings}), with "
                "`use_dynamic_ntk` off: expect worse predictions there. Load the model with `use_dynamic_ntk=True` for "
                "long inputs."
            )

        hidden_states = self.drop(inputs_embeds)
        for block in self.h[: self.config.num_hidden_layers]:
            hidden_states = block(
                hidden_states,
                attention_mask=masks[block.mask_name],
                position_embeddings=position_embeddings,
                query_scale=query_scale,
                fully_masked_rows=fully_masked_rows,
                position_ids=position_ids,
                cache=cache,
                use_cache=use_cache,
                **kwargs,
            )

        return BaseModelOutputWithPast(last_hidden_state=self.ln_f(hidden_states), cache=cache)

    def _query_scale(
        self,
        dtype: torch.dtype,
        attention_mask: Any,
        position_ids: torch.Tensor,
        by_columns: bool,
        reach: int | None,
    ) -> torch.Tensor | None:
        """LogN's factors, or None where no query is past the trained length. By default they count columns, as the original,
        or the places of tokens in sequences that the mask packs."""
        seq_length = self.rotary_emb.seq_length  # one for NTK and LogN
        if not self.config.use_logn_attn or self.training or (reach is not None and reach <= seq_length):
            return None
        packed = by_columns and is_packed(attention_mask)
        if packed is not False:
            places = positions_in_sequences(attention_mask)[:, -position_ids.shape[1] :].to(position_ids.device)
            position_ids = places if packed else torch.where((attention_mask > 1).any(), places, position_ids)
        return logn_scale(position_ids, seq_length).to(dtype)


@shifts_labels
class QWenLMHeadModel(QWenPreTrainedModel, QWenChatMixin, QWenGenerationMixin, GenerationMixin):
    quantize = QUANTIZE_WHILE_LOADING
    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: QWenConfig):
        super().__init__(config)
        self.transformer = QWenModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForCausalLM"  # transformers guesses it from the class's name, which does not tell here
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
        prompt_lengths: torch.Tensor | int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        r"""
        position_ids, prompt_lengths (*optional*):
            As in [`QWenModel`].
        """
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            prompt_lengths=prompt_lengths,
            **kwargs,
        )
        return causal_lm_output(self, self.lm_head, outputs, labels, logits_to_keep, **kwargs)


class QWenForSequenceClassification(MeanLoss, GenericForSequenceClassification, QWenPreTrainedModel):
    base_model_prefix = "transformer"


class QWenForTokenClassification(MeanLoss, GenericForTokenClassification, QWenPreTrainedModel):
    base_model_prefix = "transformer"
