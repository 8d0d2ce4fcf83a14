"""Which architecture of other libraries computes the same as one of these, and what its parts are called there."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import GlmConfig, LlamaConfig, PreTrainedConfig, Qwen2Config

from ..families import family_of
from ..models.baichuan import BaichuanConfig
from ..models.chatglm import ChatGLMConfig
from ..models.chatglm.modeling_chatglm2 import rope_parameters
from ..models.qwen import QWenConfig

Modules = Mapping[str, tuple[str, ...]]
Refusal = tuple[Callable[[Any], Any], str]


class Rows(NamedTuple):
    """How a packed projection holds its parts, such as queries, keys and values.

    Attributes:
        sizes: rows of each.
        heads: where they lie head by head, as ChatGLM2's do without multi-query attention, the number of heads; else 0.
        half: where RoPE turns channels 2i and 2i + 1 of a query and a key together, and i and i + half in the target, half of
            a head's channels; else 0.
    """

    sizes: tuple[int, ...]
    heads: int = 0
    half: int = 0

    def split(self, packed: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """`packed` [rows, …] as one tensor for each of `sizes`."""
        if self.heads:
            packed = packed.unflatten(0, (self.heads, len(self.sizes), -1)).transpose(0, 1).flatten(0, 2)
        return self._turned(packed.split(self.sizes), (self.half, 2))

    def join(self, parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """The inverse of `split`."""
        packed = torch.cat(self._turned(parts, (2, self.half)))
        if self.heads:
            packed = packed.unflatten(0, (len(self.sizes), self.heads, -1)).transpose(0, 1).flatten(0, 2)
        return packed

    def _turned(self, parts: tuple[torch.Tensor, ...], pairs: tuple[int, int]) -> tuple[torch.Tensor, ...]:
        """Queries and keys with the two channels of a pair as far from each other as the other side has them."""
        if not self.half:
            return parts
        queries, keys, values = parts
        turned = (part.unflatten(0, (-1, *pairs)).transpose(1, 2).flatten(0, 2) for part in (queries, keys))
        return (*turned, values)


def _rows(config: Any, module: str) -> Rows:
    heads = config.num_attention_heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    by_head = getattr(config, "multi_query_attention", True) is False
    return Rows(tuple(n * head_dim for n in (heads, key_value_heads, key_value_heads)), heads if by_head else 0)


class Road(NamedTuple):
    """A way from a family to another library's architecture and back.

    Attributes:
        target: the `model_type` there.
        source: the family's configuration.
        config: configuration of the original -> that of the target.
        refusals: what a configuration may say that the target has no place for -> that, and what serves it instead.
        modules: module of the original -> those of the target, `*` for the number of a layer. Several share its rows.
        rows: how a packed one of the original holds them.
        unbiased: modules of the target that have a bias there because others need one, of zeros.
        normed: modules of the original whose rows are normalized when it computes.
        loses: what the target does otherwise, or None.
        tokenizer_class: what reads the tokenizer there; None where all files but the weights stay as they are.
    """

    target: str
    source: type[PreTrainedConfig]
    config: Callable[[Any], PreTrainedConfig]
    refusals: tuple[Refusal, ...]
    modules: Modules
    rows: Callable[[Any, str], Rows] = _rows
    unbiased: Callable[[Any], tuple[str, ...]] = lambda config: ()
    normed: Callable[[Any], tuple[str, ...]] = lambda config: ()
    loses: Callable[[Any], str | None] = lambda config: None
    tokenizer_class: str | None = "PreTrainedTokenizerFast"

    def check(self, config: Any) -> None:
        """Refuses a configuration that the target has no place for.

        Raises:
            ValueError: saying what it is, and what serves it instead.
        """
        if getattr(config, "quantization_config", None) is not None:
            raise ValueError("the checkpoint is quantized: export the one with floating point weights")
        for applies, reason in self.refusals:
            if applies(config):
                raise ValueError(reason)


NATIVE = "vLLM with this package and `transformers serve` serve it as it is (docs/serving.md)"
WITHOUT_VLLM = "`hf-cnllm chat` and `transformers serve` serve it as it is (docs/serving.md)"
PREFIX_LM = (
    "is a prefix language model, whose prompts see themselves in both directions: no other architecture has that."
)
BY_BLANKS = "`hf-cnllm chat` and `hf_cnllm.infill` fill its blanks as it is (docs/quickstart.md)"

QKV = tuple(f"model.layers.*.self_attn.{name}_proj" for name in "qkv")
SHARED = {  # by the names of Llama
    name: (name,)
    for name in (
        *("model.embed_tokens", "model.norm", "lm_head"),
        *(f"model.layers.*.{part}" for part in ("input_layernorm", "post_attention_layernorm", "self_attn.o_proj")),
        *(f"model.layers.*.mlp.{part}_proj" for part in ("gate", "up", "down")),
    )
}
BAICHUAN = SHARED | {"model.layers.*.self_attn.W_pack": QKV}
QWEN = {
    "transformer.wte": ("model.embed_tokens",),
    "transformer.h.*.ln_1": ("model.layers.*.input_layernorm",),
    "transformer.h.*.attn.c_attn": QKV,
    "transformer.h.*.attn.c_proj": ("model.layers.*.self_attn.o_proj",),
    "transformer.h.*.ln_2": ("model.layers.*.post_attention_layernorm",),
    "transformer.h.*.mlp.w1": ("model.layers.*.mlp.up_proj",),
    "transformer.h.*.mlp.w2": ("model.layers.*.mlp.gate_proj",),
    "transformer.h.*.mlp.c_proj": ("model.layers.*.mlp.down_proj",),
    "transformer.ln_f": ("model.norm",),
    "lm_head": ("lm_head",),
}
_CHATGLM_LAYER, _GLM_LAYER = "transformer.encoder.layers.*", "model.layers.*"
CHATGLM2 = {
    "transformer.embedding.word_embeddings": ("model.embed_tokens",),
    f"{_CHATGLM_LAYER}.input_layernorm": (f"{_GLM_LAYER}.input_layernorm",),
    f"{_CHATGLM_LAYER}.self_attention.query_key_value": QKV,
    f"{_CHATGLM_LAYER}.self_attention.dense": (f"{_GLM_LAYER}.self_attn.o_proj",),
    f"{_CHATGLM_LAYER}.post_attention_layernorm": (f"{_GLM_LAYER}.post_attention_layernorm",),
    f"{_CHATGLM_LAYER}.mlp.dense_h_to_4h": (f"{_GLM_LAYER}.mlp.gate_up_proj",),
    f"{_CHATGLM_LAYER}.mlp.dense_4h_to_h": (f"{_GLM_LAYER}.mlp.down_proj",),
    "transformer.encoder.final_layernorm": ("model.norm",),
    "transformer.output_layer": ("lm_head",),
}
CHATGLM2_AS_LLAMA = CHATGLM2 | {
    f"{_CHATGLM_LAYER}.mlp.dense_h_to_4h": tuple(f"{_GLM_LAYER}.mlp.{name}_proj" for name in ("gate", "up"))
}

COPIED = (
    *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "initializer_range", "use_cache"),
    *("tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id", "dtype"),
)


def _copied(config: Any) -> dict[str, Any]:
    return {name: getattr(config, name) for name in COPIED}


def _llama_rows_of_chatglm(config: Any, module: str) -> Rows:
    if module.endswith("dense_h_to_4h"):
        return Rows((config.ffn_hidden_size,) * 2)
    return _rows(config, module)._replace(half=config.head_dim // 2)


def _llama(config: BaichuanConfig) -> LlamaConfig:
    return LlamaConfig(
        **_copied(config),
        intermediate_size=config.intermediate_size,
        num_key_value_heads=config.num_attention_heads,
        hidden_act=config.hidden_act,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters=dict(config.rope_parameters),
        architectures=["LlamaForCausalLM"],
    )


def _qwen2(config: QWenConfig) -> Qwen2Config:
    stretches = config.use_dynamic_ntk or config.use_logn_attn
    return Qwen2Config(
        **_copied(config),
        intermediate_size=config.intermediate_size // 2,
        num_key_value_heads=config.num_attention_heads,
        head_dim=config.kv_channels,  # type: ignore[call-arg]  # kept as it is, and read by the model
        attention_dropout=config.attn_dropout_prob,
        max_position_embeddings=config.seq_length if stretches else config.max_position_embeddings,
        rms_norm_eps=config.layer_norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(config.rotary_emb_base)},
        architectures=["Qwen2ForCausalLM"],
    )


def _qwen_loses(config: QWenConfig) -> str | None:
    lost = [
        name
        for name, is_on in (("dynamic NTK", config.use_dynamic_ntk), ("LogN attention", config.use_logn_attn))
        if is_on
    ]
    if not lost:
        return None
    return (
        f"Qwen2 has no {' and no '.join(lost)}, which act past `seq_length`: the export ends at {config.seq_length} tokens "
        f"(`max_position_embeddings`). For longer ones {NATIVE}."
    )


def _chatglm_values(config: Any) -> dict[str, Any]:
    return _copied(config) | {
        "intermediate_size": config.ffn_hidden_size,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "attention_bias": config.add_qkv_bias,
        "attention_dropout": config.attention_dropout,
        "max_position_embeddings": config.seq_length,
        "rms_norm_eps": config.layernorm_epsilon,
    }


def _glm(config: Any) -> GlmConfig:
    return GlmConfig(
        **_chatglm_values(config), rope_parameters=rope_parameters(config), architectures=["GlmForCausalLM"]
    )


STILL = 1e16  # slows a turn down so that no position turns a channel by what fp32 can tell


def _llama_of_chatglm(config: Any) -> LlamaConfig:
    """ChatGLM2 turns half of a head's channels, Llama all. With the base squared, the first half of Llama's frequencies are
    ChatGLM2's, base^(-i / pairs), and Llama 3's scaling, which divides the frequencies below a bound, stops the others."""
    base, pairs, length = rope_parameters(config)["rope_theta"], config.head_dim // 4, config.seq_length // 2
    # What is between base^(1 - 1 / pairs), the longest wave of ChatGLM2, and base, the shortest of the others.
    shorter, longer = (2 * math.pi * base ** (1 - quarters / (4 * pairs)) for quarters in (3, 1))
    rope = {
        "rope_type": "llama3",
        "rope_theta": base**2,
        "factor": STILL,
        "original_max_position_embeddings": length,
        "high_freq_factor": length / shorter,
        "low_freq_factor": length / longer,
    }
    return LlamaConfig(**_chatglm_values(config), rope_parameters=rope, architectures=["LlamaForCausalLM"])


def _chatglm_refusals(target: str) -> tuple[Refusal, ...]:
    return (
        (lambda c: c.architecture == "chatglm", f"ChatGLM-6B {PREFIX_LM} {WITHOUT_VLLM}"),
        (lambda c: c.pre_seq_len, f"{target} has no place for a P-tuning prefix (`pre_seq_len`). {WITHOUT_VLLM}"),
        (lambda c: c.add_bias_linear, f"{target} has no biases but the attention's (`add_bias_linear`). {NATIVE}"),
        (
            lambda c: not (c.rmsnorm and c.post_layer_norm) or c.apply_residual_connection_post_layernorm,
            f"{target} has RMSNorm before each part and at the end, as all published checkpoints (`rmsnorm`, "
            f"`post_layer_norm`, `apply_residual_connection_post_layernorm`). {WITHOUT_VLLM}",
        ),
        (
            lambda c: c.head_dim % 4,
            f"{target} can turn half of a head in pairs only where `kv_channels` is a multiple of 4. {WITHOUT_VLLM}",
        ),
    )


TIED_NORM_HEAD = (
    lambda c: c.norm_head and c.tie_word_embeddings,
    f"a NormHead that is tied to the embedding has no place there (`tie_word_embeddings`). {NATIVE}",
)


def _norm_head(config: BaichuanConfig) -> tuple[str, ...]:
    return ("lm_head",) if config.norm_head else ()


ROADS = (
    Road(
        target="llama",
        source=BaichuanConfig,
        config=_llama,
        refusals=(
            (
                lambda c: c.position_embedding == "alibi",
                "Llama has no ALiBi, which this checkpoint's positions are (Baichuan-13B's kind): vLLM with this package and "
                "`transformers serve` serve it as it is, llama.cpp what `--to baichuan` writes (docs/serving.md)",
            ),
            TIED_NORM_HEAD,
        ),
        modules=BAICHUAN,
        normed=_norm_head,
    ),
    Road(
        target="baichuan",
        source=BaichuanConfig,
        config=lambda config: config,  # rows that are normalized may be normalized again
        refusals=(TIED_NORM_HEAD,),
        modules=SHARED | {"model.layers.*.self_attn.W_pack": ("model.layers.*.self_attn.W_pack",)},
        normed=_norm_head,
        tokenizer_class=None,
    ),
    Road(
        target="qwen2",
        source=QWenConfig,
        config=_qwen2,
        refusals=(
            (lambda c: not c.no_bias, f"Qwen2 has biases on queries, keys and values alone (`no_bias`). {NATIVE}"),
            (lambda c: c.rotary_pct != 1, f"Qwen2 rotates whole heads (`rotary_pct`). {NATIVE}"),
            (
                lambda c: c.window_sizes,
                f"engines read no windows of single layers from Qwen2 (`window_sizes`). {NATIVE}",
            ),
        ),
        modules=QWEN,
        loses=_qwen_loses,
        tokenizer_class="Qwen2Tokenizer",
    ),
    Road(
        target="glm",
        source=ChatGLMConfig,
        config=_glm,
        refusals=_chatglm_refusals("GLM"),
        modules=CHATGLM2,
    ),
    Road(
        target="llama",
        source=ChatGLMConfig,
        config=_llama_of_chatglm,
        refusals=(
            *_chatglm_refusals("Llama"),
            (
                lambda c: c.rope_ratio_type == "linear" and c.rope_ratio != 1,
                "Llama has no positions divided by a number (`rope_ratio` of ChatGLM2-6B-32k) in heads of which half is "
                "turned: use --to glm",
            ),
        ),
        modules=CHATGLM2_AS_LLAMA,
        rows=_llama_rows_of_chatglm,
        unbiased=lambda config: (f"{_GLM_LAYER}.self_attn.o_proj",) if config.add_qkv_bias else (),
    ),
)
TARGETS = tuple(dict.fromkeys(road.target for road in ROADS))


def road_of(config: Any, target: str) -> Road:
    """The road from a checkpoint of this package to `target`, which it fits on.

    Raises:
        ValueError: it leads from another family, or this checkpoint has no equivalent there.
    """
    roads = {road.target: road for road in ROADS if isinstance(config, road.source)}
    if target not in roads:
        family = family_of(config)
        line = family.line_of(config) if family else config.model_type
        if roads:
            raise ValueError(f"a checkpoint of {line} becomes --to {' or '.join(roads)}, not {target}")
        raise ValueError(f"{line} {PREFIX_LM} {BY_BLANKS}")
    road = roads[target]
    road.check(config)
    return road


LAYER = re.compile(r"\.(\d+)(?=\.|$)")


def in_any_layer(module: str) -> str:
    """The name of a module with `*` for the number of its layer."""
    return LAYER.sub(".*", module)


def moved(modules: Modules, module: str) -> tuple[str, ...] | None:
    """The names of a module of one side on the other; None if there is none of that name."""
    number, names = LAYER.search(module), modules.get(in_any_layer(module))
    return names and tuple(name.replace("*", number[1]) if number else name for name in names)
