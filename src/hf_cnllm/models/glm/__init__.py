from .configuration_glm import GLMConfig
from .modeling_glm import GLMForConditionalGeneration, GLMForMultipleChoice, GLMModel, GLMPreTrainedModel
from .tokenization_glm import GLMBertTokenizer, GLMChineseTokenizer, GLMGPT2Tokenizer, GLMRobertaTokenizer

__all__ = [
    "GLMBertTokenizer",
    "GLMChineseTokenizer",
    "GLMConfig",
    "GLMForConditionalGeneration",
    "GLMForMultipleChoice",
    "GLMGPT2Tokenizer",
    "GLMModel",
    "GLMPreTrainedModel",
    "GLMRobertaTokenizer",
]
