from typing import TYPE_CHECKING

from ...stand_ins import later
from .configuration_glm130b import GLM130BConfig
from .tokenization_glm130b import GLM130BTokenizer

if TYPE_CHECKING:
    from .modeling_glm130b import (
        GLM130BForConditionalGeneration,
        GLM130BForMultipleChoice,
        GLM130BModel,
        GLM130BPreTrainedModel,
    )

__all__ = [
    "GLM130BConfig",
    "GLM130BForConditionalGeneration",
    "GLM130BForMultipleChoice",
    "GLM130BModel",
    "GLM130BPreTrainedModel",
    "GLM130BTokenizer",
]

__getattr__, __dir__ = later(__name__, "modeling_glm130b", __all__)
