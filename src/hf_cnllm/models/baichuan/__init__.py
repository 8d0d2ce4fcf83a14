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


__all__ = [
    "BaiChuanForCausalLM",
    "BaichuanConfig",
    "BaichuanForCausalLM",
    "BaichuanForQuestionAnswering",
    "BaichuanForSequenceClassification",
    "BaichuanForTokenClassification",
    "BaichuanModel",
    "BaichuanPreTrainedModel",
]
