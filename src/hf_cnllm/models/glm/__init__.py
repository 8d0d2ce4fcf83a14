from .configuration_glm import GLMConfig
from .modeling_glm import GLMForConditionalGeneration, GLMForMultipleChoice, GLMModel, GLMPreTrainedModel


__all__ = [
    "GLMConfig",
    "GLMForConditionalGeneration",
    "GLMForMultipleChoice",
    "GLMModel",
    "GLMPreTrainedModel",
]
