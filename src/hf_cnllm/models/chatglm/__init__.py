from typing import TYPE_CHECKING

from ...stand_ins import later
from .configuration_chatglm import ChatGLM1Config, ChatGLM2Config, ChatGLMConfig
from .tokenization_chatglm import ChatGLMTokenizer

if TYPE_CHECKING:
    from .modeling_chatglm_auto import (
        ChatGLMForConditionalGeneration,
        ChatGLMForSequenceClassification,
        ChatGLMModel,
        ChatGLMPreTrainedModel,
    )

__all__ = [
    "ChatGLM1Config",
    "ChatGLM2Config",
    "ChatGLMConfig",
    "ChatGLMForConditionalGeneration",
    "ChatGLMForSequenceClassification",
    "ChatGLMModel",
    "ChatGLMPreTrainedModel",
    "ChatGLMTokenizer",
]

__getattr__, __dir__ = later(__name__, "modeling_chatglm_auto", __all__)
