"""Baichuan, GLM/ChatGLM and Qwen v1 on today's Transformers.

Importing this package registers its models and tokenizers, nothing else: original checkpoints then load with plain
`AutoModel*.from_pretrained` and `AutoTokenizer.from_pretrained`.
"""

from ._stack import unmet_requirements

try:
    from . import _compat  # noqa: F401  # before all else: it says so if transformers is too old
    from .attention.bloom import use_folded_alibi
    from .auto import FAMILIES, register
    from .data.blank_infilling import DataCollatorForBlankInfilling, infill
    from .data.conversations import (
        encode_conversation,
        load_instructions,
        read_conversations,
        reply_end_ids,
        with_system_in_question,
    )
    from .hub.model_card import fine_tuned_model_card
    from .loss.causal_lm import causal_lm_loss, chunked_causal_lm_loss
    from .models.baichuan import *  # noqa: F403
    from .models.baichuan import __all__ as _baichuan
    from .models.chatglm import *  # noqa: F403
    from .models.chatglm import __all__ as _chatglm
    from .models.chatglm.prefix_encoder import load_prefix_encoder
    from .models.chatglm.quantization import ChatGLMQuantizationConfig
    from .models.chatglm.tool_calls import parse_tool_call
    from .models.glm import *  # noqa: F403
    from .models.glm import __all__ as _glm
    from .models.qwen import *  # noqa: F403
    from .models.qwen import __all__ as _qwen
except Exception as error:
    if unmet := unmet_requirements():  # half an upgrade is the usual reason
        raise ImportError(f"{error} ({'; '.join(unmet)})") from error
    raise

__version__ = "0.1.0"
__all__ = [
    "FAMILIES",
    "ChatGLMQuantizationConfig",
    "DataCollatorForBlankInfilling",
    "causal_lm_loss",
    "chunked_causal_lm_loss",
    "encode_conversation",
    "fine_tuned_model_card",
    "infill",
    "load_instructions",
    "load_prefix_encoder",
    "parse_tool_call",
    "read_conversations",
    "register",
    "reply_end_ids",
    "use_folded_alibi",
    "with_system_in_question",
    *_baichuan,
    *_chatglm,
    *_glm,
    *_qwen,
]

accelerate = use_folded_alibi  # its name in the first release

register()
