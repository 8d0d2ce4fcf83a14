"""Baichuan, GLM/ChatGLM and Qwen v1 on today's Transformers.

Importing this package registers its models and tokenizers, nothing else: original checkpoints then load with plain
`AutoModel*.from_pretrained` and `AutoTokenizer.from_pretrained`.
"""

from typing import TYPE_CHECKING, Any

from ._stack import naming_what_does_not_fit
from .stand_ins import imported

with naming_what_does_not_fit():
    from . import _compat, models  # noqa: F401  # _compat before all else: it says so if transformers is too old
    from .auto import FAMILIES
    from .registration import register

if TYPE_CHECKING:
    from .attention.bloom import use_folded_alibi  # noqa: F401
    from .loss.causal_lm import causal_lm_loss, chunked_causal_lm_loss  # noqa: F401
    from .models.baichuan import *  # noqa: F403
    from .models.chatglm import *  # noqa: F403
    from .models.chatglm.prefix_encoder import load_prefix_encoder  # noqa: F401
    from .models.chatglm.quantization import ChatGLMQuantizationConfig  # noqa: F401
    from .models.chatglm.tool_calls import parse_tool_call  # noqa: F401
    from .models.glm import *  # noqa: F403
    from .models.glm130b import *  # noqa: F403
    from .models.qwen import *  # noqa: F403

__version__ = "0.2.0"
# What is imported when it is asked for, and from where.
_LATER = {
    "ChatGLMQuantizationConfig": "models.chatglm.quantization",
    "DataCollatorForBlankInfilling": "data.blank_infilling",
    "causal_lm_loss": "loss.causal_lm",
    "chunked_causal_lm_loss": "loss.causal_lm",
    "create_model_card": "hub.model_card",
    "encode_conversation": "data.conversations",
    "encode_conversations": "data.conversations",
    "fine_tuned_model_card": "hub.model_card",
    "infill": "data.infilling",
    "load_instructions": "data.conversations",
    "load_prefix_encoder": "models.chatglm.prefix_encoder",
    "map_conversations": "data.formats",
    "parse_tool_call": "models.chatglm.tool_calls",
    "read_conversations": "data.conversations",
    "read_judgment": "data.preferences",
    "read_pair": "data.preferences",
    "read_preferences": "data.preferences",
    "read_question": "data.preferences",
    "reply_end_ids": "data.conversations",
    "sample_ghost_attention": "data.ghost_attention",
    "to_messages": "data.formats",
    "use_folded_alibi": "attention.bloom",
    "with_system_in_question": "data.conversations",
}

_LATER |= {
    name: f"models.{family}"
    for family in ("baichuan", "chatglm", "glm", "glm130b", "qwen")
    for name in getattr(models, family).__all__
}

__all__ = ["FAMILIES", "register", *_LATER]


def __getattr__(name: str) -> Any:
    if name == "accelerate":  # its name in the first release
        name = "use_folded_alibi"
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return imported(f"{__name__}.{_LATER[name]}", name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register()
