"""ChatGLM configuration: one `model_type`, two architectures.

`chatglm` on the Hub names two different models, and their repositories give the classes the same names:

* `"chatglm"`: ChatGLM-6B (v1), a prefix language model with 2-D rotary positions, in `modeling_chatglm.py`;
* `"chatglm2"`: ChatGLM2, ChatGLM3 and what shares their code, a causal model with multi-query attention and partial
  rotary positions, in `models/chatglm2/modeling_chatglm2.py`.

`ChatGLMConfig` decides which one a checkpoint is, once, from the keys of its `config.json`, and keeps the answer in the
field `architecture`, which `save_pretrained` writes. Models read that field only.
"""

from dataclasses import fields
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..._compat import CACHE
from ...loss.causal_lm import DEFAULT_CHUNK_SIZE
from ..config_mixin import CheckpointConfigMixin

# Keys that only one of the two originals has: what an unlabelled checkpoint is recognised by.
DECISIVE_KEYS = {
    "chatglm": ("position_encoding_2d", "inner_hidden_size"),
    "chatglm2": ("ffn_hidden_size", "multi_query_attention", "kv_channels"),
}

DEFAULT_ARCHITECTURE = "chatglm2"  # of a configuration that is made from nothing; a checkpoint must be recognisable
HOW_TO_CHOOSE = 'Set `architecture` to "chatglm" (ChatGLM-6B) or "chatglm2" (ChatGLM2, ChatGLM3).'

# The fields of one architecture alone, and what its original assumes for those that `config.json` does not mention
# (None: nothing, or decided from other fields below).
ARCHITECTURE_DEFAULTS: dict[str, dict[str, Any]] = {
    "chatglm": {
        "vocab_size": 130528,
        "tie_word_embeddings": True,
        "inner_hidden_size": 16384,
        "max_sequence_length": 2048,
        "position_encoding_2d": True,
        "quantization_embeddings": False,
        "mask_token_id": None,
        "gmask_token_id": None,
        "smask_token_id": None,
        "early_positions": None,
    },
    "chatglm2": {
        "vocab_size": 65024,
        "tie_word_embeddings": False,
        "ffn_hidden_size": 13696,
        "kv_channels": 128,
        "seq_length": 2048,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "classifier_dropout": None,
        "rmsnorm": True,
        "apply_residual_connection_post_layernorm": False,
        "post_layer_norm": True,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "multi_query_attention": False,
        "multi_query_group_num": 1,
        "rope_ratio": 1,
        "rope_ratio_type": None,
        "original_rope": True,
        "apply_query_key_layer_scaling": True,
        "attention_softmax_in_fp32": True,
        "bias_dropout_fusion": True,
        "fp32_residual_connection": False,
    },
}

POSITIVE_FIELDS = (
    "vocab_size",
    "hidden_size",
    "num_layers",
    "num_attention_heads",
    "inner_hidden_size",
    "ffn_hidden_size",
    "kv_channels",
    "multi_query_group_num",
    "max_sequence_length",
    "seq_length",
    "rope_ratio",
    "pre_seq_len",
)

# Sizes by the names that other libraries read in a configuration's dictionary (PEFT's prefix tuning), and what decides.
DERIVED_SIZES = {
    "num_key_value_heads": "`multi_query_attention` and `multi_query_group_num`",
    "head_dim": "`kv_channels` (ChatGLM2/3) or `hidden_size` and `num_attention_heads`",
}

# ChatGLM-6B of March 2023 kept 20,000 image tokens in front of the text vocabulary.
EARLY_VOCAB_SIZE, LATE_VOCAB_SIZE = 150528, 130528


def decisive_keys_of(values: dict[str, Any]) -> dict[str, list[str]]:
    """Architecture -> those of its decisive keys that `values` sets; architectures without any are left out."""
    seen = {
        architecture: [key for key in keys if values.get(key) is not None]
        for architecture, keys in DECISIVE_KEYS.items()
    }
    return {architecture: keys for architecture, keys in seen.items() if keys}


@strict
class ChatGLMConfig(CheckpointConfigMixin, PreTrainedConfig):
    r"""
    Configuration of every ChatGLM generation. Fields are the originals'; those marked (ours) are not.

    Args:
        architecture (`"chatglm"` or `"chatglm2"`, *optional*): (ours)
            Which of the two models this is. Left out, it is decided from the other keys (`DECISIVE_KEYS`); without any
            of them a checkpoint is an error, and a configuration made from nothing is `"chatglm2"`.
        tie_word_embeddings (`bool`, *optional*):
            Whether the output head is the embedding. Left out, it is for `"chatglm"`: that checkpoint's `config.json` does
            not say so, but its code ran where that was the default. A file with two different matrices loads untied.
        vocab_size (`int`, *optional*):
            Rows of the embedding. ChatGLM2/3 call it `padded_vocab_size`; both names work and both are saved.
        pre_seq_len (`int`, *optional*), prefix_projection (`bool`):
            P-tuning v2: number of learned prefix positions, and whether an MLP produces them.
        prefix_dropout (`float`): (ours)
            Dropout on the learned prefix in training.
        quantization_bit (`int`):
            8 or 4: the linear weights of the layers are stored as integers with one scale per row. 0: they are not.
        loss_chunk_size (`int`, *optional*): (ours)
            Tokens per chunk of the training loss, which then never holds all logits; None computes them.
        early_positions (`bool`, *optional*): (ours, `"chatglm"`)
            The 150,528-token revision of ChatGLM-6B, which gives bos another position than the later ones. Left out, it
            is true for that vocabulary size, and for an unusual size without a `pad_token_id`.
        smask_token_id (`int`, *optional*): (ours, `"chatglm"`)
            Id of `[sMASK]`, which marks a blank too. Left out, it is known for the two published vocabulary sizes.
        inner_hidden_size, max_sequence_length, position_encoding_2d, mask_token_id, gmask_token_id,
        quantization_embeddings (`"chatglm"`):
            Width of the MLP; trained length; 2-D or plain positions; ids of `[MASK]` and `[gMASK]`; whether the word
            embeddings are quantised too (and then serve as the output projection).
        ffn_hidden_size, seq_length, kv_channels, multi_query_attention, multi_query_group_num, add_bias_linear,
        add_qkv_bias, rmsnorm, post_layer_norm, apply_residual_connection_post_layernorm, hidden_dropout,
        attention_dropout, classifier_dropout (`"chatglm2"`):
            Width of the MLP; trained length; channels of a head; number of key/value heads; biases; norms; dropouts.
        rope_ratio (`int` or `float`, `"chatglm2"`):
            How far the rotary positions are stretched in the long-context checkpoints.
        rope_ratio_type (`"base"` or `"linear"`, *optional*): (ours, `"chatglm2"`)
            What `rope_ratio` acts on: `"base"` multiplies the rotary base (ChatGLM3 and later), `"linear"` divides the
            positions (chatglm2-6b-32k). `config.json` tells them apart by its `_name_or_path` only; left out, it is
            `"linear"` if that (or else the path it is loaded from) names chatglm2, and `"base"` otherwise.
        original_rope, apply_query_key_layer_scaling, attention_softmax_in_fp32, bias_dropout_fusion,
        fp32_residual_connection (`"chatglm2"`):
            Kept for the originals; they do not change what is computed here.

    Raises:
        ValueError: the keys fit neither architecture or both, or contradict each other; the message names the field.
    """

    model_type = "chatglm"
    own_tokenizer = "ChatGLMTokenizer"
    keys_to_ignore_at_inference = [CACHE]
    attribute_map = {"num_hidden_layers": "num_layers", "padded_vocab_size": "vocab_size"}

    base_model_fsdp_plan: ClassVar[dict[str, str]] = {}  # each architecture's backbone has its own plans

    architecture: Literal["chatglm", "chatglm2"] | None = None

    vocab_size: int | None = None
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    layernorm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    prefix_dropout: float = 0.0
    quantization_bit: int = 0
    loss_chunk_size: int | None = DEFAULT_CHUNK_SIZE

    inner_hidden_size: int | None = None
    max_sequence_length: int | None = None
    position_encoding_2d: bool | None = None
    mask_token_id: int | None = None
    gmask_token_id: int | None = None
    smask_token_id: int | None = None
    quantization_embeddings: bool | None = None
    early_positions: bool | None = None

    ffn_hidden_size: int | None = None
    kv_channels: int | None = None
    seq_length: int | None = None
    hidden_dropout: float | int | None = None
    attention_dropout: float | int | None = None
    classifier_dropout: float | int | None = None
    rmsnorm: bool | None = None
    apply_residual_connection_post_layernorm: bool | None = None
    post_layer_norm: bool | None = None
    add_bias_linear: bool | None = None
    add_qkv_bias: bool | None = None
    multi_query_attention: bool | None = None
    multi_query_group_num: int | None = None
    rope_ratio: int | float | None = None
    rope_ratio_type: Literal["base", "linear"] | None = None
    original_rope: bool | None = None
    apply_query_key_layer_scaling: bool | None = None
    attention_softmax_in_fp32: bool | None = None
    bias_dropout_fusion: bool | None = None
    fp32_residual_connection: bool | None = None

    def __post_init__(self, **kwargs):
        derived = {name: value for name in DERIVED_SIZES if (value := kwargs.pop(name, None)) is not None}
        if self.architecture is None:
            self.architecture = self._recognise_architecture()
        if (padded_vocab_size := kwargs.pop("padded_vocab_size", None)) is not None:
            self.vocab_size = padded_vocab_size
        if self.architecture == "chatglm":
            self._decide_revision()
        elif self.rope_ratio_type is None:
            name = kwargs.get("_name_or_path") or kwargs.get("name_or_path") or ""
            self.rope_ratio_type = "linear" if "chatglm2" in str(name).lower() else "base"
        for field, value in ARCHITECTURE_DEFAULTS[self.architecture].items():
            if getattr(self, field) is None:
                setattr(self, field, value)
        if self.quantization_bit and kwargs.get("quantization_config") is None:
            kwargs["quantization_config"] = {
                "quant_method": "chatglm",
                "bits": self.quantization_bit,
                "quantize_embeddings": bool(self.quantization_embeddings),
            }
        super().__post_init__(**kwargs)
        for name, value in derived.items():
            if value != getattr(self, name):
                raise ValueError(
                    f"`{name}` ({value}) contradicts what it follows from ({getattr(self, name)}): set {DERIVED_SIZES[name]}"
                )

    def _recognise_architecture(self) -> str:
        seen = decisive_keys_of(vars(self))
        if len(seen) > 1:
            raise ValueError(
                f"this configuration mixes keys of ChatGLM-6B ({', '.join(seen['chatglm'])}) and of ChatGLM2/3 "
                f"({', '.join(seen['chatglm2'])}). {HOW_TO_CHOOSE}"
            )
        return next(iter(seen), DEFAULT_ARCHITECTURE)

    def _decide_revision(self):
        """The March 2023 revision of ChatGLM-6B: its vocabulary size says so, or the pad token it did not know."""
        if self.vocab_size is None:
            self.vocab_size = LATE_VOCAB_SIZE
        if self.early_positions is None:
            self.early_positions = self.vocab_size == EARLY_VOCAB_SIZE or (
                self.vocab_size != LATE_VOCAB_SIZE and self.pad_token_id is None
            )
        first_special = {EARLY_VOCAB_SIZE: 150000, LATE_VOCAB_SIZE: 130000}.get(self.vocab_size)
        if first_special is not None:
            for offset, field in {
                0: "mask_token_id",
                1: "gmask_token_id",
                2: "smask_token_id",
                4: "bos_token_id",
                5: "eos_token_id",
            }.items():
                if getattr(self, field) is None:
                    setattr(self, field, first_special + offset)

    def validate_architecture(self):
        """Part of `@strict`-powered validation: the sizes that must be positive and fit together."""
        for field in POSITIVE_FIELDS:
            if (value := getattr(self, field)) is not None and value <= 0:
                raise ValueError(f"`{field}` must be a positive number, got {value}")
        if self.architecture == "chatglm" and self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"`hidden_size` ({self.hidden_size}) is not a multiple of `num_attention_heads` "
                f"({self.num_attention_heads})"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) is not a multiple of `multi_query_group_num` "
                f"({self.multi_query_group_num})"
            )
        if self.quantization_bit not in (0, 4, 8):
            raise ValueError(f"`quantization_bit` must be 0, 4 or 8, but is {self.quantization_bit}")

    # The names by which the rest of transformers asks for sizes.

    @property
    def head_dim(self) -> int:
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def num_key_value_heads(self) -> int:
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        return self.inner_hidden_size if self.architecture == "chatglm" else self.ffn_hidden_size

    @property
    def max_position_embeddings(self) -> int:
        return getattr(self, self._length_field)

    @max_position_embeddings.setter
    def max_position_embeddings(self, length: int):
        setattr(self, self._length_field, length)

    @property
    def _length_field(self) -> str:
        return "max_sequence_length" if self.architecture == "chatglm" else "seq_length"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        # Overrides take part in the decisions above, so they must be there when the configuration is built.
        overrides = {field.name: kwargs[field.name] for field in fields(cls) if field.name in kwargs}
        overrides.pop("dtype", None)
        config_dict = config_dict | overrides
        ours = config_dict.get("model_type") in (None, cls.model_type)
        if ours and config_dict.get("architecture") is None and not decisive_keys_of(config_dict):
            raise ValueError(
                f"this config.json has none of the keys that tell ChatGLM-6B from ChatGLM2/3 "
                f"({', '.join(key for keys in DECISIVE_KEYS.values() for key in keys)}). {HOW_TO_CHOOSE}"
            )
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """The fields of this architecture, under the names its original knows."""
        output = super().to_dict()
        foreign = {field for table in ARCHITECTURE_DEFAULTS.values() for field in table}
        foreign -= ARCHITECTURE_DEFAULTS[self.architecture].keys()
        output = {key: value for key, value in output.items() if key not in foreign or value is not None}
        if self.architecture == "chatglm2":
            output["padded_vocab_size"] = output["vocab_size"]
        return output | {name: getattr(self, name) for name in DERIVED_SIZES}


__all__ = ["ChatGLMConfig"]
