from .configuration_glm130b import GLM130BConfig
from .modeling_glm130b import (
    GLM130BForConditionalGeneration,
    GLM130BForMultipleChoice,
    GLM130BModel,
    GLM130BPreTrainedModel,
)
from .tokenization_glm130b import GLM130BTokenizer

__all__ = [
    "GLM130BConfig",
    "GLM130BForConditionalGeneration",
    "GLM130BForMultipleChoice",
    "GLM130BModel",
    "GLM130BPreTrainedModel",
    "GLM130BTokenizer",
]
