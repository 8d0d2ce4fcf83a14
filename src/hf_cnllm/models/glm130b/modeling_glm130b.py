"""GLM-130B (arXiv 2210.02414): GLM's prefix language model with rotary positions, DeepNorm and a gated MLP.

ChatGLM-6B descends from it, and its layers stand in `modeling_chatglm.py`. Here are the differences: 1-D rotary positions
over whole heads, a residual scale that knows the number of layers, GeGLU, dropout, and a head that is the embedding. The
configuration has all that those layers read, which no type says.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import GenerationMixin

from ..._compat import CACHE, CACHE_NAMES
from ..chatglm import modeling_chatglm as chatglm
from ..glm_line.heads import MultipleChoiceScoring, PrefixLanguageModel
from ..old_names import FromConfig, WithoutChats
from ..row_parallel import row_parallel
from .configuration_glm130b import GLM130BConfig

# The mark of a cache whose rows were padded on the right.
TURNED = "padding_was_turned"


class RotaryEmbedding(chatglm.RotaryEmbedding):
    """ChatGLM-6B's over the whole head, but for half precision: there the original's angles are half precision too. Its
    weights were trained with them; at position 2,000 some are half a radian off."""

    def angles(self, position_ids: torch.Tensor, inv_freq: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        angles = super().angles(position_ids, inv_freq, dtype)
        return angles.half().float() if dtype == torch.float16 else angles


def attention_of_matrices(
    module: "SelfAttention",
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | BlockMask | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention with the original's roundings in half precision: queries are divided by layer + 1, scores are rounded, and
    softmax, of scores times layer + 1, is single precision.

    Fused kernels do not round scores. Their results are as far from the original's as its own are from single precision.
    """
    coefficient = module.layer_idx + 1
    scores = torch.matmul(query / (coefficient / scaling), key.transpose(2, 3)).float() * coefficient
    if isinstance(attention_mask, BlockMask):
        attention_mask = create_mask(attention_mask.mask_mod, *attention_mask.shape, device=query.device)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(query.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    weights = F.dropout(scores.softmax(dim=-1).to(query.dtype), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), weights


class SelfAttention(chatglm.SelfAttention):
    def __init__(self, config: GLM130BConfig, layer_idx: int):
        super().__init__(config, layer_idx)  # type: ignore[arg-type]
        row_parallel(self.dense)
        self.attention_dropout = config.attention_dropout
        self.output_dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, *args, **kwargs):
        attn_output, attn_weights = super().forward(*args, **kwargs)
        return self.output_dropout(attn_output), attn_weights

    def attention_function(self, query_states: torch.Tensor, attention_mask: Any) -> Callable:
        """In half precision the original's, where scores may as well be a matrix: by eager, with a mask that is one, and on a
        CPU, where the linear layers take the time, by flex attention and in decoding."""
        is_matrix = isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 4  # flash attention's has 2
        has_matrix = is_matrix or self.config._attn_implementation == "eager"
        if query_states.device.type == "cpu":
            is_decoding = attention_mask is None and query_states.shape[2] == 1
            has_matrix |= isinstance(attention_mask, BlockMask) or is_decoding
        if query_states.dtype == torch.float16 and has_matrix:
            return attention_of_matrices
        return super().attention_function(query_states, attention_mask)


class GEGLU(nn.Module):
    """The MLP: dense_h_to_4h gives [a | b], of which a · gelu(b) goes on."""

    def __init__(self, config: GLM130BConfig):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.inner_hidden_size)
        self.dense_4h_to_h = row_parallel(nn.Linear(config.inner_hidden_size, config.hidden_size))
        self.dropout = nn.Dropout(config.hidden_dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        up, gate = self.dense_h_to_4h(hidden_states).chunk(2, dim=-1)
        return self.dropout(self.dense_4h_to_h(up * F.gelu(gate)))


class GLMBlock(chatglm.GLMBlock):
    attention_class = SelfAttention
    mlp_class = GEGLU

    def __init__(self, config: GLM130BConfig, layer_idx: int):
        super().__init__(config, layer_idx)  # type: ignore[arg-type]
        self.residual_scale = (2 * config.num_layers) ** 0.5  # DeepNorm's α


class GLM130BPreTrainedModel(chatglm.ChatGLMPreTrainedModel):
    config: GLM130BConfig  # type: ignore[assignment]
    config_class = GLM130BConfig  # type: ignore[assignment]
    _can_record_outputs = {"hidden_states": GLMBlock, "attentions": SelfAttention}


class GLM130BModel(GLM130BPreTrainedModel, chatglm.ChatGLMModel):
    """The backbone: see [`ChatGLMModel`] of ChatGLM-6B, with one row of `position_ids`, (batch, length), which
    parts packed texts where it has as many zeros as there are start tokens."""

    layer_class = GLMBlock
    rotary_class = RotaryEmbedding
    # The halves of dense_h_to_4h belong together: its shards are gathered.
    _tp_plan = chatglm.ChatGLMModel._tp_plan | {
        "layers.*.mlp.dense_h_to_4h": "colwise_gather_output",
        "layers.*.mlp.dense_4h_to_h": "rowwise_split_input",
    }

    def __init__(self, config: GLM130BConfig, empty_init: bool | None = None, device=None):
        super().__init__(config, empty_init, device)  # type: ignore[arg-type]
        self.embedding_dropout = config.hidden_dropout


class GLM130BForConditionalGeneration(WithoutChats, PrefixLanguageModel, GLM130BPreTrainedModel, GenerationMixin):
    max_sequence_length = FromConfig()
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: GLM130BConfig, empty_init: bool | None = None, device=None):
        super().__init__(config, empty_init, device)  # type: ignore[arg-type]
        self.transformer = GLM130BModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"  # not shifted: `sop` predicts the blank's first token
        self.post_init()
        if isinstance(config.eos_token_id, int) and config.text_end_token_id is not None:
            self.generation_config.eos_token_id = [config.eos_token_id, config.text_end_token_id]

    def generate(self, inputs=None, *args, **kwargs):
        """As in transformers. Rows that are padded on the right, as the original pads them, are computed padded on the
        left; what is returned has the tokens behind the pads.

        Raises:
            ValueError: rows padded on the right go on with a cache, whose columns are others.
        """
        input_ids, mask = kwargs.get("input_ids", inputs), kwargs.get("attention_mask")
        turn = None if input_ids is None else turn_to_the_left(input_ids, mask)
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        if cache is not None and int(cache.get_seq_length()) and (turn is not None or hasattr(cache, TURNED)):
            raise ValueError("to go on with a cache, pad on the left: rows padded on the right are computed so.")
        if turn is None or kwargs.get("position_ids") is not None or kwargs.get("inputs_embeds") is not None:
            return super().generate(inputs, *args, **kwargs)  # type: ignore[misc]
        kwargs |= {"input_ids": input_ids.gather(1, turn), "attention_mask": mask.gather(1, turn)}
        output = super().generate(None, *args, **kwargs)  # type: ignore[misc]
        sequences = output if isinstance(output, torch.Tensor) else output.sequences
        rows = input_ids.repeat_interleave(len(sequences) // len(input_ids), dim=0)
        sequences[:, : rows.shape[1]] = rows
        if (cache := getattr(output, CACHE, cache)) is not None:
            setattr(cache, TURNED, True)
        return output


def turn_to_the_left(input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
    """Where each token of a batch [batch, length] comes from when all padding at the end goes to the front; None if there is
    none, or nothing tells."""
    if attention_mask is None or attention_mask.shape != input_ids.shape or bool((attention_mask[:, -1] != 0).all()):
        return None
    length = input_ids.shape[1]
    index = torch.arange(length, device=input_ids.device)
    end = ((attention_mask != 0) * (index + 1)).amax(dim=1, keepdim=True)  # of the tokens
    return (index + end) % length


class GLM130BForMultipleChoice(MultipleChoiceScoring, GLM130BPreTrainedModel):
    """Scores each choice by the log-probability of its tokens in the blank."""

    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}

    def __init__(self, config: GLM130BConfig, empty_init: bool | None = None, device=None):
        super().__init__(config, empty_init, device)  # type: ignore[arg-type]
        self.transformer = GLM130BModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


__all__ = ["GLM130BForConditionalGeneration", "GLM130BForMultipleChoice", "GLM130BModel", "GLM130BPreTrainedModel"]
