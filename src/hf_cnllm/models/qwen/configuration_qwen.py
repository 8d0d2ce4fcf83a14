"""Qwen (v1) configuration."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..._compat import logging
from ...attention.layer_types import FULL, SLIDING
from ...loss.causal_lm import DEFAULT_CHUNK_SIZE
from ..adapter_targets import AdapterTargets
from ..config_mixin import CheckpointConfigMixin

logger = logging.get_logger(__name__)

LONG_CONTEXT_SWITCHES = ("use_dynamic_ntk", "use_logn_attn")
DTYPE_FLAGS = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

# Values that no published checkpoint departs from, and that would need another model.
ONLY_VALUES = {
    "activation": "swiglu",
    "pos_emb": "rotary",
    "apply_residual_connection_post_layernorm": False,
    "rope_scaling": None,
}

# Switches of the original that change nothing, and what to do instead.
WITHOUT_EFFECT = {
    "softmax_in_fp32": "attention kernels compute softmax in fp32",
    "use_cache_quantization": "call generate(cache_implementation='quantized') instead",
    "use_cache_kernel": "call generate(cache_implementation='quantized') instead",
}


@strict
class QWenConfig(CheckpointConfigMixin, PreTrainedConfig):
    r"""Configuration of [`QWenModel`]. All keys of the original `config.json` are read, those of the first revision
    (`n_embd`, `n_layer`, …) too; `head_dim`, `rope_theta` and transformers' other common names lead to the same fields.

    Args:
        vocab_size: number of token embeddings. The first revision's `padded_vocab_size`, if larger, is the one.
        hidden_size, num_hidden_layers, num_attention_heads: the Transformer's shape.
        intermediate_size: *twice* the width of the feed-forward layers, as in the original.
        kv_channels: dimensions of a head; default: `hidden_size / num_attention_heads`.
        max_position_embeddings: longest input in tokens that the model is meant for; with dynamic NTK no limit.
        seq_length: trained length in tokens, from which on dynamic NTK and LogN act.
        use_dynamic_ntk: scale the rotary base for prompts longer than `seq_length`, see
            [`~hf_cnllm.models.qwen.dynamic_ntk`]. Default: on if `seq_length` is given. Never in training.
        use_logn_attn: scale queries past `seq_length`, see [`~hf_cnllm.attention.logn`]. Default and training as above.
        window_sizes: one entry per layer, the number of tokens that its window holds, or None for full attention.
            Default: no windows. In force in training too.
        rotary_emb_base: base of the rotary embedding.
        rotary_pct: share of each head's dimensions that is rotated, in (0, 1].
        no_bias: no biases but that of `c_attn`, which always has one.
        layer_norm_epsilon: of RMSNorm.
        emb_dropout_prob, attn_dropout_prob: dropout after the embedding and on attention weights.
        bf16, fp16, fp32: at most one: the dtype to load in. `dtype` goes before them.
        scale_attn_weights, use_flash_attn, softmax_in_fp32, use_cache_quantization, use_cache_kernel: kept for the
            original code. Scores are always scaled; `attn_implementation` chooses the attention kernel.
        loss_chunk_size: tokens per chunk of the training loss, which then never holds all logits; None computes them.
        initializer_range, use_cache, tie_word_embeddings, pad_token_id, bos_token_id, eos_token_id: as in transformers'
            `LlamaConfig`.

    Raises:
        ValueError: fields that contradict each other or do not fit; the message names them.

    Example:
        >>> from hf_cnllm import QWenConfig
        >>> QWenConfig(seq_length=2048, n_embd=2048, num_attention_heads=16).head_dim
        128
    """

    model_type = "qwen"
    adapter_targets = AdapterTargets(("c_attn",), ("mlp.c_proj",), norms=("ln_1", "ln_2", "ln_f"))
    own_tokenizer = "QWenTokenizer"
    attribute_map = {
        "head_dim": "kv_channels",
        "num_key_value_heads": "num_attention_heads",
        "rms_norm_eps": "layer_norm_epsilon",
        "rope_theta": "rotary_emb_base",
        "attention_dropout": "attn_dropout_prob",
        # The first revision's names.
        "n_embd": "hidden_size",
        "n_layer": "num_hidden_layers",
        "n_head": "num_attention_heads",
        "n_positions": "max_position_embeddings",
        "ffn_hidden_size": "intermediate_size",
        "attn_pdrop": "attn_dropout_prob",
        "embd_pdrop": "emb_dropout_prob",
    }
    # c_attn holds q | k | v, so its column shards are not whole heads of each: it is gathered after the projection, and cut
    # again before the next.
    base_model_tp_plan = {
        "wte": "embedding_rowwise",
        "h.*.attn.c_attn": "colwise_gather_output",
        "h.*.attn.c_proj": "rowwise_split_input",
        "h.*.mlp.w1": "colwise",
        "h.*.mlp.w2": "colwise",
        "h.*.mlp.c_proj": "rowwise",
    }
    base_model_pp_plan = {
        "wte": (["input_ids"], ["inputs_embeds"]),
        "h": (["hidden_states", "attention_mask"], ["hidden_states"]),
        "ln_f": (["hidden_states"], ["hidden_states"]),
    }
    base_model_fsdp_plan = {"wte": "free_full_weight", "h.*": "free_full_weight", "ln_f": "keep_full_weight"}

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    kv_channels: int | None = None
    max_position_embeddings: int = 8192
    seq_length: int | None = None
    use_dynamic_ntk: bool | None = None
    use_logn_attn: bool | None = None
    window_sizes: list[int | None] | None = None
    rotary_emb_base: float | int = 10000
    rotary_pct: float | int = 1.0
    no_bias: bool = True
    layer_norm_epsilon: float = 1e-6
    emb_dropout_prob: float | int = 0.0
    attn_dropout_prob: float | int = 0.0
    bf16: bool = False
    fp16: bool = False
    fp32: bool = False
    scale_attn_weights: bool = True
    use_flash_attn: bool | str = "auto"
    softmax_in_fp32: bool = False
    use_cache_quantization: bool = False
    use_cache_kernel: bool = False
    initializer_range: float = 0.02
    use_cache: bool = True
    loss_chunk_size: int | None = DEFAULT_CHUNK_SIZE
    tie_word_embeddings: bool = False
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs):
        for name in [name for name in kwargs if name in self.attribute_map]:
            setattr(self, name, kwargs.pop(name))
        self.vocab_size = max(self.vocab_size, kwargs.get("padded_vocab_size") or 0)
        self.set_missing({"kv_channels": self.hidden_size // max(self.num_attention_heads, 1)})
        self.set_missing(dict.fromkeys(LONG_CONTEXT_SWITCHES, self.seq_length is not None))
        for flag, dtype in DTYPE_FLAGS.items():
            if getattr(self, flag) and self.dtype is None:
                self.dtype = dtype
        self._refuse_other_architectures(kwargs, kwargs.pop("layer_types", None))
        for switch, advice in WITHOUT_EFFECT.items():
            if getattr(self, switch):
                logger.warning_once(f"`{switch}` is not in use here; {advice}.")
        super().__post_init__(**kwargs)

    def _refuse_other_architectures(self, kwargs: dict[str, Any], layer_types: list[str] | None):
        for name, only in ONLY_VALUES.items():
            if kwargs.get(name, only) != only:
                raise ValueError(f"`{name}` is {kwargs[name]!r}, but Qwen models have {only!r}.")
        # transformers' common keys, where they say what this family's own do not.
        given = kwargs.get("rope_parameters") or {}
        rope = {"rope_type": "default", "rope_theta": self.rotary_emb_base} | given
        if rope["rope_type"] != "default" or rope["rope_theta"] != self.rotary_emb_base:
            raise ValueError(
                f"`rope_parameters` is {given}, but Qwen models have `rotary_emb_base` and `use_dynamic_ntk`. Set these."
            )
        if layer_types is not None and list(layer_types) != self.layer_types:
            raise ValueError(
                f"`layer_types` is {layer_types}, but follows from `window_sizes` ({self.window_sizes}). Set that, and "
                "leave `layer_types` out."
            )

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        cls.check_aliases(config_dict)
        cls.check_aliases(kwargs)
        if DTYPE_FLAGS.keys() & kwargs.keys():
            config_dict = {key: value for key, value in config_dict.items() if key not in ("dtype", *DTYPE_FLAGS)}
        return super().from_dict(config_dict, **kwargs)

    @property
    def layer_types(self) -> list[str]:
        """transformers' name for each layer's kind of attention, from `window_sizes`."""
        windows = self.window_sizes or [None] * self.num_hidden_layers
        return [FULL if window is None else SLIDING for window in windows]

    @property
    def sliding_window(self) -> int | None:
        """The largest of `window_sizes`: the number of tokens that a windowed layer's cache keeps."""
        windows = [window for window in self.window_sizes or () if window is not None]
        return max(windows) if windows else None  # torch.compile knows no `max` with a default

    @sliding_window.setter
    def sliding_window(self, window: int | None):
        """One size for all windowed layers, or for all layers if there was none; None: no windows."""
        windows = self.window_sizes if self.sliding_window else [window] * self.num_hidden_layers
        self.window_sizes = None if window is None else [old and window for old in windows]

    @property
    def rotary_dim(self) -> int:
        """Number of rotated dimensions of a head, by which frequencies are computed. If it is odd, one more is rotated,
        as in the original, to complete the last pair."""
        return int(self.kv_channels * self.rotary_pct)

    def validate_architecture(self):
        """Part of `@strict`-powered validation: every message names the field to change."""
        self.check_sizes("kv_channels", "seq_length", "rotary_emb_base")
        if self.intermediate_size % 2 != 0:
            raise ValueError(f"`intermediate_size` ({self.intermediate_size}) must be even: twice the MLP's width.")
        if not 0 < self.rotary_pct <= 1:
            raise ValueError(f"`rotary_pct` must be in (0, 1], got {self.rotary_pct}.")
        smallest = 3 if self.use_dynamic_ntk else 1
        if self.rotary_dim < smallest or self.rotary_dim + self.rotary_dim % 2 > self.kv_channels:
            raise ValueError(
                f"`rotary_pct` ({self.rotary_pct}) of `kv_channels` ({self.kv_channels}) gives {self.rotary_dim} rotated "
                f"dimensions. It must be at least {smallest} (3 with `use_dynamic_ntk`), and an odd number needs one more "
                "to pair with."
            )
        for switch in LONG_CONTEXT_SWITCHES:
            if getattr(self, switch) and self.seq_length is None:
                raise ValueError(f"`{switch}` is on, but `seq_length`, the trained length, is missing. Set it.")
        if self.use_logn_attn and self.seq_length < 2:
            raise ValueError(f"`use_logn_attn` needs a `seq_length` of at least 2, got {self.seq_length}.")
        if self.window_sizes is not None and len(self.window_sizes) != self.num_hidden_layers:
            raise ValueError(
                f"`window_sizes` has {len(self.window_sizes)} entries, but there are {self.num_hidden_layers} layers "
                "(`num_hidden_layers`). Give one entry per layer, None for full attention."
            )
        for window in self.window_sizes or ():
            if window is not None and window < 1:
                raise ValueError(f"`window_sizes` must hold positive numbers or None, got {window}.")
        if sum(getattr(self, flag) for flag in DTYPE_FLAGS) > 1:
            raise ValueError("Only one of `bf16`, `fp16` and `fp32` can be true.")
