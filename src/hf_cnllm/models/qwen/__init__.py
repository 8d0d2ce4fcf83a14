from typing import TYPE_CHECKING

from ...stand_ins import later
from .configuration_qwen import QWenConfig
from .tokenization_qwen import QWenTokenizer

if TYPE_CHECKING:
    from .modeling_qwen import (
        QWenForSequenceClassification,
        QWenForTokenClassification,
        QWenLMHeadModel,
        QWenModel,
        QWenPreTrainedModel,
    )

__all__ = [
    "QWenConfig",
    "QWenForSequenceClassification",
    "QWenForTokenClassification",
    "QWenLMHeadModel",
    "QWenModel",
    "QWenPreTrainedModel",
    "QWenTokenizer",
]

__getattr__, __dir__ = later(__name__, "modeling_qwen", __all__)
