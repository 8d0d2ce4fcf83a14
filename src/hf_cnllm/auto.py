"""THE table: what each family is. Everything that lists families reads it: `registration.py`, `hf-cnllm info`, `doctor`
and `demo`, the model cards and the benchmark."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers import PreTrainedConfig

from .models import baichuan, chatglm, glm, glm130b, qwen
from .models.chatglm.vocabulary_chatglm import TOKENIZER_MODEL, version_beside
from .models.chatglm.vocabulary_chatglm import VERSIONS as CHATGLM_VERSIONS
from .models.glm.configuration_glm import SavedGLMConfig
from .stand_ins import imported
from .tokenization.folder import Folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODELS = f"{__package__}.models"


class Shape(NamedTuple):
    """Sizes of a decoder as Llama counts them; `ffn_size` is the width of a gated MLP with three matrices."""

    hidden_size: int
    layers: int
    heads: int
    ffn_size: int
    vocab_size: int


class Line(NamedTuple):
    """One published line of models, as model cards, `info` and the demo name it."""

    title: str  # the authors' name for it
    license: str  # of the original weights, by name; fine-tuned weights remain under it
    paper: str  # arXiv identifier of the report that describes it
    license_name: str  # the same in metadata
    demo: str | None = None  # folder of its tiny checkpoint in `demo/checkpoints`, if the demo has one


class Architecture(NamedTuple):
    """One kind of network among a family's: what `doctor` checks and the benchmark measures."""

    fields: Callable[[Shape], dict[str, Any]]  # what makes it this kind, in the words of the family's configuration
    control_tokens: tuple[str, ...] = ()  # the configuration's names of their ids
    prompt_end: tuple[str, ...] = ()  # those that end a prompt, which then sees itself in both directions
    vllm: str = "not served: its prompts see themselves in both directions"  # what serves it there


class Family(NamedTuple):
    """One row."""

    config: type[PreTrainedConfig]  # its `model_type` is the key
    module: str  # of the model classes, which are imported from it when they are asked for
    model_names: dict[str, str]  # name of the auto class -> name of the model class
    tokenizers: tuple[type, ...]  # found by their class names
    lines: dict[str, Line]
    line_of: Callable[[Any], str]  # the name of a configuration's line
    architectures: dict[str, Architecture]
    architecture_of: Callable[[Any], str]  # the name of a configuration's architecture
    trained_length: Callable[[Any], int]  # tokens of prompt and answer that the model was trained on
    decisions: dict[str, Callable[[Any], Any]]  # what `info` tells about a configuration
    refusals: dict[str, str] = {}  # name of an auto class that it lacks -> what to use, if not one of `model_names`
    variants: dict[type[PreTrainedConfig], str] = {}  # class of a single architecture -> module of its model classes
    saved_as: tuple[type[PreTrainedConfig], ...] = ()  # what reads a `model_type` that only saved files have

    @property
    def models(self) -> dict[str, type["PreTrainedModel"]]:
        """Name of the auto class -> model class."""
        return {auto_class: imported(self.module, name) for auto_class, name in self.model_names.items()}

    @property
    def generates_with(self) -> str:
        """The (first) auto class that gives the model with its output head."""
        return next(name for name in self.model_names if name in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM"))

    def make_config(self, architecture: str, shape: Shape, **overrides: Any) -> PreTrainedConfig:
        """The configuration of a model of that architecture and shape, with ids of control tokens at the vocabulary's end
        and 0, 1 and 2 for padding, begin and end otherwise."""
        kind = self.architectures[architecture]
        sizes = {
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
        }
        ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        ids |= {name: shape.vocab_size - CONTROL_IDS + index for index, name in enumerate(kind.control_tokens)}
        return self.config.from_dict(sizes | ids | kind.fields(shape) | overrides)


BY_PLUGIN = "served by the models of this package (docs/serving.md)"
CONTROL_IDS = 16  # so many ids at the end of the vocabulary are left to control tokens
BLANKS = ("mask_token_id", "gmask_token_id", "smask_token_id")
GLM_CONTROL_TOKENS = (*BLANKS, "sop_token_id", "eop_token_id")
CHATGLM_CONTROL_TOKENS = (*BLANKS, "bos_token_id", "eos_token_id")


def _baichuan(shape: Shape, position_embedding: str, norm_head: bool) -> dict[str, Any]:
    return {
        "intermediate_size": shape.ffn_size,
        "position_embedding": position_embedding,
        "norm_head": norm_head,
        "model_max_length": 4096,
    }


def _chatglm(shape: Shape) -> dict[str, Any]:
    # Two matrices with the parameters of three.
    return {"architecture": "chatglm", "inner_hidden_size": shape.ffn_size * 3 // 2, "position_encoding_2d": True}


def _chatglm2(shape: Shape) -> dict[str, Any]:
    return {
        "architecture": "chatglm2",
        "ffn_hidden_size": shape.ffn_size,
        "kv_channels": shape.hidden_size // shape.heads,
        "multi_query_attention": True,
        "multi_query_group_num": min(2, shape.heads),
        "seq_length": 8192,
    }


def _glm(shape: Shape) -> dict[str, Any]:
    dropouts = ("embedding_dropout_prob", "attention_dropout_prob", "output_dropout_prob")
    return {"max_sequence_length": 2**15, "eos_token_id": None, **dict.fromkeys(dropouts, 0.0)}


def _glm130b(shape: Shape) -> dict[str, Any]:
    return {
        "inner_hidden_size": shape.ffn_size,
        "max_sequence_length": 2048,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }


def _qwen(shape: Shape) -> dict[str, Any]:
    return {
        "intermediate_size": 2 * shape.ffn_size,
        "seq_length": 2048,  # dynamic NTK and LogN act beyond, as in Qwen-7B
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "emb_dropout_prob": 0.0,
        "attn_dropout_prob": 0.0,
    }


def _chatglm_line(config: Any) -> str:
    """ChatGLM2 and ChatGLM3 share their architecture; their tokenizers' files, or the name the checkpoint was loaded from, tell
    them apart, and `chatglm2` is the answer if these do not."""
    if config.architecture != "chatglm2":
        return config.architecture
    vocabulary = Path(config.name_or_path, TOKENIZER_MODEL) if config.name_or_path else None
    saved = Folder(vocabulary).read("tokenizer_config.json").get("generation")
    told = saved if saved in CHATGLM_VERSIONS else version_beside(vocabulary, {"name_or_path": config.name_or_path})
    return told or "chatglm2"


def _rope_ratio(config: Any) -> str:
    if config.architecture == "chatglm":
        return "not used by this architecture"
    effect = {"base": "multiplies the rotary base", "linear": "divides the positions"}[config.rope_ratio_type]
    return f"{config.rope_ratio} ({effect}; set rope_ratio_type to change that)"


def _learned_prefix(config: Any) -> str:
    how = "projected by an MLP" if config.prefix_projection else "learned directly"
    return f"{config.pre_seq_len} positions, {how}" if config.pre_seq_len else "none"


def _weight_bits(config: Any) -> str:
    return f"{config.quantization_bit}-bit weights" if config.quantization_bit else "none"


def _known_control_tokens(config: Any, names: tuple[str, ...] = GLM_CONTROL_TOKENS) -> str:
    unknown = [name for name in names if name not in BLANKS and getattr(config, name) is None]
    if all(getattr(config, name) is None for name in BLANKS):  # BERT's vocabulary has one kind
        unknown.append(f"those of {', '.join(BLANKS)} that the vocabulary has")
    return f"unknown: set {', '.join(unknown)}" if unknown else "known"


FAMILIES: tuple[Family, ...] = (
    Family(
        config=baichuan.BaichuanConfig,
        module=f"{MODELS}.baichuan.modeling_baichuan",
        model_names={
            "AutoModel": "BaichuanModel",
            "AutoModelForCausalLM": "BaichuanForCausalLM",
            "AutoModelForSequenceClassification": "BaichuanForSequenceClassification",
            "AutoModelForTokenClassification": "BaichuanForTokenClassification",
            "AutoModelForQuestionAnswering": "BaichuanForQuestionAnswering",
        },
        tokenizers=(baichuan.BaichuanTokenizer, baichuan.BaiChuanTokenizer),
        lines={
            "baichuan": Line(
                "Baichuan",
                "Baichuan-7B License or Community License for Baichuan-13B Model",
                "2309.10305",
                "baichuan-community-license",
            ),
            "baichuan2": Line(
                "Baichuan 2",
                "Community License for Baichuan2 Model",
                "2309.10305",
                "baichuan2-community-license",
                demo="baichuan",
            ),
        },
        line_of=lambda config: "baichuan2" if config.norm_head else "baichuan",
        architectures={
            "baichuan-rope": Architecture(lambda shape: _baichuan(shape, "rope", norm_head=False), vllm=BY_PLUGIN),
            "baichuan-alibi": Architecture(lambda shape: _baichuan(shape, "alibi", norm_head=True), vllm=BY_PLUGIN),
        },
        architecture_of=lambda config: f"baichuan-{config.position_embedding}",
        trained_length=lambda config: config.max_position_embeddings or config.model_max_length,
        decisions={
            "positions": lambda c: {"rope": "RoPE", "alibi": "ALiBi"}[c.position_embedding],
            "output head": lambda c: "NormHead" if c.norm_head else "linear",
            "max-z loss weight": lambda c: c.z_loss_weight,
        },
    ),
    # AutoModel gives the generation model, as the checkpoints' own `auto_map` does.
    Family(
        config=chatglm.ChatGLMConfig,
        module=f"{MODELS}.chatglm.modeling_chatglm_auto",
        variants={
            chatglm.ChatGLM1Config: f"{MODELS}.chatglm.modeling_chatglm",
            chatglm.ChatGLM2Config: f"{MODELS}.chatglm.modeling_chatglm2",
        },
        model_names={
            "AutoModel": "ChatGLMForConditionalGeneration",
            "AutoModelForCausalLM": "ChatGLMForConditionalGeneration",
            "AutoModelForSeq2SeqLM": "ChatGLMForConditionalGeneration",
            "AutoModelForSequenceClassification": "ChatGLMForSequenceClassification",
        },
        tokenizers=(chatglm.ChatGLMTokenizer,),
        lines={
            "chatglm": Line("ChatGLM-6B", "ChatGLM-6B License", "2406.12793", "chatglm-6b-license", "chatglm"),
            "chatglm2": Line("ChatGLM2-6B", "ChatGLM2-6B License", "2406.12793", "chatglm2-6b-license", "chatglm2"),
            "chatglm3": Line("ChatGLM3-6B", "ChatGLM3-6B License", "2406.12793", "chatglm3-6b-license", "chatglm3"),
        },
        line_of=_chatglm_line,
        architectures={
            "chatglm": Architecture(_chatglm, CHATGLM_CONTROL_TOKENS, prompt_end=("gmask_token_id", "bos_token_id")),
            "chatglm2": Architecture(
                _chatglm2,
                vllm=f"{BY_PLUGIN}; not with P-tuning or multi_query_attention false",
            ),
        },
        architecture_of=lambda config: config.architecture,
        trained_length=lambda config: config.max_position_embeddings,
        decisions={
            "architecture": lambda c: {
                "chatglm": "prefix language model, 2-D rotary positions (ChatGLM-6B)",
                "chatglm2": "causal, multi-query, partial rotary positions (ChatGLM2, ChatGLM3)",
            }[c.architecture],
            "rope_ratio": _rope_ratio,
            "key/value heads": lambda c: f"{c.num_key_value_heads} of {c.num_attention_heads}",
            "P-tuning v2 prefix": _learned_prefix,
            "quantization": _weight_bits,
        },
    ),
    # GLM-4 has the same `model_type`: the configuration hands it over.
    Family(
        config=glm.GLMConfig,
        module=f"{MODELS}.glm.modeling_glm",
        saved_as=(SavedGLMConfig,),
        model_names={
            "AutoModel": "GLMModel",
            "AutoModelForSeq2SeqLM": "GLMForConditionalGeneration",
            "AutoModelForMultipleChoice": "GLMForMultipleChoice",
        },
        refusals={
            "AutoModelForCausalLM": "GLM is no causal language model, it fills blanks: load it with AutoModelForSeq2SeqLM, and "
            "let hf_cnllm.infill(model, tokenizer, text) or tokenizer.build_inputs_for_generation ask it."
        },
        tokenizers=(glm.GLMChineseTokenizer, glm.GLMGPT2Tokenizer, glm.GLMBertTokenizer, glm.GLMRobertaTokenizer),
        lines={
            "glm": Line(
                "GLM",
                "the license stated with the original checkpoint",
                "2103.10360",
                "see-original-checkpoint",
                "glm",
            )
        },
        line_of=lambda config: "glm",
        architectures={"glm": Architecture(_glm, GLM_CONTROL_TOKENS, prompt_end=("gmask_token_id", "sop_token_id"))},
        architecture_of=lambda config: "glm",
        trained_length=lambda config: config.max_position_embeddings,
        decisions={
            "positions": lambda c: "learned, with block positions" if c.block_position_encoding else "learned",
            "control tokens": _known_control_tokens,
        },
    ),
    # AutoModel gives the generation model, as in ChatGLM-6B; no checkpoint has an `auto_map`.
    Family(
        config=glm130b.GLM130BConfig,
        module=f"{MODELS}.glm130b.modeling_glm130b",
        model_names={
            "AutoModel": "GLM130BForConditionalGeneration",
            "AutoModelForSeq2SeqLM": "GLM130BForConditionalGeneration",
            "AutoModelForCausalLM": "GLM130BForConditionalGeneration",
            "AutoModelForMultipleChoice": "GLM130BForMultipleChoice",
        },
        tokenizers=(glm130b.GLM130BTokenizer,),
        lines={"glm130b": Line("GLM-130B", "GLM-130B License", "2210.02414", "glm-130b-license", "glm130b")},
        line_of=lambda config: "glm130b",
        architectures={
            "glm130b": Architecture(_glm130b, CHATGLM_CONTROL_TOKENS, prompt_end=("gmask_token_id", "bos_token_id"))
        },
        architecture_of=lambda config: "glm130b",
        trained_length=lambda config: config.max_position_embeddings,
        decisions={
            "positions": lambda c: "rotary, those of a blank where its mask token stands",
            "control tokens": lambda c: _known_control_tokens(c, CHATGLM_CONTROL_TOKENS),
            "quantization": _weight_bits,
        },
    ),
    Family(
        config=qwen.QWenConfig,
        module=f"{MODELS}.qwen.modeling_qwen",
        model_names={
            "AutoModel": "QWenModel",
            "AutoModelForCausalLM": "QWenLMHeadModel",
            "AutoModelForSequenceClassification": "QWenForSequenceClassification",
            "AutoModelForTokenClassification": "QWenForTokenClassification",
        },
        tokenizers=(qwen.QWenTokenizer,),
        lines={
            "qwen": Line(
                "Qwen", "Tongyi Qianwen License Agreement", "2309.16609", "tongyi-qianwen-license-agreement", "qwen"
            )
        },
        line_of=lambda config: "qwen",
        architectures={"qwen": Architecture(_qwen, vllm=BY_PLUGIN)},
        architecture_of=lambda config: "qwen",
        trained_length=lambda config: config.seq_length or config.max_position_embeddings,
        decisions={
            "dynamic NTK": lambda c: "on" if c.use_dynamic_ntk else "off",
            "LogN": lambda c: "on" if c.use_logn_attn else "off",
            "windows": lambda c: "by layer" if c.window_sizes else "none",
        },
    ),
)

LINES: dict[str, Line] = {name: line for family in FAMILIES for name, line in family.lines.items()}


def family_of(config: PreTrainedConfig) -> Family | None:
    """The row of a loaded configuration; None if it is of no family here (GLM-4 has the `model_type` of GLM)."""
    return next((family for family in FAMILIES if isinstance(config, family.config)), None)


def is_prefix_lm(config: Any) -> bool:
    """Whether models of a configuration fill blanks, from which their tokens' positions follow: GLM, GLM-130B and ChatGLM-6B."""
    return hasattr(config, "has_kinds_of_blanks")


def family_with(architecture: str) -> Family:
    """The row that has an architecture of that name."""
    return next(family for family in FAMILIES if architecture in family.architectures)
