"""What is measured: each architecture of `hf_cnllm.families` in a given shape, and the Llama that has the same shape."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn
from transformers import LlamaConfig, PreTrainedConfig, PreTrainedModel

from hf_cnllm.families import CONTROL_IDS, Shape, family_of, family_with

SHAPES = {
    "cpu": Shape(hidden_size=512, layers=4, heads=8, ffn_size=1376, vocab_size=4096),
    "cuda": Shape(hidden_size=4096, layers=8, heads=32, ffn_size=11008, vocab_size=32000),
}


@dataclass(frozen=True)
class Subject:
    """One row of the table.

    Attributes:
        architecture: its name in `hf_cnllm.families.FAMILIES`.
        vocabulary, tiny_vocabulary: names of its folder among real vocabularies, and of the demo's tiny one.
        gated_ffn_size: of the Llama beside it, as a function of the shape.
    """

    architecture: str
    vocabulary: str
    tiny_vocabulary: str
    gated_ffn_size: Callable[[Shape], int] = lambda shape: shape.ffn_size

    @property
    def prompt_end(self) -> tuple[str, ...]:
        return family_with(self.architecture).architectures[self.architecture].prompt_end

    def config(self, shape: Shape) -> PreTrainedConfig:
        return family_with(self.architecture).make_config(self.architecture, shape)

    def key_value_heads(self, shape: Shape) -> int:
        return getattr(self.config(shape), "num_key_value_heads", None) or shape.heads

    def input_ids(self, shape: Shape, batch: int, length: int, generator: torch.Generator) -> torch.Tensor:
        """(batch, length) random text; a prefix model's ends in the tokens that begin the reply."""
        text = torch.randint(3, shape.vocab_size - CONTROL_IDS, (batch, length), generator=generator)
        config = self.config(shape)
        for index, name in enumerate(self.prompt_end):
            text[:, index - len(self.prompt_end)] = getattr(config, name)
        return text

    def attended_pairs(self, length: int) -> float:
        """Pairs of query and key in the attention of one head over a prompt."""
        if self.prompt_end:
            prefix = length - 1
            return prefix**2 + length
        return length * (length + 1) / 2


def _as_wide_as_glm(shape: Shape) -> int:
    """GLM's MLP is always four times as wide as the model, with two matrices."""
    return round(8 * shape.hidden_size / 3)


SUBJECTS = {
    subject.architecture: subject
    for subject in (
        Subject("baichuan-rope", "baichuan2", "baichuan"),
        Subject("baichuan-alibi", "baichuan2", "baichuan"),
        Subject("chatglm", "chatglm1", "chatglm"),
        Subject("chatglm2", "chatglm2", "chatglm2"),
        Subject("qwen", "qwen", "qwen"),
        Subject("glm", "glm_chinese", "glm", gated_ffn_size=_as_wide_as_glm),
    )
}


def auto_class_for(config: PreTrainedConfig) -> Any:
    """The one of transformers' auto classes that gives the model with its output head."""
    family = family_of(config)
    return getattr(transformers, family.generates_with if family else "AutoModelForCausalLM")


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
