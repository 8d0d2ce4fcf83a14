from .configuration_baichuan import BaichuanConfig
from .modeling_baichuan import (
    BaiChuanForCausalLM,
    BaichuanForCausalLM,
    BaichuanForQuestionAnswering,
    BaichuanForSequenceClassification,
    BaichuanForTokenClassification,
    BaichuanModel,
    BaichuanPreTrainedModel,
)
from .tokenization_baichuan import BaiChuanTokenizer, BaichuanTokenizer

__all__ = [
    "BaiChuanForCausalLM",
    "BaiChuanTokenizer",
    "BaichuanConfig",
    "BaichuanForCausalLM",
    "BaichuanForQuestionAnswering",
    "BaichuanForSequenceClassification",
    "BaichuanForTokenClassification",
    "BaichuanModel",
    "BaichuanPreTrainedModel",
    "BaichuanTokenizer",
]
