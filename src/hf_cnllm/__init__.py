"""Baichuan, GLM/ChatGLM and Qwen v1 on today's Transformers.

Importing this package registers its models and tokenizers, nothing else: original checkpoints then load with plain
`AutoModel*.from_pretrained` and `AutoTokenizer.from_pretrained`.
"""

from importlib import import_module
from typing import Any

from ._stack import unmet_requirements

try:
    from . import _compat, models  # noqa: F401  # _compat before all else: it says so if transformers is too old
    from .attention.bloom import use_folded_alibi
    from .auto import FAMILIES, register
    from .loss.causal_lm import causal_lm_loss, chunked_causal_lm_loss
    from .models.baichuan import *  # noqa: F403
    from .models.chatglm import *  # noqa: F403
    from .models.chatglm.prefix_encoder import load_prefix_encoder
    from .models.chatglm.quantization import ChatGLMQuantizationConfig
    from .models.chatglm.tool_calls import parse_tool_call
    from .models.glm import *  # noqa: F403
    from .models.glm130b import *  # noqa: F403
    from .models.qwen import *  # noqa: F403
except Exception as error:
    if unmet := unmet_requirements():  # half an upgrade is the usual reason
        raise ImportError(f"{error} ({'; '.join(unmet)})") from error
    raise

__version__ = "0.2.0"
# Imported when they are asked for: no model needs them.
_LATER = {
    "DataCollatorForBlankInfilling": "data.blank_infilling",
    "create_model_card": "hub.model_card",
    "encode_conversation": "data.conversations",
    "encode_conversations": "data.conversations",
    "fine_tuned_model_card": "hub.model_card",
    "infill": "data.blank_infilling",
    "load_instructions": "data.conversations",
    "map_conversations": "data.formats",
    "read_conversations": "data.conversations",
    "read_judgment": "data.preferences",
    "read_pair": "data.preferences",
    "read_preferences": "data.preferences",
    "read_question": "data.preferences",
    "reply_end_ids": "data.conversations",
    "sample_ghost_attention": "data.ghost_attention",
    "to_messages": "data.formats",
    "with_system_in_question": "data.conversations",
}

__all__ = [
    "FAMILIES",
    "ChatGLMQuantizationConfig",
    "causal_lm_loss",
    "chunked_causal_lm_loss",
    "load_prefix_encoder",
    "parse_tool_call",
    "register",
    "use_folded_alibi",
    *models.baichuan.__all__,
    *models.chatglm.__all__,
    *models.glm.__all__,
    *models.glm130b.__all__,
    *models.qwen.__all__,
    *_LATER,
]

accelerate = use_folded_alibi  # its name in the first release


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_LATER[name]}", __name__), name)


register()
