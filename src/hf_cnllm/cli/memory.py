"""What a model takes in memory, computed from its configuration: nothing is loaded."""

from copy import deepcopy
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from ..families import family_of
from ..models.chatglm.quantization import ChatGLMQuantizationConfig, ChatGLMQuantizer


class Sizes(NamedTuple):
    """Counts of one model."""

    parameters: int
    linear_weights: int  # of the layers, which is what quantization makes smaller
    linear_rows: int
    key_value_size: int  # numbers in the cache for each token
    learned_keys: int  # places in the cache of P-tuning v2

    def weight_bytes(self, bits: int, dtype_bytes: int = 2) -> int:
        """Bytes of the parameters, the linear weights of the layers in `bits` with one scale for each row if that is less than
        `dtype_bytes` holds. Exact for ChatGLM's own format; bitsandbytes' 4 bits take an eighth more."""
        if bits >= 8 * dtype_bytes:
            return self.parameters * dtype_bytes
        others = self.parameters - self.linear_weights
        return others * dtype_bytes + self.linear_weights * bits // 8 + self.linear_rows * dtype_bytes

    def cache_bytes(self, tokens: int, dtype_bytes: int = 2) -> int:
        """Bytes of keys and values of one sequence."""
        return (tokens + self.learned_keys) * self.key_value_size * dtype_bytes


def stored_bytes(config: Any) -> int | None:
    """Bytes of the parameters of a checkpoint in ChatGLM's own INT8 or INT4 format; None for every other."""
    quantization = getattr(config, "quantization_config", None)
    if not (isinstance(quantization, dict) and quantization.get("quant_method") == "chatglm"):
        return None
    model = _empty_model(config)
    ChatGLMQuantizer(ChatGLMQuantizationConfig(**quantization), pre_quantized=True).preprocess_model(model)
    return sum(parameter.nbytes for parameter in model.parameters())


def sizes_of(config: Any) -> Sizes:
    """Counts of the model that a configuration describes, as if it were not quantized."""
    config = deepcopy(config)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    model = _empty_model(config)
    head = model.get_output_embeddings()
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    key_value_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return Sizes(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        linear_weights=sum(linear.weight.numel() for linear in linears),
        linear_rows=sum(linear.out_features for linear in linears),
        key_value_size=2 * config.num_hidden_layers * key_value_heads * head_dim,
        learned_keys=getattr(config, "pre_seq_len", None) or 0,
    )


def _empty_model(config: Any) -> Any:
    """The generating model of a configuration, with parameters that have shapes and dtypes but no memory."""
    with torch.device("meta"):
        return getattr(transformers, family_of(config).generates_with).from_config(deepcopy(config))


def in_words(size: int) -> str:
    """Bytes as `13.0 GiB`, in the largest unit that they fill."""
    exponent, unit = next(((10 * n, unit) for n, unit in ((3, "GiB"), (2, "MiB")) if size >= 1 << 10 * n), (10, "KiB"))
    return f"{size / (1 << exponent):.1f} {unit}"
