"""ChatGLM configurations: the Hub's `model_type` "chatglm" names two architectures, each with a configuration here.

* `"chatglm"`: ChatGLM-6B (v1), a prefix language model with 2-D rotary positions, in `modeling_chatglm.py`;
* `"chatglm2"`: ChatGLM2, ChatGLM3 and what shares their code, a causal model with multi-query attention and partial
  rotary positions, in `modeling_chatglm2.py`.
"""

import re
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ...loss.causal_lm import DEFAULT_CHUNK_SIZE
from ..adapter_targets import AdapterTargets
from ..config_mixin import CheckpointConfigMixin

# Keys that only one of the two originals has: what an unlabeled checkpoint is recognized by.
DECISIVE_KEYS = {
    "chatglm": ("position_encoding_2d", "inner_hidden_size"),
    "chatglm2": ("ffn_hidden_size", "multi_query_attention", "kv_channels"),
}
HOW_TO_CHOOSE = 'Set `architecture` to "chatglm" (ChatGLM-6B) or "chatglm2" (ChatGLM2, ChatGLM3).'

# ChatGLM-6B of March 2023 kept 20,000 image tokens in front of the text vocabulary.
EARLY_VOCAB_SIZE, LATE_VOCAB_SIZE = 150528, 130528
FIRST_CONTROL_ID = {EARLY_VOCAB_SIZE: 150000, LATE_VOCAB_SIZE: 130000}
CONTROL_TOKENS = {"mask_token_id": 0, "gmask_token_id": 1, "smask_token_id": 2, "bos_token_id": 4, "eos_token_id": 5}

# What the sizes that other libraries read follow from.
SIZES_FOLLOW_FROM = (
    "hidden_size",
    "num_attention_heads",
    "kv_channels",
    "multi_query_attention",
    "multi_query_group_num",
)
SIZES = ("head_dim", "num_key_value_heads")


class _Follows:
    """A size that follows from other fields: setting it to another value is refused."""

    def __set_name__(self, owner: type, name: str):
        self.name = name

    def __get__(self, config: Any, owner: type) -> Any:
        return self if config is None else config.sizes_that_follow()[self.name]

    def __set__(self, config: Any, value: int | None):
        size = self.__get__(config, type(config))
        if value not in (None, size):
            raise ValueError(
                f"`{self.name}` ({value}) contradicts what it follows from ({size}): set "
                f"{' or '.join(f'`{name}`' for name in SIZES_FOLLOW_FROM if hasattr(config, name))}"
            )


@strict
class ChatGLMConfig(CheckpointConfigMixin, PreTrainedConfig):
    r"""
    What both architectures have. Made from keywords, from a dictionary or from a checkpoint, it is a
    [`ChatGLM1Config`] or a [`ChatGLM2Config`]. Fields are the originals'; those marked (ours) are not.

    Args:
        architecture (`"chatglm"` or `"chatglm2"`, *optional*): (ours)
            Which of the two this is. Left out, it is decided from the other keys (`DECISIVE_KEYS`); without any of them
            a checkpoint is an error, and a configuration made from nothing is `"chatglm2"`. It is saved.
        vocab_size (`int`):
            Rows of the embedding. ChatGLM2/3 call it `padded_vocab_size`; both names work and both are saved.
        pre_seq_len, prefix_projection (`int`, *optional*, and `bool`):
            P-tuning v2: number of learned prefix positions, and whether an MLP produces them.
        prefix_dropout (`float`): (ours)
            Dropout on the learned prefix in training.
        quantization_bit (`int`):
            8 or 4: the linear weights of the layers are stored as integers with one scale per row. 0: they are not.
        loss_chunk_size (`int`, *optional*): (ours)
            Tokens per chunk of the training loss, which then never holds all logits; None computes them.
        head_dim, num_key_value_heads (`int`): (ours)
            What follows from the other fields, by the names that other libraries read.

    Raises:
        ValueError: the keys fit neither architecture or both, or contradict each other; the message names the field.
    """

    model_type = "chatglm"
    adapter_targets = AdapterTargets(
        ("query_key_value",),
        ("dense_4h_to_h",),
        norms=("input_layernorm", "post_attention_layernorm", "final_layernorm"),
    )
    own_tokenizer = "ChatGLMTokenizer"
    attribute_map = {"num_hidden_layers": "num_layers", "padded_vocab_size": "vocab_size"}

    # Fields of one architecture that are asked of both.
    early_positions: ClassVar[bool | None] = None
    quantization_embeddings: ClassVar[bool] = False
    classifier_dropout: ClassVar[float | int | None] = None

    architecture: Literal["chatglm", "chatglm2"] | None = None
    vocab_size: int = 65024
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    layernorm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    prefix_dropout: float = 0.0
    quantization_bit: int = 0
    loss_chunk_size: int | None = DEFAULT_CHUNK_SIZE
    head_dim, num_key_value_heads = _Follows(), _Follows()

    def __new__(cls, *args, **kwargs):
        # A configuration is often made from keywords alone, which say which one only now.
        return super().__new__(_recognize(kwargs, default="chatglm2") if cls is ChatGLMConfig else cls)

    def __post_init__(self, **kwargs):
        self.architecture = next(name for name, config in ARCHITECTURES.items() if isinstance(self, config))
        if (padded_vocab_size := kwargs.pop("padded_vocab_size", None)) is not None:
            self.vocab_size = padded_vocab_size
        if self.quantization_bit and kwargs.get("quantization_config") is None:
            kwargs["quantization_config"] = {
                "quant_method": "chatglm",
                "bits": self.quantization_bit,
                "quantize_embeddings": bool(self.quantization_embeddings),
            }
        super().__post_init__(**kwargs)

    def sizes_that_follow(self) -> dict[str, int]:
        """`SIZES`, from the fields that say them."""
        raise NotImplementedError

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | self.sizes_that_follow()

    def validate_architecture(self):
        """Part of `@strict`-powered validation: the sizes that must be positive and fit together."""
        self.check_sizes("pre_seq_len")
        if self.quantization_bit not in (0, 4, 8):
            raise ValueError(f"`quantization_bit` must be 0, 4 or 8, but is {self.quantization_bit}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        config_class = cls
        if config_dict.get("model_type") in (None, cls.model_type):
            config_class = _recognize(config_dict | kwargs)
            if not kwargs.keys().isdisjoint(SIZES_FOLLOW_FROM):  # what a saved file says of them gives way
                config_dict = {k: v for k, v in config_dict.items() if k in kwargs or k not in SIZES}
        return super(ChatGLMConfig, config_class).from_dict(config_dict, **kwargs)


@strict
class ChatGLM1Config(ChatGLMConfig):
    r"""
    Configuration of ChatGLM-6B: [`ChatGLMConfig`], and

    Args:
        tie_word_embeddings (`bool`):
            Whether the output head is the embedding. The checkpoint's `config.json` does not say so, but its code ran
            where that was the default. A file with two different matrices loads untied.
        inner_hidden_size, max_sequence_length, position_encoding_2d, quantization_embeddings:
            Width of the MLP; trained length; 2-D or plain positions; whether the word embeddings are quantized too (and
            then serve as the output projection).
        mask_token_id, gmask_token_id, smask_token_id (`int`, *optional*):
            Ids of `[MASK]`, `[gMASK]` and (ours) `[sMASK]`. Left out, they are known for the two published vocabulary
            sizes, as bos and eos are.
        early_positions (`bool`, *optional*): (ours)
            The 150,528-token revision, which gives bos another position than the later ones. Left out, it is true for
            that vocabulary size, and for an unusual size without a `pad_token_id`.
    """

    attribute_map = ChatGLMConfig.attribute_map | {
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        # by GLM's names
        "block_position_encoding": "position_encoding_2d",
        "sop_token_id": "bos_token_id",
    }
    has_kinds_of_blanks: ClassVar[bool] = True
    kinds_of_blanks: ClassVar[tuple[str, ...]] = ("gmask_token_id", "mask_token_id", "smask_token_id")

    vocab_size: int = LATE_VOCAB_SIZE
    tie_word_embeddings: bool = True
    inner_hidden_size: int = 16384
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    quantization_embeddings: bool = False
    mask_token_id: int | None = None
    gmask_token_id: int | None = None
    smask_token_id: int | None = None
    early_positions: bool | None = None

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        is_unusual = self.vocab_size not in (EARLY_VOCAB_SIZE, LATE_VOCAB_SIZE) and self.pad_token_id is None
        self.set_missing({"early_positions": self.vocab_size == EARLY_VOCAB_SIZE or is_unusual})
        if (first_id := FIRST_CONTROL_ID.get(self.vocab_size)) is not None:
            self.set_missing({field: first_id + offset for field, offset in CONTROL_TOKENS.items()})

    def sizes_that_follow(self):
        head_dim = self.hidden_size // (self.num_attention_heads or 1)
        return {"head_dim": head_dim, "num_key_value_heads": self.num_attention_heads}

    def validate_architecture(self):
        super().validate_architecture()
        self.check_whole_heads()


@strict
class ChatGLM2Config(ChatGLMConfig):
    r"""
    Configuration of ChatGLM2 and ChatGLM3: [`ChatGLMConfig`], and

    Args:
        ffn_hidden_size, seq_length, kv_channels: Width of the MLP; trained length; channels of a head.
        multi_query_attention, multi_query_group_num: Whether there are fewer key/value heads than heads, and how many.
        add_bias_linear, add_qkv_bias: Biases.
        rmsnorm, post_layer_norm, apply_residual_connection_post_layernorm: Norms.
        hidden_dropout, attention_dropout, classifier_dropout: Dropouts.
        rope_ratio, rope_ratio_type (`"base"` or `"linear"`, *optional*, ours):
            How far the rotary positions are stretched in the long-context checkpoints, and how: `"base"` multiplies the
            rotary base (ChatGLM3 and later), `"linear"` divides the positions (chatglm2-6b-32k). `config.json` tells
            them apart by its `_name_or_path` only; left out, it is `"linear"` if that (or else the path it is loaded
            from) names chatglm2, and chatglm3 not behind it, and `"base"` otherwise.
        original_rope, apply_query_key_layer_scaling, attention_softmax_in_fp32: Kept; they change nothing here.
        bias_dropout_fusion, fp32_residual_connection: Likewise.
    """

    attribute_map = ChatGLMConfig.attribute_map | {
        "intermediate_size": "ffn_hidden_size",
        "max_position_embeddings": "seq_length",
    }

    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    seq_length: int = 2048
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    classifier_dropout: float | int | None = None
    rmsnorm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    post_layer_norm: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    multi_query_attention: bool = False
    multi_query_group_num: int = 1
    rope_ratio: int | float = 1
    rope_ratio_type: Literal["base", "linear"] | None = None
    original_rope: bool = True
    apply_query_key_layer_scaling: bool = True
    attention_softmax_in_fp32: bool = True
    bias_dropout_fusion: bool = True
    fp32_residual_connection: bool = False

    def __post_init__(self, **kwargs):
        name = kwargs.get("_name_or_path") or kwargs.get("name_or_path") or ""
        named = re.findall("chatglm[23]", str(name).lower())  # the last: folders in front are named after anything
        self.set_missing({"rope_ratio_type": "linear" if named[-1:] == ["chatglm2"] else "base"})
        super().__post_init__(**kwargs)

    def sizes_that_follow(self):
        heads = self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads
        return {"head_dim": self.kv_channels, "num_key_value_heads": heads}

    def validate_architecture(self):
        super().validate_architecture()
        self.check_sizes("kv_channels", "multi_query_group_num", "rope_ratio")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) is not a multiple of `multi_query_group_num` "
                f"({self.multi_query_group_num})"
            )

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"padded_vocab_size": self.vocab_size}


ARCHITECTURES: dict[str, type[ChatGLMConfig]] = {"chatglm": ChatGLM1Config, "chatglm2": ChatGLM2Config}


def _recognize(values: dict[str, Any], default: str | None = None) -> type[ChatGLMConfig]:
    """The configuration class for these values, by their `architecture` or else by their decisive keys."""
    if (architecture := values.get("architecture")) is None:
        seen = {name: [key for key in keys if values.get(key) is not None] for name, keys in DECISIVE_KEYS.items()}
        if all(seen.values()):
            raise ValueError(
                f"this configuration mixes keys of ChatGLM-6B ({', '.join(seen['chatglm'])}) and of ChatGLM2/3 "
                f"({', '.join(seen['chatglm2'])}). {HOW_TO_CHOOSE}"
            )
        architecture = next((name for name, keys in seen.items() if keys), default)
    if architecture is None:
        raise ValueError(
            f"this config.json has none of the keys that tell ChatGLM-6B from ChatGLM2/3 "
            f"({', '.join(key for keys in DECISIVE_KEYS.values() for key in keys)}). {HOW_TO_CHOOSE}"
        )
    if architecture not in ARCHITECTURES:
        raise ValueError(f"`architecture` is {architecture!r}. {HOW_TO_CHOOSE}")
    return ARCHITECTURES[architecture]
