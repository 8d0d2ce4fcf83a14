"""THE table: which classes serve which `model_type`, and the one function that tells transformers.

After `register()`, `AutoConfig`, `AutoModel*` and `AutoTokenizer` give these classes for the original checkpoints,
whether or not a script passes `trust_remote_code=True` or `use_fast=False`: transformers prefers registered classes to
the checkpoint's code files, for tokenizers when they are found by their class name.
"""

from typing import NamedTuple

import transformers
from peft import utils as peft_utils
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from .models import baichuan, chatglm, glm, qwen


class Family(NamedTuple):
    """One row: a configuration class, what `AutoModel*` makes of it, its tokenizers, and LoRA's default targets.

    Attributes:
        config: the configuration class; its `model_type` is the key.
        models: name of the auto class -> model class.
        tokenizers: the first is the default for the configuration; all are found by their class names.
        lora_targets: names of the modules that PEFT adapts when `LoraConfig(target_modules=None)`.
    """

    config: type[PreTrainedConfig]
    models: dict[str, type[PreTrainedModel]]
    tokenizers: tuple[type, ...] = ()
    lora_targets: tuple[str, ...] = ()


FAMILIES: tuple[Family, ...] = (
    Family(
        config=baichuan.BaichuanConfig,
        models={
            "AutoModel": baichuan.BaichuanModel,
            "AutoModelForCausalLM": baichuan.BaichuanForCausalLM,
            "AutoModelForSequenceClassification": baichuan.BaichuanForSequenceClassification,
            "AutoModelForTokenClassification": baichuan.BaichuanForTokenClassification,
            "AutoModelForQuestionAnswering": baichuan.BaichuanForQuestionAnswering,
        },
        tokenizers=(baichuan.BaichuanTokenizer, baichuan.BaiChuanTokenizer),
        lora_targets=("W_pack",),
    ),
    # AutoModel gives the generation model, as the checkpoints' own `auto_map` does.
    Family(
        config=chatglm.ChatGLMConfig,
        models={
            "AutoModel": chatglm.ChatGLMForConditionalGeneration,
            "AutoModelForCausalLM": chatglm.ChatGLMForConditionalGeneration,
            "AutoModelForSeq2SeqLM": chatglm.ChatGLMForConditionalGeneration,
            "AutoModelForSequenceClassification": chatglm.ChatGLMForSequenceClassification,
        },
        tokenizers=(chatglm.ChatGLMTokenizer,),
        lora_targets=("query_key_value",),
    ),
    # GLM-4 has the same `model_type`: the configuration hands it over, and its modules are LoRA targets too.
    Family(
        config=glm.GLMConfig,
        models={
            "AutoModel": glm.GLMModel,
            "AutoModelForSeq2SeqLM": glm.GLMForConditionalGeneration,
            "AutoModelForMultipleChoice": glm.GLMForMultipleChoice,
        },
        tokenizers=(
            glm.GLMChineseTokenizer,
            glm.GLMGPT2Tokenizer,
            glm.GLMBertTokenizer,
            glm.GLMRobertaTokenizer,
        ),
        lora_targets=("query_key_value", "q_proj", "v_proj"),
    ),
    Family(
        config=qwen.QWenConfig,
        models={
            "AutoModel": qwen.QWenModel,
            "AutoModelForCausalLM": qwen.QWenLMHeadModel,
            "AutoModelForSequenceClassification": qwen.QWenForSequenceClassification,
            "AutoModelForTokenClassification": qwen.QWenForTokenClassification,
        },
        tokenizers=(qwen.QWenTokenizer,),
        lora_targets=("c_attn",),
    ),
)


class TokenizerFoundByName(PreTrainedConfig):
    """The configuration that tokenizers are registered under. No checkpoint has it, so transformers finds them by their
    class name alone. A tokenizer under the configuration of its model would lose to the code files of a checkpoint when
    a script passes `trust_remote_code=True`."""

    model_type = "hf_cnllm_tokenizer"


def register() -> None:
    """Registers every family with transformers' auto classes and PEFT's default targets. Idempotent."""
    for family in FAMILIES:
        model_type = family.config.model_type
        AutoConfig.register(model_type, family.config, exist_ok=True)
        for auto_class, model_class in family.models.items():
            getattr(transformers, auto_class).register(family.config, model_class, exist_ok=True)
        for tokenizer_class in reversed(family.tokenizers):
            AutoTokenizer.register(TokenizerFoundByName, tokenizer_class=tokenizer_class, exist_ok=True)
        for targets in (
            peft_utils.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
            peft_utils.TRANSFORMERS_MODELS_TO_ADALORA_TARGET_MODULES_MAPPING,
        ):
            if family.lora_targets:
                targets.setdefault(model_type, list(family.lora_targets))
