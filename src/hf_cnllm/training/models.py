"""Models as the recipes load and leave them."""

from typing import Any

from peft import PeftModel
from trl import ModelConfig, get_quantization_config

NEEDS_ADAPTER = "the weights of a quantized model cannot be trained: add --use_peft for an adapter"


def loading_options(options: ModelConfig) -> dict[str, Any]:
    """What `from_pretrained` is told.

    Raises:
        ValueError: the weights would be quantized, and no adapter is asked for.
    """
    if (options.load_in_4bit or options.load_in_8bit) and not options.use_peft:
        raise ValueError(NEEDS_ADAPTER)
    return {
        "dtype": options.dtype,
        "attn_implementation": options.attn_implementation,
        "quantization_config": get_quantization_config(options),
    }


def merged(model: Any) -> Any:
    """The model with its adapter in its weights, if it has one and they are not quantized."""
    if isinstance(model, PeftModel) and not getattr(model, "is_quantized", False):
        return model.merge_and_unload()
    return model
