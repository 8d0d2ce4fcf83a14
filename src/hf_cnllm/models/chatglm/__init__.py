from .configuration_chatglm import ChatGLM1Config, ChatGLM2Config, ChatGLMConfig
from .modeling_chatglm_auto import (
    ChatGLMForConditionalGeneration,
    ChatGLMForSequenceClassification,
    ChatGLMModel,
    ChatGLMPreTrainedModel,
)
from .tokenization_chatglm import ChatGLMTokenizer

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
