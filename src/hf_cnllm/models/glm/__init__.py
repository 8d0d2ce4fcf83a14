from typing import TYPE_CHECKING

from ...stand_ins import later
from .configuration_glm import GLMConfig
from .tokenization_glm import GLMChineseTokenizer
from .tokenization_glm_english import GLMBertTokenizer, GLMGPT2Tokenizer, GLMRobertaTokenizer

if TYPE_CHECKING:
    from .modeling_glm import GLMForConditionalGeneration, GLMForMultipleChoice, GLMModel, GLMPreTrainedModel

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

__getattr__, __dir__ = later(__name__, "modeling_glm", __all__)
