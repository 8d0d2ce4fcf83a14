"""ChatGLM-6B (GLM, arXiv 2103.10360): a prefix language model with 2-D rotary positions and a scaled residual stream."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin

from ..._compat.modeling import (
    ACT2FN,
    ALL_ATTENTION_FUNCTIONS,
    BaseModelOutputWithPast,
    GradientCheckpointingLayer,
    TransformersKwargs,
    Unpack,
    capture_outputs,
    drops_cache,
    eager_attention_forward,
    merge_with_config_defaults,
    rotate_half,
    shifts_labels,
    takes_cache,
)
from ...attention.prefix_lm import PrefixLMLayout, create_prefix_lm_mask, prefix_lm_attention
from ..glm_line.blank_positions import POSITIONS, positions_and_context, texts_of_packed_row
from ..glm_line.heads import PrefixLanguageModel
from ..old_names import FromConfig
from ..validation import validate_inputs
from . import modeling_chatglm_auto as auto
from .configuration_chatglm import ChatGLM1Config
from .prefix_encoder import PrefixEncoder

ROPE_BASE = 10000.0

# √(2·28). The original's layers never learn how many there are and assume ChatGLM-6B's 28.
RESIDUAL_SCALE = 56**0.5


class RotaryEmbedding(nn.Module):
    """Angles in fp32. In 2-D mode the first half of each head turns with the position, the second half with the block
    position, each half in the half-split form.

    The frequencies are those of the original's fp16 buffer, which its weights were trained with: rounding them moves the
    angle at position 1,900 by up to half a radian.
    """

    def __init__(self, config: ChatGLM1Config):
        super().__init__()
        self.dim = config.head_dim // 2 if config.position_encoding_2d else config.head_dim

    @torch.no_grad()
    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, [batch, length, 1, 1, rows, dim] for position_ids [batch, rows, length], in the dtype of
        `hidden_states`."""
        channels = torch.arange(0, self.dim, 2, dtype=torch.float32, device=hidden_states.device)
        inv_freq = (1.0 / ROPE_BASE ** (channels / self.dim)).half().float()
        angles = self.angles(position_ids.transpose(1, 2)[:, :, None, None, :, None], inv_freq, hidden_states.dtype)
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(hidden_states.dtype), angles.sin().to(hidden_states.dtype)

    def angles(self, position_ids: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Those of a model in `dtype`, fp32."""
        return position_ids.float() * inv_freq


def apply_rotary_pos_emb(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns states [batch, length, heads, several, head_dim], a part of each head for each row of positions."""
    parts = states.unflatten(-1, cos.shape[-2:])
    return (parts * cos + rotate_half(parts) * sin).flatten(-2)


class SelfAttention(nn.Module):
    """Attention over one packed projection, q | k | v of each head in turn.

    The original scales queries by 1 / (layer + 1) and scores by layer + 1, to keep fp16 scores small; softmax sees the
    plain scores.
    """

    num_key_value_groups = 1
    attention_dropout = 0.0

    def __init__(self, config: ChatGLM1Config, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | PrefixLMLayout | None = None,
        cache: Cache | None = None,
        prompt_key_values: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        mixed = self.query_key_value(hidden_states).view(*input_shape, -1, 3, self.head_dim)
        # A head's query and key lie side by side and turn in one go.
        query_states, key_states = apply_rotary_pos_emb(mixed[..., :2, :], *position_embeddings).unbind(-2)
        query_states, key_states, value_states = (
            states.transpose(1, 2) for states in (query_states, key_states, mixed[..., 2, :])
        )

        if prompt_key_values is not None:
            key_states = torch.cat((prompt_key_values[0], key_states), dim=-2)
            value_states = torch.cat((prompt_key_values[1], value_states), dim=-2)
        if cache is not None:
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx, kwargs=kwargs)

        attn_output, attn_weights = self.attention_function(query_states, attention_mask)(
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

    def attention_function(self, query_states: torch.Tensor, attention_mask: Any) -> Callable:
        """transformers' of the configured backend, or what stands in for it at this mask."""
        backend = self.config._attn_implementation
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
        return prefix_lm_attention(backend, attention_interface)


class GLU(nn.Module):
    """The MLP, under the original's name (there is no gate in it)."""

    def __init__(self, config: ChatGLM1Config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)
        self.act_fn = ACT2FN["gelu_pytorch_tanh"]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dense_4h_to_h(self.act_fn(self.dense_h_to_4h(hidden_states)))


class GLMBlock(GradientCheckpointingLayer):
    attention_class: type[nn.Module] = SelfAttention
    mlp_class: type[nn.Module] = GLU
    residual_scale = RESIDUAL_SCALE

    def __init__(self, config: ChatGLM1Config, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = self.attention_class(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = self.mlp_class(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        prompt_key_values: torch.Tensor | None = None,  # by position: so its gradient passes reentrant checkpoints
        attention_mask: torch.Tensor | PrefixLMLayout | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        # The residual is the norm's output, not its input.
        normed = self.input_layernorm(hidden_states)
        attn_output, _ = self.attention(
            normed,
            position_embeddings=position_embeddings,
            attention_mask=attention_mask,
            cache=cache,
            prompt_key_values=prompt_key_values,
            **kwargs,
        )
        hidden_states = normed * self.residual_scale + attn_output

        normed = self.post_attention_layernorm(hidden_states)
        return normed * self.residual_scale + self.mlp(normed)


class ChatGLMPreTrainedModel(auto.ChatGLMPreTrainedModel):
    config: ChatGLM1Config
    config_class = ChatGLM1Config
    _no_split_modules = ["GLMBlock"]
    # Attention functions from outside know no prefix and would be causal.
    _supports_attention_backend = False
    _can_record_outputs = {"hidden_states": GLMBlock, "attentions": SelfAttention}
    # Stored by the original in every layer, determined by the configuration.
    _keys_to_ignore_on_load_unexpected = [r"\.attention\.rotary_emb\.inv_freq$"]


class ChatGLMModel(ChatGLMPreTrainedModel, auto.ChatGLMModel):
    """The backbone."""

    hidden_size, num_attention_heads = FromConfig(), FromConfig()
    inner_hidden_size, layernorm_epsilon = FromConfig(), FromConfig()
    position_encoding_2d, max_sequence_length = FromConfig(), FromConfig()
    hidden_size_per_attention_head = FromConfig("head_dim")
    params_dtype = property(lambda model: model.dtype)

    layer_class: type[nn.Module] = GLMBlock
    rotary_class: type[nn.Module] = RotaryEmbedding
    embedding_dropout = 0.0
    _input_embed_layer = "word_embeddings"
    # A head's q | k | v are neighbors, so shards of the projection are whole heads.
    _tp_plan = {
        "word_embeddings": "embedding_rowwise",
        "layers.*.attention.query_key_value": "colwise",
        "layers.*.attention.dense": "rowwise",
        "layers.*.mlp.dense_h_to_4h": "colwise",
        "layers.*.mlp.dense_4h_to_h": "rowwise",
    }
    _pp_plan = {  # type: ignore[assignment]  # as Llama has it
        "word_embeddings": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "final_layernorm": (["hidden_states"], ["hidden_states"]),
    }
    _fsdp_plan = {
        "word_embeddings": "free_full_weight",
        "layers.*": "free_full_weight",
        "final_layernorm": "keep_full_weight",
    }

    def __init__(self, config: ChatGLM1Config, empty_init: bool | None = None, device=None):
        super().__init__(config, empty_init, device)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([self.layer_class(config, layer_idx) for layer_idx in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.rotary_emb = self.rotary_class(config)
        self.prefix_encoder = None
        if config.pre_seq_len is not None:
            self.prefix_encoder = PrefixEncoder(config, projection_size=config.hidden_size)
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
        """
        Args:
            input_ids: (batch, length). Each text is a context with a mask token ([gMASK], [MASK] or [sMASK]) in it, one
                start token (`bos_token_id`), and the answer. The context sees all of itself, the rest is causal.
            attention_mask: (batch, past + length), 1 for tokens and 0 for padding, or equal numbers from 1 for the
                tokens of one packed text. A P-tuning prefix is not counted. Or (batch or 1, 1, length, past + length),
                True where a query sees a key, or additive, which then says everything.
            position_ids: (batch, 2, length), positions and block positions; the tokens with block position 0 are the
                context. Worked out from `input_ids` if not given, which takes all of a text: after a cache, and with
                `inputs_embeds`, they must be given. With `position_encoding_2d=False`, (batch, length). Those of a packed
                row as collators give them, (batch, length) from 0 in each text, part its texts.

        Returns:
            `hidden_states`, if asked for, are the embeddings and each layer's output, the last one after the final norm.

        Raises:
            ValueError: `input_ids` are not as said, or `position_ids` have the wrong shape.
        """
        attention_mask, position_ids = texts_of_packed_row(self.config, input_ids, attention_mask, position_ids, cache)
        cache = validate_inputs(
            self.config,
            input_ids,
            inputs_embeds,
            attention_mask,
            kwargs.get(POSITIONS, position_ids),
            cache,
            kwargs,
            has_blocks=self.config.position_encoding_2d,
        )
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        position_ids, context = positions_and_context(
            self.config, input_ids, attention_mask, position_ids, inputs_embeds, cache, kwargs
        )
        prompt_key_values, past = None, cache
        if self.prefix_encoder is not None:
            if drops_cache(self):
                cache = None  # and the prefix with it
            prompt_key_values, past = self.prefix_encoder.put_in_front(cache, inputs_embeds, self.config.num_layers)
        mask = create_prefix_lm_mask(
            self.config, inputs_embeds, attention_mask, past, context, self.config.pre_seq_len or 0
        )
        position_embeddings = self.rotary_emb(inputs_embeds, position_ids=position_ids)

        hidden_states = nn.functional.dropout(inputs_embeds, self.embedding_dropout, self.training)
        for layer_idx, layer in enumerate(self.layers[: self.config.num_layers]):
            hidden_states = layer(
                hidden_states,
                None if prompt_key_values is None else prompt_key_values[layer_idx],
                attention_mask=mask,
                position_embeddings=position_embeddings,
                cache=cache,
                use_cache=use_cache,
                **kwargs,
            )

        hidden_states = self.final_layernorm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, cache=cache)


@shifts_labels
class ChatGLMForConditionalGeneration(
    PrefixLanguageModel, ChatGLMPreTrainedModel, auto.ChatGLMForConditionalGeneration, GenerationMixin
):
    position_encoding_2d = FromConfig()
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: ChatGLM1Config, empty_init: bool | None = None, device=None):
        super().__init__(config, empty_init, device)
        self.transformer = ChatGLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.learned_keys = config.pre_seq_len or 0
        self.post_init()


class ChatGLMForSequenceClassification(ChatGLMPreTrainedModel, auto.ChatGLMForSequenceClassification): ...
