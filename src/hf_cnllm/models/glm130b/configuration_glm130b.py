"""Configuration of GLM-130B (arXiv 2210.02414)."""

from typing import ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ...loss.causal_lm import DEFAULT_CHUNK_SIZE
from ..adapter_targets import AdapterTargets
from ..config_mixin import CheckpointConfigMixin

# The released vocabulary's size, and its control tokens.
VOCAB_SIZE = 150528
CONTROL_TOKENS = {
    "mask_token_id": 150000,
    "gmask_token_id": 150001,
    "smask_token_id": 150002,
    "bos_token_id": 150004,
    "eos_token_id": 150005,
    "text_end_token_id": 20002,
    "pad_token_id": 20003,
}


@strict
class GLM130BConfig(CheckpointConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`GLM130BForConditionalGeneration`]. Fields are those of the original's `model_config.json`; those
    marked (ours) are not.

    Args:
        num_layers, hidden_size, num_attention_heads, vocab_size: Sizes. The number of layers scales the residual stream.
        inner_hidden_size (`int`, *optional*):
            Width of the gated MLP; by default two thirds of four times the hidden size, as in the original.
        max_sequence_length (`int`): Trained length.
        hidden_dropout, attention_dropout (`float`):
            Dropout in training: on the embeddings and on what each half of a layer adds, and on attention weights.
        layernorm_order (`"post"`): Where the norms stand.
        layernorm_epsilon, initializer_range (`float`): (ours) the original's constants.
        mask_token_id, gmask_token_id, smask_token_id (`int`, *optional*): (ours)
            Ids of `[MASK]`, `[gMASK]` and `[sMASK]`. They and the next ones are known for the released vocabulary.
        bos_token_id, eos_token_id (`int`, *optional*): (ours) `sop`, behind the context, and `eop`, which ends a blank.
        text_end_token_id (`int`, *optional*): (ours)
            `</s>`, which stands behind a text and also ends a blank.
        quantization_bit (`int`): (ours)
            8 or 4: the linear weights of the layers are stored as integers. 0: they are not.
        quantization_groups (`int`): (ours)
            Model-parallel ranks that quantized the weights: those that were split by columns have a scale for each.
        loss_chunk_size (`int`, *optional*): (ours)
            Tokens per chunk of the training loss, which then never holds all logits; None computes them.
        model_class, tokenizer_type, model_parallel_size: Kept; they change nothing here.

    Raises:
        ValueError: sizes do not fit.
    """

    model_type = "glm130b"
    adapter_targets = AdapterTargets(
        ("query_key_value",),
        ("dense_4h_to_h",),
        norms=("input_layernorm", "post_attention_layernorm", "final_layernorm"),
    )
    own_tokenizer = "GLM130BTokenizer"
    attribute_map = {
        "num_hidden_layers": "num_layers",
        "intermediate_size": "inner_hidden_size",
        "max_position_embeddings": "max_sequence_length",
        "sop_token_id": "bos_token_id",  # by GLM's name
    }
    # What ChatGLM-6B's layers, which it shares, ask of a configuration.
    has_kinds_of_blanks: ClassVar[bool] = True
    kinds_of_blanks: ClassVar[tuple[str, ...]] = ("mask_token_id", "smask_token_id", "gmask_token_id")
    position_encoding_2d: ClassVar[bool] = False
    block_position_encoding: ClassVar[bool] = False
    pre_seq_len: ClassVar[int | None] = None
    quantization_embeddings: ClassVar[bool] = False

    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 12288
    num_layers: int = 70
    num_attention_heads: int = 96
    inner_hidden_size: int | None = None
    max_sequence_length: int = 2048
    hidden_dropout: float | int = 0.1
    attention_dropout: float | int = 0.1
    layernorm_order: Literal["post"] = "post"
    layernorm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    mask_token_id: int | None = None
    gmask_token_id: int | None = None
    smask_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None
    text_end_token_id: int | None = None
    quantization_bit: int = 0
    quantization_groups: int = 1
    loss_chunk_size: int | None = DEFAULT_CHUNK_SIZE
    model_class: str = "GLM130B"
    tokenizer_type: str = "icetk-glm-130B"
    model_parallel_size: int = 1

    def __post_init__(self, **kwargs):
        self.set_missing({"inner_hidden_size": 4 * self.hidden_size * 2 // 3})
        if self.vocab_size == VOCAB_SIZE:
            self.set_missing(CONTROL_TOKENS)
        if self.quantization_bit and kwargs.get("quantization_config") is None:
            kwargs["quantization_config"] = {
                "quant_method": "chatglm",
                "bits": self.quantization_bit,
                "groups": self.quantization_groups,
            }
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def validate_architecture(self):
        """Part of `@strict`-powered validation: the sizes that must be positive and fit together."""
        self.check_sizes("quantization_groups")
        self.check_whole_heads()
        if self.quantization_bit not in (0, 4, 8):
            raise ValueError(f"`quantization_bit` must be 0, 4 or 8, but is {self.quantization_bit}")


__all__ = ["GLM130BConfig"]
