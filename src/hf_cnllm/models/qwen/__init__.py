from .configuration_qwen import QWenConfig
from .modeling_qwen import (
    QWenForSequenceClassification,
    QWenForTokenClassification,
    QWenLMHeadModel,
    QWenModel,
    QWenPreTrainedModel,
)
from .tokenization_qwen import QWenTokenizer

__all__ = [
    "QWenConfig",
    "QWenForSequenceClassification",
    "QWenForTokenClassification",
    "QWenLMHeadModel",
    "QWenModel",
    "QWenPreTrainedModel",
    "QWenTokenizer",
]
