"""vLLM's insides: the only file that imports what vLLM does not document for models and plugins of others.

vLLM's guide for models of others names the registry, the interfaces and the parallel layers; this file has the rest. A vLLM
that lacks some of it is not served at all (`unsupported.py`), rather than with wrong tokens.
"""

# ruff: noqa: F401  (others import these from here)

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from vllm.entrypoints.generate.base.protocol import (
    DeltaMessage,
    DeltaToolCall,
    ExtractedToolCallInformation,
    FunctionCall,
    ToolCall,
)
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.parser import ParserManager
from vllm.tool_parsers import ToolParser, ToolParserManager
from vllm.transformers_utils.config import _CONFIG_REGISTRY
from vllm.transformers_utils.model_arch_config_convertor import (
    MODEL_ARCH_CONFIG_CONVERTORS,
    ModelArchConfigConvertorBase,
)
from vllm.v1.attention.backends.registry import AttentionBackendEnum


def use_own_config(model_type: str) -> None:
    """Makes vLLM take the class that is registered with transformers, not one of its own, for `model_type`."""
    _CONFIG_REGISTRY.pop(model_type, None)


def set_convertor(model_type: str, convertor: type[ModelArchConfigConvertorBase]) -> None:
    """`convertor` tells vLLM the sizes and the longest sequence of models of `model_type`."""
    MODEL_ARCH_CONFIG_CONVERTORS[model_type] = convertor


def set_architecture_hook(architecture: str, hook: type[VerifyAndUpdateConfig]) -> None:
    """`hook` sees, and may change, the configuration of an engine for `architecture`."""
    MODELS_CONFIG_MAP[architecture] = hook


def add_stop_ids(model_config: Any, stop_ids: list[int]) -> None:
    """Ends answers at `stop_ids`, besides the tokens that generation_config.json names. vLLM takes them from nowhere else: its
    overrides of that file leave `eos_token_id` out."""
    model_config.try_get_generation_config = partial(_with_stop_ids, model_config, stop_ids)


def _with_stop_ids(model_config: Any, stop_ids: list[int]) -> dict[str, Any]:
    config = type(model_config).try_get_generation_config(model_config)
    named = config.get("eos_token_id")
    named = [named] if isinstance(named, int) else list(named or ())
    return config | {"eos_token_id": list(dict.fromkeys([*named, *stop_ids]))}


def add_tool_parser(name: str, module: str, class_name: str, load_mixin: Callable[[], type]) -> None:
    """A tool parser by the name of `--tool-call-parser`. Its whole parser, which vLLM composes, gets the mixin in front: only
    that sees the token ids of an answer, and the end of a stream."""
    if name in ToolParserManager.lazy_parsers:
        return
    ToolParserManager.register_lazy_module(name, module, class_name)
    get_parser = ParserManager.get_parser
    signature = inspect.signature(get_parser)

    @wraps(get_parser)
    def get_parser_with_mixin(cls: type[ParserManager], *args: Any, **kwargs: Any) -> type | None:
        parser = get_parser(*args, **kwargs)
        asked = signature.bind(*args, **kwargs).arguments.get("tool_parser_name")
        if parser is None or asked != name or parser.tool_parser_cls is None:
            return parser
        return type(parser.__name__, (load_mixin(), parser), {})

    ParserManager.get_parser = classmethod(get_parser_with_mixin)
