"""What is measured: each family in a given shape, and the Llama that has the same shape."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, PreTrainedConfig, PreTrainedModel

from hf_cnllm.auto import FAMILIES, Family


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder as Llama counts them; `ffn_size` is the width of a gated MLP with three matrices."""

    hidden_size: int = 512
    layers: int = 4
    heads: int = 8
    ffn_size: int = 1376
    vocab_size: int = 4096

    @property
    def ungated_ffn_size(self) -> int:
        """Width of a two-matrix MLP with the parameters of the three-matrix one."""
        return self.ffn_size * 3 // 2


SHAPES = {"cpu": Shape(), "cuda": Shape(hidden_size=4096, layers=8, heads=32, ffn_size=11008, vocab_size=32000)}
SPECIAL_IDS = 16  # that many ids at the end of the vocabulary are left to control tokens


@dataclass(frozen=True)
class Subject:
    """One row of the table.

    Attributes:
        model_type: key of the family in `hf_cnllm.auto.FAMILIES`.
        fields: the shape in the words of the family's configuration.
        attention: `"causal"`, or `"prefix"` where the prompt attends to itself both ways.
        vocabulary, tiny_vocabulary: names of its folder among real vocabularies, and of the demo's tiny one.
        key_value_heads, gated_ffn_size: of the Llama beside it, as a function of the shape.
    """

    model_type: str
    fields: Callable[[Shape], dict]
    vocabulary: str
    tiny_vocabulary: str
    attention: str = "causal"
    key_value_heads: Callable[[Shape], int] = lambda shape: shape.heads
    gated_ffn_size: Callable[[Shape], int] = lambda shape: shape.ffn_size

    def config(self, shape: Shape) -> PreTrainedConfig:
        return _family(self.model_type).config.from_dict(
            {
                "vocab_size": shape.vocab_size,
                "hidden_size": shape.hidden_size,
                "num_attention_heads": shape.heads,
                "pad_token_id": 0,
                "bos_token_id": 1,
                "eos_token_id": 2,
            }
            | self.fields(shape),
        )

    def input_ids(self, shape: Shape, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """(batch, length) random text; a prefix model's ends in the tokens that begin the reply."""
        text = torch.randint(3, shape.vocab_size - SPECIAL_IDS, (batch, length), generator=generator)
        if self.attention == "prefix":
            text[:, -2], text[:, -1] = _control_ids(shape)["gmask_token_id"], _control_ids(shape)["sop_token_id"]
        return text

    def attended_pairs(self, length: int) -> float:
        """Pairs of query and key in the attention of one head over a prompt."""
        if self.attention == "prefix":
            prefix = length - 1
            return prefix**2 + length
        return length * (length + 1) / 2


def _control_ids(shape: Shape) -> dict[str, int]:
    names = ("mask_token_id", "gmask_token_id", "smask_token_id", "sop_token_id", "eop_token_id")
    return {name: shape.vocab_size - SPECIAL_IDS + i for i, name in enumerate(names)}


def _baichuan(position_embedding: str) -> Callable[[Shape], dict]:
    return lambda shape: {
        "num_hidden_layers": shape.layers,
        "intermediate_size": shape.ffn_size,
        "position_embedding": position_embedding,
        "model_max_length": 4096,
        "norm_head": True,
    }


def _chatglm(shape: Shape) -> dict:
    ids = _control_ids(shape)
    return {
        "architecture": "chatglm",
        "num_layers": shape.layers,
        "inner_hidden_size": shape.ungated_ffn_size,
        "position_encoding_2d": True,
        "bos_token_id": ids.pop("sop_token_id"),
        "eos_token_id": ids.pop("eop_token_id"),
        **ids,
    }


def _chatglm2(shape: Shape) -> dict:
    return {
        "architecture": "chatglm2",
        "num_layers": shape.layers,
        "ffn_hidden_size": shape.ffn_size,
        "kv_channels": shape.hidden_size // shape.heads,
        "multi_query_attention": True,
        "multi_query_group_num": _two_heads(shape),
        "seq_length": 8192,
    }


def _two_heads(shape: Shape) -> int:
    return min(2, shape.heads)


def _qwen(shape: Shape) -> dict:
    # As in Qwen-7B: dynamic NTK and LogN act past 2,048 tokens.
    return {
        "num_hidden_layers": shape.layers,
        "intermediate_size": 2 * shape.ffn_size,
        "seq_length": 2048,
        "use_dynamic_ntk": True,
        "use_logn_attn": True,
        "emb_dropout_prob": 0.0,
        "attn_dropout_prob": 0.0,
    }


def _glm(shape: Shape) -> dict:
    return {
        "num_layers": shape.layers,
        "max_sequence_length": 2**15,
        "embedding_dropout_prob": 0.0,
        "attention_dropout_prob": 0.0,
        "output_dropout_prob": 0.0,
        "eos_token_id": _control_ids(shape)["eop_token_id"],
        **_control_ids(shape),
    }


def _as_wide_as_glm(shape: Shape) -> int:
    """GLM's MLP is always four times as wide as the model, with two matrices."""
    return round(8 * shape.hidden_size / 3)


SUBJECTS = {
    # name: (model_type, fields, vocabulary folder, the demo's tiny vocabulary, ...)
    "baichuan-rope": Subject("baichuan", _baichuan("rope"), "baichuan2", "baichuan"),
    "baichuan-alibi": Subject("baichuan", _baichuan("alibi"), "baichuan2", "baichuan"),
    "chatglm": Subject("chatglm", _chatglm, "chatglm1", "chatglm", attention="prefix"),
    "chatglm2": Subject("chatglm", _chatglm2, "chatglm2", "chatglm2", key_value_heads=_two_heads),
    "qwen": Subject("qwen", _qwen, "qwen", "qwen"),
    "glm": Subject("glm", _glm, "glm_chinese", "glm", attention="prefix", gated_ffn_size=_as_wide_as_glm),
}


def _family(model_type: str) -> Family | None:
    return next((family for family in FAMILIES if family.config.model_type == model_type), None)


def auto_class_for(config: PreTrainedConfig) -> Any:
    """The one of transformers' auto classes that gives the model with its output head."""
    family = _family(config.model_type)
    is_seq2seq = family is not None and "AutoModelForCausalLM" not in family.models
    return AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM


def llama_config(subject: Subject, shape: Shape) -> LlamaConfig:
    """transformers' Llama with the subject's shape: the same width, depth, heads, vocabulary and linear parameters."""
    return LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=subject.gated_ffn_size(shape),
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=subject.key_value_heads(shape),
        max_position_embeddings=2**15,
        pad_token_id=0,
    )


def linear_flops_per_token(model: PreTrainedModel) -> int:
    """Floating-point operations per token in the linear layers before the output head: two per weight."""
    head = model.get_output_embeddings()
    linear = (module for module in model.modules() if isinstance(module, nn.Linear) and module is not head)
    return sum(2 * module.in_features * module.out_features for module in linear)


def attention_flops(shape: Shape, pairs: float) -> float:
    """Of all layers: a product with the keys and one with the values for each attended pair."""
    return shape.layers * 4 * shape.hidden_size * pairs


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes that one decoding step reads: every weight but the rows of the embedding that it does not look up."""
    embedding = model.get_input_embeddings().weight
    tied = any(p is embedding for p in model.get_output_embeddings().parameters())
    return sum(p.numel() * p.element_size() for p in model.parameters() if tied or p is not embedding)
