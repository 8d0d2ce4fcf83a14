from typing import TYPE_CHECKING

from ...stand_ins import later
from .configuration_baichuan import BaichuanConfig
from .tokenization_baichuan import BaiChuanTokenizer, BaichuanTokenizer

if TYPE_CHECKING:
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

__getattr__, __dir__ = later(__name__, "modeling_baichuan", __all__)
