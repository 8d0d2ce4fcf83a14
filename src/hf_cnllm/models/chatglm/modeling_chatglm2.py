"""ChatGLM2 and ChatGLM3: a causal model with multi-query attention, rotary positions on half of each head's channels
and a gated MLP. (GLM-4's first checkpoints of model type `chatglm` are this architecture too.)"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import BatchEncoding, Cache, DynamicCache, GenerationMixin

from ..._compat import logging
from ..._compat.modeling import (
    ALL_ATTENTION_FUNCTIONS,
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    GradientCheckpointingLayer,
    TransformersKwargs,
    Unpack,
    can_return_tuple,
    capture_outputs,
    drops_cache,
    eager_attention_forward,
    find_packed_sequence_indices,
    is_tracing,
    merge_with_config_defaults,
    shifts_labels,
    takes_cache,
)
from ...attention.masks import create_causal_mask, positions_in_sequences
from ...loss.head import causal_lm_output
from ..chat import History, as_messages
from ..old_names import FromConfig, instead_use
from ..validation import validate_inputs
from . import modeling_chatglm_auto as auto
from .configuration_chatglm import ChatGLM2Config
from .prefix_encoder import PrefixEncoder, is_empty

logger = logging.get_logger(__name__)

ROPE_BASE = 10000.0


def rope_parameters(config: ChatGLM2Config) -> dict[str, Any]:
    """What [`RotaryEmbedding`] does, in the words of transformers' own models and of vLLM."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": ROPE_BASE, "partial_rotary_factor": 0.5}
    if config.rope_ratio_type != "linear":
        rope["rope_theta"] = ROPE_BASE * config.rope_ratio
    elif config.rope_ratio != 1:
        rope |= {"rope_type": "linear", "factor": float(config.rope_ratio)}
    return rope


class RotaryEmbedding(nn.Module):
    """Angles in fp32 for the first half of a head's channels; adjacent channels (2i, 2i + 1) turn together.

    Nothing is stored, so neither `model.half()` nor loading on the meta device can spoil the frequencies (the original
    ChatGLM2 computed them in the model's dtype, which in fp16 is wrong by whole turns at large positions).
    """

    def __init__(self, config: ChatGLM2Config):
        super().__init__()
        rope = rope_parameters(config)
        self.dim = config.head_dim // 2
        self.base, self.position_divisor = rope["rope_theta"], rope.get("factor", 1)

    @torch.no_grad()
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, each (batch, length, 1, dim) with every frequency twice, in the dtype of `hidden_states`; sin is negative
        where a pair's second channel turns into its first."""
        channels = torch.arange(0, self.dim, 2, dtype=torch.float32, device=hidden_states.device)
        inv_freq = 1.0 / self.base ** (channels / self.dim)
        angles = (position_ids[..., None, None].float() / self.position_divisor) * inv_freq
        cos, sin = angles.cos().repeat_interleave(2, dim=-1), angles.sin()
        sin = torch.stack((-sin, sin), dim=-1).flatten(-2)
        return cos.to(hidden_states.dtype), sin.to(hidden_states.dtype)


def apply_rotary_pos_emb(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns the first channels of states [batch, length, heads, head_dim], as many as `cos` and `sin` have."""
    turned, rest = states.tensor_split((cos.shape[-1],), dim=-1)
    across = turned.unflatten(-1, (-1, 2)).roll(1, dims=-1).flatten(-2)
    return torch.cat((turned * cos + across * sin, rest), dim=-1)


class SelfAttention(nn.Module):
    """Attention over one packed projection: rows q | k | v with multi-query attention, q | k | v per head without."""

    def __init__(self, config: ChatGLM2Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads
        self.num_key_value_heads = config.num_key_value_heads
        self.num_key_value_groups = self.num_heads // self.num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = True

        projection_size = self.num_heads * self.head_dim
        qkv_size = projection_size + 2 * self.num_key_value_heads * self.head_dim
        self.query_key_value = nn.Linear(
            config.hidden_size, qkv_size, bias=config.add_bias_linear or config.add_qkv_bias
        )
        self.dense = nn.Linear(projection_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        cache: Cache | None = None,
        prompt_key_values: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        mixed = self.query_key_value(hidden_states)
        query_states, key_states, value_states = self._rotated_heads(mixed, *position_embeddings)

        if prompt_key_values is not None:
            key_states = torch.cat((prompt_key_values[0], key_states), dim=-2)
            value_states = torch.cat((prompt_key_values[1], value_states), dim=-2)
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
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        attn_output = attn_output.reshape(*input_shape, -1).contiguous()
        return self.dense(attn_output), attn_weights

    def _rotated_heads(self, mixed: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(batch, length, rows) -> query, key, value, each (batch, its heads, length, head_dim)."""
        if not self.config.multi_query_attention:
            by_head = mixed.unflatten(-1, (self.num_heads, 3, self.head_dim))
            mixed = by_head.transpose(-2, -3).flatten(-3)
        states = mixed.unflatten(-1, (-1, self.head_dim))
        # Queries and keys lie side by side and turn in one go.
        turning, value = states.tensor_split((self.num_heads + self.num_key_value_heads,), dim=-2)
        query, key = apply_rotary_pos_emb(turning, cos, sin).tensor_split((self.num_heads,), dim=-2)
        return query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)


class MLP(nn.Module):
    """silu(first half) * second half of one packed projection."""

    def __init__(self, config: ChatGLM2Config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=config.add_bias_linear)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate, value = self.dense_h_to_4h(hidden_states).chunk(2, dim=-1)
        return self.dense_4h_to_h(nn.functional.silu(gate) * value)


def make_norm(config: ChatGLM2Config) -> nn.Module:
    norm_class = nn.RMSNorm if config.rmsnorm else nn.LayerNorm
    return norm_class(config.hidden_size, eps=config.layernorm_epsilon)


class GLMBlock(GradientCheckpointingLayer):
    def __init__(self, config: ChatGLM2Config, layer_idx: int):
        super().__init__()
        self.input_layernorm = make_norm(config)
        self.self_attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = make_norm(config)
        self.mlp = MLP(config)
        self.hidden_dropout = config.hidden_dropout
        self.residual_after_norm = config.apply_residual_connection_post_layernorm

    def forward(
        self,
        hidden_states: torch.Tensor,
        prompt_key_values: torch.Tensor | None = None,  # by position: so its gradient passes reentrant checkpoints
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        normed = self.input_layernorm(hidden_states)
        attn_output, _ = self.self_attention(
            normed,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            cache=cache,
            prompt_key_values=prompt_key_values,
            **kwargs,
        )
        hidden_states = self._add(attn_output, hidden_states, normed)

        normed = self.post_attention_layernorm(hidden_states)
        return self._add(self.mlp(normed), hidden_states, normed)

    def _add(self, output: torch.Tensor, hidden_states: torch.Tensor, normed: torch.Tensor) -> torch.Tensor:
        residual = normed if self.residual_after_norm else hidden_states
        return residual + nn.functional.dropout(output, p=self.hidden_dropout, training=self.training)


class GLMTransformer(nn.Module):
    """The layers and the final norm, under the original's name in the state dict."""

    def __init__(self, config: ChatGLM2Config):
        super().__init__()
        self.layers = nn.ModuleList([GLMBlock(config, layer_idx) for layer_idx in range(config.num_layers)])
        self.final_layernorm = make_norm(config) if config.post_layer_norm else nn.Identity()


class ChatGLMPreTrainedModel(auto.ChatGLMPreTrainedModel):
    config: ChatGLM2Config
    config_class = ChatGLM2Config
    _no_split_modules = ["GLMBlock"]
    _can_record_outputs = {"hidden_states": GLMBlock, "attentions": SelfAttention}
    # Stored by the originals: a buffer that the configuration determines, and, in the backbone, the output projection.
    _keys_to_ignore_on_load_unexpected = [
        r"(^|\.)rotary_pos_emb\.inv_freq$",
        r"^(transformer\.)?output_layer\.weight$",
    ]


class ChatGLMModel(ChatGLMPreTrainedModel, auto.ChatGLMModel):
    """The backbone."""

    multi_query_group_num, kv_channels, seq_length = FromConfig(), FromConfig(), FromConfig()
    output_layer: nn.Linear  # which a model with a head puts there
    # Row groups of the packed projections are not whole heads or channel pairs: their shards are gathered.
    _tp_plan = {
        "embedding.word_embeddings": "embedding_rowwise",
        "encoder.layers.*.self_attention.query_key_value": "colwise_gather_output",
        "encoder.layers.*.self_attention.dense": "rowwise_split_input",
        "encoder.layers.*.mlp.dense_h_to_4h": "colwise_gather_output",
        "encoder.layers.*.mlp.dense_4h_to_h": "rowwise_split_input",
    }
    _pp_plan = {  # type: ignore[assignment]  # as Llama has it
        "embedding": (["input_ids"], ["inputs_embeds"]),
        "encoder.layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "encoder.final_layernorm": (["hidden_states"], ["hidden_states"]),
    }
    _fsdp_plan = {
        "embedding": "free_full_weight",
        "encoder.layers.*": "free_full_weight",
        "encoder.final_layernorm": "keep_full_weight",
    }

    def __init__(self, config: ChatGLM2Config, empty_init: bool | None = None, device=None):
        super().__init__(config, empty_init, device)
        self.embedding = nn.Sequential()
        self.embedding.add_module("word_embeddings", nn.Embedding(config.vocab_size, config.hidden_size))
        self.rotary_pos_emb = RotaryEmbedding(config)
        self.encoder = GLMTransformer(config)
        self.prefix_encoder = None
        if config.pre_seq_len is not None:
            all_layers = config.num_layers * 2 * config.num_key_value_heads * config.head_dim
            self.prefix_encoder = PrefixEncoder(config, projection_size=all_layers)
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding[0]

    def set_input_embeddings(self, value: nn.Embedding):
        self.embedding.word_embeddings = value

    @takes_cache
    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
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
        """
        Args:
            attention_mask: (batch, past + length), 1 for tokens and 0 for padding, or equal numbers from 1 for the
                tokens of one packed sequence; a P-tuning prefix is not counted. Or a 4-D mask as transformers' mask
                functions make it.
            position_ids: (batch, length). By default each sequence counts from 0. Without mask and cache, a restart
                begins a packed sequence.

        Returns:
            `hidden_states`, if asked for, are the embeddings and each layer's output, before the final norm.
        """
        cache = validate_inputs(self.config, input_ids, inputs_embeds, attention_mask, position_ids, cache, kwargs)
        if inputs_embeds is None:
            inputs_embeds = self.embedding(input_ids)
        length = inputs_embeds.shape[1]
        if not is_tracing(inputs_embeds) and length > self.config.seq_length:
            logger.warning_once(
                f"The input is longer ({length}) than what the model was trained for (seq_length={self.config.seq_length})"
            )
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        prompt_key_values, past = None, cache
        if self.prefix_encoder is not None:
            is_packed = position_ids is not None and find_packed_sequence_indices(position_ids) is not None
            if cache is None and attention_mask is None and is_packed:
                raise ValueError(
                    "`position_ids` restart within a row: packed sequences and a P-tuning prefix (`pre_seq_len`) do not go "
                    "together; train without packing"
                )
            if drops_cache(self):
                cache = None  # and the prefix with it
            prompt_key_values, past = self.prefix_encoder.put_in_front(cache, inputs_embeds, self.config.num_layers)
        if position_ids is None:
            position_ids = self._default_positions(length, inputs_embeds.device, attention_mask, past)
        mask = create_causal_mask(
            self.config, inputs_embeds, attention_mask, past, position_ids, self.config.pre_seq_len or 0
        )
        position_embeddings = self.rotary_pos_emb(inputs_embeds, position_ids=position_ids)

        hidden_states = inputs_embeds
        for layer_idx, layer in enumerate(self.encoder.layers[: self.config.num_layers]):
            hidden_states = layer(
                hidden_states,
                None if prompt_key_values is None else prompt_key_values[layer_idx],
                attention_mask=mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                cache=cache,
                use_cache=use_cache,
                **kwargs,
            )

        hidden_states = self.encoder.final_layernorm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, cache=cache)

    def _default_positions(
        self, length: int, device: torch.device, attention_mask: torch.Tensor | None, past: Cache | None
    ) -> torch.Tensor:
        """Positions of the last `length` tokens, (1 or batch, length), as the original's tokenizer gives them: padding
        and a P-tuning prefix do not count, and packed sequences count for themselves. (Next to a prefix, which is not
        rotated, a shift of the row would matter.)"""
        if attention_mask is not None and attention_mask.ndim == 2:
            return positions_in_sequences(attention_mask)[:, -length:].to(device)
        past_length = past.get_seq_length() - (self.config.pre_seq_len or 0) if past is not None else 0
        return (torch.arange(length, device=device) + past_length).unsqueeze(0)


@shifts_labels
class ChatGLMForConditionalGeneration(ChatGLMPreTrainedModel, auto.ChatGLMForConditionalGeneration, GenerationMixin):
    transformer: ChatGLMModel
    build_stream_inputs = instead_use("stream_chat goes on with the cache that it yielded.")
    _tied_weights_keys = {"transformer.output_layer.weight": "transformer.embedding.word_embeddings.weight"}
    _tp_plan = {"transformer.output_layer": "colwise_gather_output"}
    _pp_plan = {"transformer.output_layer": (["hidden_states"], ["logits"])}
    _fsdp_plan = {"transformer.output_layer": "keep_full_weight"}

    def __init__(self, config: ChatGLM2Config, empty_init: bool | None = None, device=None):
        super().__init__(config, empty_init, device)
        self.transformer = ChatGLMModel(config)
        # The checkpoints keep it inside the backbone, which has no use for it by itself.
        self.transformer.output_layer = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.learned_keys = config.pre_seq_len or 0
        self.post_init()

    def check_continuous_batching(self, workload_hints):
        if self.learned_keys:
            raise ValueError(
                "continuous batching (`generate_batch`) has no place for a P-tuning prefix (`pre_seq_len`): use `generate` with "
                "a padded batch"
            )

    def get_output_embeddings(self) -> nn.Linear:
        return self.transformer.output_layer

    def set_output_embeddings(self, new_embeddings: nn.Linear):
        self.transformer.output_layer = new_embeddings

    def build_inputs(self, tokenizer, query: str, history: History | None = None) -> BatchEncoding:
        """The input for answering `query` after `history`, on the model's device."""
        messages = [as_messages(query, history)]
        return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt").to(self.device)

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
        return_last_logit: bool | None = False,
        **kwargs: Unpack[TransformersKwargs],
    ) -> CausalLMOutputWithPast:
        """
        Args:
            labels: (batch, length) token ids, -100 where nothing is to be learned; shifted here. The rest as for
                [`ChatGLMModel`].
            return_last_logit: the original's name for `logits_to_keep=1`.
        """
        logits_to_keep = 1 if return_last_logit else logits_to_keep
        outputs: BaseModelOutputWithPast = self.transformer(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        return causal_lm_output(self, self.transformer.output_layer, outputs, labels, logits_to_keep, **kwargs)

    def masks_for_generate(self, config, inputs_embeds, attention_mask, cache, position_ids=None):
        if self.learned_keys and is_empty(cache):  # the prefix is not in it yet
            return attention_mask
        return create_causal_mask(config, inputs_embeds, attention_mask, cache, position_ids, self.learned_keys)


class ChatGLMForSequenceClassification(ChatGLMPreTrainedModel, auto.ChatGLMForSequenceClassification): ...
