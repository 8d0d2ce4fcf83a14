"""Configuration of the original GLM, which shares its `model_type` with transformers' own GLM-4."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict
from transformers import GlmConfig, PreTrainedConfig

from ...loss.causal_lm import DEFAULT_CHUNK_SIZE
from ..adapter_targets import AdapterTargets
from ..config_mixin import CheckpointConfigMixin

# Keys that the original's `config.json` has and GLM-4's has not.
DECISIVE_KEYS = ("block_position_encoding", "max_sequence_length")

# Ids of the control tokens where the number of embeddings tells the vocabulary.
VOCABULARIES = {
    50048: {  # cog-pretrain.model: glm-large-chinese, glm-10b-chinese
        "pad_token_id": 50000,
        "mask_token_id": 50003,
        "sop_token_id": 50006,
        "eop_token_id": 50007,
        "smask_token_id": 50008,
        "gmask_token_id": 50009,
    },
}


@strict
class GLMConfig(CheckpointConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`GLMModel`], the original GLM (arXiv 2103.10360). Fields are the original's; those marked (ours)
    are not. `GLMConfig.from_dict` gives a [`~transformers.GlmConfig`] for a GLM-4 checkpoint.

    Args:
        max_sequence_length (`int`):
            Last position that the two tables of learned positions have. Longer texts are refused.
        block_position_encoding (`bool`):
            Whether tokens have a block position beside their position. Without, [`GLMModel`] takes `position_ids` of one
            row.
        embedding_dropout_prob, attention_dropout_prob, output_dropout_prob (`float`):
            Dropout in training: on the embeddings, on attention weights, on what each half of a layer adds.
        layernorm_epsilon (`float`): (ours) the original's constant.
        mask_token_id, smask_token_id, gmask_token_id, sop_token_id, eop_token_id (`int`, *optional*): (ours)
            Ids of `[MASK]`, `[sMASK]`, `[gMASK]`, `<|startofpiece|>` and `<|endofpiece|>`, by which positions and context
            are found where they are not given. Left out, they are known for the Chinese vocabulary (50,048 embeddings).
        eos_token_id (`int`, *optional*):
            Where `generate` stops; by default `eop_token_id`.
        loss_chunk_size (`int`, *optional*): (ours)
            Tokens per chunk of the training loss, which then never holds all logits; None computes them.
        attention_scale, output_predict, parallel_output, relative_encoding: Kept; they change nothing here.
        checkpoint_activations, checkpoint_num_layers, pool_token, spell_func, spell_length: Likewise.

    Raises:
        ValueError: a field asks for what no checkpoint has (`relative_encoding`), or sizes do not fit.
    """

    model_type = "glm"
    written_model_type = "hf_cnllm_glm"
    adapter_targets = AdapterTargets(  # GLM-4's too, which has the same `model_type`
        ("query_key_value", "q_proj", "v_proj"),
        ("dense_4h_to_h", "down_proj"),
        norms=("input_layernorm", "post_attention_layernorm", "final_layernorm", "norm"),
    )
    own_vocabularies = ("cog-pretrain.model", "vocab.txt", "vocab.json", "tokenizer.json")
    attribute_map = {"num_hidden_layers": "num_layers", "max_position_embeddings": "max_sequence_length"}
    has_kinds_of_blanks: ClassVar[bool] = False
    kinds_of_blanks: ClassVar[tuple[str, ...]] = ("gmask_token_id", "mask_token_id", "smask_token_id")

    vocab_size: int = 30592
    hidden_size: int = 1024
    num_layers: int = 24
    num_attention_heads: int = 16
    max_sequence_length: int = 512
    block_position_encoding: bool = True
    embedding_dropout_prob: float | int = 0.1
    attention_dropout_prob: float | int = 0.1
    output_dropout_prob: float | int = 0.1
    layernorm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    loss_chunk_size: int | None = DEFAULT_CHUNK_SIZE
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    mask_token_id: int | None = None
    smask_token_id: int | None = None
    gmask_token_id: int | None = None
    sop_token_id: int | None = None
    eop_token_id: int | None = None

    attention_scale: float | int = 1.0
    output_predict: bool = True
    parallel_output: bool = True
    relative_encoding: bool = False
    checkpoint_activations: bool = False
    checkpoint_num_layers: int = 1
    pool_token: str = "cls"
    spell_func: str | None = "lstm"
    spell_length: int | None = None

    def __post_init__(self, **kwargs):
        self.set_missing(VOCABULARIES.get(self.vocab_size, {}))
        self.set_missing({"eos_token_id": self.eop_token_id})
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        """Part of `@strict`-powered validation."""
        self.check_sizes()
        self.check_whole_heads()
        if self.relative_encoding:
            raise ValueError("`relative_encoding` must be False: no published GLM has relative positions")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> PreTrainedConfig:
        """This configuration, or transformers' [`~transformers.GlmConfig`] if the keys are GLM-4's."""
        if config_dict.get("model_type") == cls.model_type and not config_dict.keys() & set(DECISIVE_KEYS):
            return GlmConfig.from_dict(config_dict, **kwargs)
        return super().from_dict(config_dict, **kwargs)


class SavedGLMConfig(GLMConfig):
    """What `AutoConfig` finds for a saved `config.json`, which does not say "glm": without this package that is GLM-4, whose
    classes would load it with random weights. It gives a [`GLMConfig`]."""

    model_type = GLMConfig.written_model_type

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> PreTrainedConfig:
        return GLMConfig.from_dict(config_dict, **kwargs)


__all__ = ["GLMConfig"]
