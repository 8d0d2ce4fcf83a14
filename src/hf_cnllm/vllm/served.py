"""What of the families vLLM serves, by their configurations. Nothing here needs vLLM."""

from collections.abc import Callable
from typing import Any

from transformers import PreTrainedConfig

from ..models.baichuan import BaichuanConfig
from ..models.chatglm import ChatGLMConfig, ChatGLMTokenizer
from ..models.chatglm.chat import end_ids
from ..models.glm import GLMConfig
from ..models.glm130b import GLM130BConfig
from ..models.qwen import QWenConfig, QWenTokenizer
from ..models.qwen.chat import get_stop_words_ids

PREFIX_LM = "is a prefix language model: its prompt sees itself in both directions, which vLLM has for images only"
TIED = (lambda c: c.tie_word_embeddings, "`tie_word_embeddings` must be false there")

# For each family: what a configuration may say that is not served -> why.
REFUSALS: dict[type[PreTrainedConfig], tuple[tuple[Callable[[Any], Any], str], ...]] = {
    BaichuanConfig: (TIED, (lambda c: c.hidden_act != "silu", "`hidden_act` must be 'silu' there")),
    QWenConfig: (TIED, (lambda c: c.rotary_dim % 2, "`rotary_pct` must give an even number of dimensions there")),
    ChatGLMConfig: (
        (lambda c: c.architecture == "chatglm", f"ChatGLM-6B {PREFIX_LM}"),
        (lambda c: c.pre_seq_len, "a P-tuning prefix (`pre_seq_len`) has no place in its cache"),
        (lambda c: not c.multi_query_attention, "`multi_query_attention` must be true there"),
        (
            lambda c: not (c.rmsnorm and c.post_layer_norm) or c.apply_residual_connection_post_layernorm,
            "`rmsnorm` and `post_layer_norm` must be true there, and `apply_residual_connection_post_layernorm` false, as in "
            "all published checkpoints",
        ),
        TIED,
    ),
    GLMConfig: ((lambda c: True, f"GLM {PREFIX_LM}"),),
    GLM130BConfig: ((lambda c: True, f"GLM-130B {PREFIX_LM}"),),
}


def check_served(config: PreTrainedConfig) -> None:
    """Refuses what vLLM cannot serve.

    Raises:
        ValueError: saying why, and what to use instead.
    """
    for config_class, refusals in REFUSALS.items():
        if isinstance(config, config_class):
            for applies, reason in refusals:
                if applies(config):
                    raise ValueError(f"vLLM cannot serve this checkpoint: {reason}. Use transformers' `generate`.")


def needs_ntk(config: QWenConfig, max_model_len: int) -> bool:
    """Whether a prompt of at most `max_model_len` tokens may be longer than the trained length, and gets an NTK factor then."""
    return bool(config.use_dynamic_ntk) and max_model_len > config.seq_length


def longest(config: PreTrainedConfig) -> tuple[int, str]:
    """The number of tokens that a model is meant for, prompt and answer together, and the field that says so."""
    field = "max_position_embeddings"
    if isinstance(config, BaichuanConfig) and config.position_embedding == "alibi":
        field = "model_max_length"
    if isinstance(config, QWenConfig) and config.seq_length and not config.use_dynamic_ntk:
        field = "seq_length"
    return getattr(config, field), field


def stop_ids(tokenizer: Any) -> list[int]:
    """The ids that end an answer in the family's chats, which its published configurations do not all name."""
    if isinstance(tokenizer, ChatGLMTokenizer):
        return end_ids(tokenizer)
    if isinstance(tokenizer, QWenTokenizer):
        return [ids[0] for ids in get_stop_words_ids("chatml", tokenizer)]
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
