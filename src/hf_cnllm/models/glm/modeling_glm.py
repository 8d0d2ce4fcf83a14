"""The original GLM (arXiv 2103.10360): a prefix language model that fills blanks, with learned 2-D positions."""

from collections.abc import Callable

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel

from ..._compat.modeling import (
    ACT2FN,
    ALL_ATTENTION_FUNCTIONS,
    BaseModelOutputWithPast,
    GradientCheckpointingLayer,
    TransformersKwargs,
    Unpack,
    capture_outputs,
    eager_attention_forward,
    init,
    merge_with_config_defaults,
    takes_cache,
)
from ...attention.mask_values import is_readable, largest_number
from ...attention.prefix_lm import PrefixLMLayout, create_prefix_lm_mask, prefix_lm_attention
from ..glm_line.blank_positions import POSITIONS, positions_and_context, texts_of_packed_row
from ..glm_line.heads import MultipleChoiceScoring, PrefixLanguageModel
from ..loading import CheckpointLoadingMixin
from ..old_names import WithoutChats
from ..validation import cached_length, validate_inputs
from .configuration_glm import GLMConfig


class SelfAttention(nn.Module):
    """Attention over one packed projection with rows q | k | v."""

    num_key_value_groups = 1

    def __init__(self, config: GLMConfig, layer_idx: int):
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = True
        self.attention_dropout = config.attention_dropout_prob
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        # A mark and no class of its own, which quantization would pass over.
        self.dense.adds_to_residual = True  # type: ignore[assignment]
        self.output_dropout = nn.Dropout(config.output_dropout_prob)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | PrefixLMLayout | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        input_shape = hidden_states.shape[:-1]
        mixed = self.query_key_value(hidden_states).view(*input_shape, 3, -1, self.head_dim)
        query_states, key_states, value_states = (states.transpose(1, 2) for states in mixed.unbind(-3))

        if cache is not None:
            key_states, value_states = cache.update(key_states, value_states, self.layer_idx, kwargs=kwargs)

        backend = self.config._attn_implementation
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(backend, eager_attention_forward)
        attn_output, attn_weights = prefix_lm_attention(backend, attention_interface)(
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
        return self.output_dropout(self.dense(attn_output)), attn_weights


class MLP(nn.Module):
    def __init__(self, config: GLMConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.dense_4h_to_h = nn.Linear(4 * config.hidden_size, config.hidden_size)
        self.dense_4h_to_h.adds_to_residual = True  # type: ignore[assignment]
        self.act_fn = ACT2FN["gelu"]
        self.dropout = nn.Dropout(config.output_dropout_prob)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.dropout(self.dense_4h_to_h(self.act_fn(self.dense_h_to_4h(hidden_states))))


class GLMBlock(GradientCheckpointingLayer):
    def __init__(self, config: GLMConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = SelfAttention(config, layer_idx)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | PrefixLMLayout | None = None,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        residual = hidden_states
        hidden_states, _ = self.attention(
            self.input_layernorm(hidden_states), attention_mask=attention_mask, cache=cache, **kwargs
        )
        hidden_states = residual + hidden_states

        residual = hidden_states
        return residual + self.mlp(self.post_attention_layernorm(hidden_states))


class GLMStack(nn.Module):
    """The tables of positions, the layers and the final norm, under the original's name in the state dict."""

    def __init__(self, config: GLMConfig):
        super().__init__()
        self.position_embeddings = nn.Embedding(config.max_sequence_length + 1, config.hidden_size)
        if config.block_position_encoding:
            self.block_position_embeddings = nn.Embedding(config.max_sequence_length + 1, config.hidden_size)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout_prob)
        self.layers = nn.ModuleList([GLMBlock(config, layer_idx) for layer_idx in range(config.num_layers)])
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)

    def embed_positions(self, position_ids: torch.Tensor) -> torch.Tensor:
        """(batch, rows, length) -> (batch, length, hidden_size)."""
        hidden_states = self.position_embeddings(position_ids[:, 0])
        if position_ids.shape[1] == 2:
            hidden_states = hidden_states + self.block_position_embeddings(position_ids[:, 1])
        return hidden_states


class GLMPreTrainedModel(CheckpointLoadingMixin, PreTrainedModel):
    config: GLMConfig
    config_class = GLMConfig
    base_model_prefix = "glm"
    supports_gradient_checkpointing = True
    _no_split_modules = ["GLMBlock"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _can_compile_fullgraph = True
    # Attention functions from outside know no prefix and would be causal.
    _supports_attention_backend = False
    _can_record_outputs = {"hidden_states": GLMBlock, "attentions": SelfAttention}

    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, nn.Linear) and getattr(module, "adds_to_residual", False):
            # As in Megatron-LM: what is added 2 · num_layers times starts that much smaller.
            std = self.config.initializer_range / (2 * self.config.num_layers) ** 0.5
            init.normal_(module.weight, mean=0.0, std=std)  # type: ignore[arg-type]


class GLMModel(GLMPreTrainedModel):
    """The backbone. Unlike the original's it gives no logits; those are [`GLMForConditionalGeneration`]'s."""

    output_predict = False
    _input_embed_layer = "word_embeddings"
    # The packed projection's rows q | k | v are not whole heads of each: its shards are gathered.
    _tp_plan = {
        "word_embeddings": "embedding_rowwise",
        "transformer.layers.*.attention.query_key_value": "colwise_gather_output",
        "transformer.layers.*.attention.dense": "rowwise_split_input",
        "transformer.layers.*.mlp.dense_h_to_4h": "colwise",
        "transformer.layers.*.mlp.dense_4h_to_h": "rowwise",
    }
    _pp_plan = {  # type: ignore[assignment]  # as Llama has it
        "word_embeddings": (["input_ids"], ["inputs_embeds"]),
        "transformer.layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "transformer.final_layernorm": (["hidden_states"], ["hidden_states"]),
    }
    _fsdp_plan = {
        "word_embeddings": "free_full_weight",
        "transformer.layers.*": "free_full_weight",
        "transformer.final_layernorm": "keep_full_weight",
    }

    def __init__(self, config: GLMConfig):
        super().__init__(config)
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.transformer = GLMStack(config)
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
            input_ids: (batch, length): a text with blanks, and behind it the spans that fill them, each of which begins
                with `<|startofpiece|>`.
            attention_mask: what is to be seen, in one of four forms:

                * None: all is causal, as in the original;
                * (batch,) or a single number: length of the context, which sees all of itself; the rest is causal;
                * (batch, past + length), 1 for tokens and 0 for padding, or equal numbers from 1 for the tokens of one
                  packed text: the context is what has block position 0, or, without `position_ids`, what stands in front
                  of `<|startofpiece|>`;
                * (batch or 1, 1, length, past + length), 0/1 or bool, 1 where a query sees a key.
            position_ids: (batch, 2, length), positions and block positions. If not given: with a 2-D `attention_mask`
                they are worked out from `input_ids`, else they count from the cache's length, with block position 0.

        Returns:
            `hidden_states`, if asked for, are the embeddings (positions included) and each layer's output, the last one
            after the final norm.

        Raises:
            ValueError: a text is longer than the table of positions; `attention_mask` or `position_ids` have the wrong
                form; positions cannot be worked out.
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
            has_blocks=self.config.block_position_encoding,
        )
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)

        # Without a 2-D mask all but a given context is causal, except that `generate` drops a mask of ones.
        is_text = POSITIONS in kwargs or (attention_mask is not None and attention_mask.ndim == 2)
        position_ids, context = positions_and_context(
            self.config, input_ids, attention_mask, position_ids, inputs_embeds, cache, kwargs, is_text
        )
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim != 2:
            attention_mask, context = self._read_mask(attention_mask, inputs_embeds, cache)
        mask = create_prefix_lm_mask(self.config, inputs_embeds, attention_mask, cache, context)
        self._check_positions(position_ids)

        hidden_states = inputs_embeds + self.transformer.embed_positions(position_ids)
        hidden_states = self.transformer.embedding_dropout(hidden_states)
        for layer in self.transformer.layers[: self.config.num_layers]:
            hidden_states = layer(hidden_states, attention_mask=mask, cache=cache, use_cache=use_cache, **kwargs)

        hidden_states = self.transformer.final_layernorm(hidden_states)
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, cache=cache)

    def _read_mask(
        self, attention_mask: torch.Tensor, inputs_embeds: torch.Tensor, cache: Cache | None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """From the forms that are not 2-D: the 4-D mask, or which tokens are context, (batch, length)."""
        batch, length = inputs_embeds.shape[:2]
        if attention_mask.ndim <= 1 and attention_mask.numel() in (1, batch):
            past = cached_length(cache)  # behind which only new tokens count: the context may be longer than they are
            largest_number(attention_mask, length + past if isinstance(past, int) else self.config.max_sequence_length)
            context = torch.arange(length, device=inputs_embeds.device) < attention_mask.reshape(-1, 1)
            return None, context.expand(batch, -1)
        if attention_mask.ndim == 4:
            if attention_mask.is_floating_point() and (attention_mask < 0).any():
                raise ValueError(
                    "a 4-D `attention_mask` must be 0/1 or bool here, 1 where a query sees a key; not additive"
                )
            largest_number(attention_mask, 1)
            return attention_mask != 0, None
        raise ValueError(
            f"`attention_mask` has shape {tuple(attention_mask.shape)}, but must be (batch,) context lengths, (batch, "
            "length) 1 for tokens and 0 for padding, or (batch, 1, length, length)"
        )

    def _check_positions(self, position_ids: torch.Tensor) -> None:
        if not is_readable(position_ids):
            return
        smallest, last = (int(value) for value in position_ids.aminmax())
        if smallest < 0:
            raise ValueError(f"`position_ids` holds {smallest}, but positions count from 0.")
        if last > self.config.max_sequence_length:
            raise ValueError(
                f"the text is too long: it has position {last}, but the learned positions end at `max_sequence_length` = "
                f"{self.config.max_sequence_length}. Shorten the text or the generation."
            )


class GLMForConditionalGeneration(WithoutChats, PrefixLanguageModel, GLMPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "glm.word_embeddings.weight"}

    def __init__(self, config: GLMConfig):
        super().__init__(config)
        self.glm = GLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"  # not shifted: `<|startofpiece|>` predicts the span's first token
        self.post_init()


class GLMForMultipleChoice(MultipleChoiceScoring, GLMPreTrainedModel):
    """Scores each choice by the log-probability of its tokens in the blank."""

    _tied_weights_keys = {"lm_head.weight": "glm.word_embeddings.weight"}

    def __init__(self, config: GLMConfig):
        super().__init__(config)
        self.glm = GLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["GLMForConditionalGeneration", "GLMForMultipleChoice", "GLMModel", "GLMPreTrainedModel"]
