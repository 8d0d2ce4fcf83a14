"""Baichuan configuration: 7B and 13B of both generations under the one model type `baichuan`."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..._compat import RopeParameters
from ...loss.causal_lm import DEFAULT_CHUNK_SIZE
from ..adapter_targets import AdapterTargets
from ..config_mixin import CheckpointConfigMixin

DEFAULT_VOCAB_SIZE = 125_696
NORM_HEAD_BY_VOCAB_SIZE = {64_000: False, 125_696: True}  # Baichuan, Baichuan2
BAICHUAN2_TOKENIZER = "BaichuanTokenizer"  # `tokenizer_class` of Baichuan2's config.json; Baichuan's has none


def has_norm_head(config: Mapping[str, Any]) -> bool:
    """Whether a model is of Baichuan2's kind, by the keys of its `config.json`."""
    if config.get("norm_head") is not None:
        return bool(config["norm_head"])
    has_tokenizer_class = config.get("tokenizer_class") is not None
    return NORM_HEAD_BY_VOCAB_SIZE.get(config.get("vocab_size", DEFAULT_VOCAB_SIZE), has_tokenizer_class)


@strict
class BaichuanConfig(CheckpointConfigMixin, PreTrainedConfig):
    r"""Configuration of [`BaichuanModel`].

    The four published architectures share one `model_type`. Which of them a checkpoint holds is read once from its own
    `config.json` and kept in two explicit fields, which `save_pretrained` writes:

    | checkpoint | `position_embedding` | `norm_head` |
    |---|---|---|
    | Baichuan-7B | `"rope"` | `False` |
    | Baichuan-13B | `"alibi"` | `False` |
    | Baichuan2-7B | `"rope"` | `True` |
    | Baichuan2-13B | `"alibi"` | `True` |

    Args:
        vocab_size: number of token embeddings, 64,000 in Baichuan and 125,696 in Baichuan2.
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads: the Transformer's shape.
        hidden_act: activation of the gated feed-forward layers.
        max_position_embeddings: trained length in tokens of a RoPE model. Its presence in a checkpoint says RoPE.
        model_max_length: trained length in tokens of an ALiBi model; longer inputs work.
        position_embedding: `"rope"` or `"alibi"`; default: from the two lengths above.
        norm_head: whether the output head normalizes its rows (NormHead, Baichuan 2 report, section 2.4); default:
            from `vocab_size`, and for other sizes from `tokenizer_class`, which only Baichuan2's files carry; another
            class there is an error.
        z_loss_weight: weight of the max-z loss (Baichuan 2 report, equation 2; the report trains with 2e-4). 0 is off.
        loss_chunk_size: tokens per chunk of the training loss, which then never holds all logits; None computes them.
        rope_parameters: transformers' RoPE parameters; unused with ALiBi.
        initializer_range, rms_norm_eps, use_cache, pad_token_id, bos_token_id, eos_token_id, tie_word_embeddings:
            as in transformers' `LlamaConfig`.

    Raises:
        ValueError: the position embedding cannot be decided or is unknown, or a size does not fit; the message names
            the field.

    Example:
        >>> from hf_cnllm import BaichuanConfig
        >>> BaichuanConfig(vocab_size=64000, model_max_length=4096).position_embedding
        'alibi'
    """

    model_type = "baichuan"
    adapter_targets = AdapterTargets(
        ("W_pack",), ("down_proj",), norms=("input_layernorm", "post_attention_layernorm", "norm")
    )
    own_tokenizer = "BaichuanTokenizer"
    own_vocabularies = ("tokenizer.model", "tokenizer.json")
    own_settings = ("add_bos_token",)  # texts begin with <s> unless a checkpoint says no, which all published ones do
    # W_pack holds q | k | v, so its column shards are not whole heads of each: it is gathered after the projection, and cut
    # again before the next.
    base_model_tp_plan = {
        "embed_tokens": "embedding_rowwise",
        "layers.*.self_attn.W_pack": "colwise_gather_output",
        "layers.*.self_attn.o_proj": "rowwise_split_input",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }
    base_model_pp_plan = {
        "embed_tokens": (["input_ids"], ["inputs_embeds"]),
        "layers": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "norm": (["hidden_states"], ["hidden_states"]),
    }
    base_model_fsdp_plan = {
        "embed_tokens": "free_full_weight",
        "layers.*": "free_full_weight",
        "norm": "keep_full_weight",
    }

    vocab_size: int = DEFAULT_VOCAB_SIZE
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int | None = None
    model_max_length: int | None = None
    position_embedding: Literal["rope", "alibi"] | None = None
    norm_head: bool | None = None
    z_loss_weight: float | int = 0.0
    loss_chunk_size: int | None = DEFAULT_CHUNK_SIZE
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False
    rope_parameters: RopeParameters | dict | None = None

    def __post_init__(self, **kwargs):
        alibi = self.max_position_embeddings is None and self.model_max_length is not None
        self.set_missing({"position_embedding": "alibi" if alibi else "rope"})
        trained_length = {"rope": "max_position_embeddings", "alibi": "model_max_length"}[self.position_embedding]
        self.set_missing({trained_length: self.max_position_embeddings or self.model_max_length or 4096})
        if self.norm_head is None:
            tokenizer_class = kwargs.get("tokenizer_class")
            if self.vocab_size not in NORM_HEAD_BY_VOCAB_SIZE and tokenizer_class not in (None, BAICHUAN2_TOKENIZER):
                raise ValueError(
                    f"Neither `vocab_size` ({self.vocab_size}) nor `tokenizer_class` ({tokenizer_class!r}) is one of "
                    "Baichuan's or Baichuan2's, so nothing says whether the output head normalizes its rows. Set "
                    "`norm_head` to True (Baichuan2) or False (Baichuan)."
                )
            self.norm_head = has_norm_head({**kwargs, "vocab_size": self.vocab_size})
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        deciding_fields = ("position_embedding", "max_position_embeddings", "model_max_length")
        if all(config_dict.get(field) is None and kwargs.get(field) is None for field in deciding_fields):
            raise ValueError(
                "This config.json does not say whether the model uses RoPE (it would have `max_position_embeddings`) "
                "or ALiBi (it would have `model_max_length`). Set `position_embedding` to 'rope' or 'alibi'."
            )
        return super().from_dict(config_dict, **kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation: every message names the field to change."""
        self.check_sizes("model_max_length")
        self.check_whole_heads()
        head_dim = self.hidden_size // self.num_attention_heads
        if self.position_embedding == "rope" and head_dim % 2 != 0:
            raise ValueError(
                f"RoPE rotates pairs, so `hidden_size // num_attention_heads` must be even, got {head_dim}."
            )
        if not 0 <= self.z_loss_weight < math.inf:
            raise ValueError(f"`z_loss_weight` must not be negative and must be finite, got {self.z_loss_weight}.")
