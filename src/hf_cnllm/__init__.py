"""Baichuan, GLM/ChatGLM and Qwen v1 on today's Transformers.

Importing this package registers its models and tokenizers, nothing else: original checkpoints then load with plain
`AutoModel*.from_pretrained` and `AutoTokenizer.from_pretrained`.
"""

from ._stack import unmet_requirements

try:
    from . import _compat  # noqa: F401  # before all else: it says so if transformers is too old
    from .attention.bloom import accelerate
    from .auto import FAMILIES, register
    from .models.baichuan import *  # noqa: F403
    from .models.baichuan import __all__ as _baichuan
    from .models.chatglm import *  # noqa: F403
    from .models.chatglm import __all__ as _chatglm
    from .models.glm import *  # noqa: F403
    from .models.glm import __all__ as _glm
    from .models.qwen import *  # noqa: F403
    from .models.qwen import __all__ as _qwen
except ImportError as error:
    if unmet := unmet_requirements():  # half an upgrade is the usual reason
        raise ImportError(f"{error} ({'; '.join(unmet)})") from error
    raise

__version__ = "0.1.0"
__all__ = ["FAMILIES", "accelerate", "register", *_baichuan, *_chatglm, *_glm, *_qwen]

register()
