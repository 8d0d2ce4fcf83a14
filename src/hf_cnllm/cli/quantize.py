"""`hf-cnllm quantize MODEL OUT --bits 4|8`: a checkpoint with smaller weights, that loads as any other."""

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoTokenizer, BitsAndBytesConfig

from .._compat import logging
from ..hub.places import refuse_classifier
from ..hub.saving import check_new_folder, staged_folder
from ..models.chatglm.quantization import ChatGLMQuantizationConfig
from . import one_line
from .checkpoint import Checkpoint, read_checkpoint
from .memory import in_words


def _bitsandbytes(bits: int, dtype: torch.dtype) -> Any:
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _torchao(bits: int, dtype: torch.dtype) -> Any:
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig(version=2) if bits == 8 else Int4WeightOnlyConfig())


METHODS: dict[str, Callable[[int, torch.dtype], Any]] = {  # by the name of the package that they need, but for our own
    "chatglm": lambda bits, dtype: ChatGLMQuantizationConfig(bits=bits),
    "bitsandbytes": _bitsandbytes,
    "torchao": _torchao,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("model", metavar="MODEL", help="folder of a checkpoint, or its name on the Hub")
    parser.add_argument("output", metavar="OUT", type=Path, help="folder to write; must not exist")
    parser.add_argument("--bits", type=int, choices=(4, 8), required=True, help="of each weight of the layers")
    parser.add_argument(
        "--method",
        choices=METHODS,
        help="default: chatglm, the format of the authors, for ChatGLM and GLM-130B, else bitsandbytes",
    )


def run(args: argparse.Namespace) -> int:
    """Quantize, save and look at what was saved.

    Raises:
        ValueError: the checkpoint is quantized already, an adapter, or of another family; the method does not do it.
        ImportError: the method's package is missing.
        FileExistsError: OUT is there.
    """
    check_new_folder(args.output)
    checkpoint = read_checkpoint(args.model)
    method = _method(checkpoint, args.method)
    refuse_classifier(checkpoint.name, "MODEL")
    logging.set_verbosity_error()
    source = checkpoint.folder or checkpoint.name
    dtype: Any = checkpoint.config.dtype or torch.float32
    auto_class = getattr(transformers, checkpoint.family.generates_with)
    tokenizer = AutoTokenizer.from_pretrained(source)
    try:
        model = auto_class.from_pretrained(source, dtype=dtype, quantization_config=METHODS[method](args.bits, dtype))
        if method != "chatglm":  # which knows its layers
            _check_that_all_are(model, method)
        with staged_folder(args.output) as folder:
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            del model
            _, found = auto_class.from_pretrained(folder, output_loading_info=True)  # whether it loads again
            if wrong := [*found["missing_keys"], *found["unexpected_keys"]]:
                raise RuntimeError(f"what it saves does not load again ({', '.join(sorted(wrong)[:5])})")
            size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    except (RuntimeError, NotImplementedError, AttributeError, TypeError) as error:  # what libraries raise
        raise ValueError(
            f"{method} cannot quantize this checkpoint to {args.bits} bits and save it on this machine: {one_line(error)}"
        ) from error
    print(f"{args.output}: {in_words(size)} of weights, in {args.bits} bits by {method}")
    return 0


def linear_layers(model: nn.Module) -> dict[str, bool]:
    """Name of each linear layer, by whatever class -> whether its weight is an ordinary float matrix."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            weight = module._parameters.get("weight")
            found[name] = type(weight) is nn.Parameter and weight.is_floating_point()
    return found


def _check_that_all_are(model: Any, method: str) -> None:
    """Refuses a model with layers, beside its head, that the method has passed over without a word."""
    layers, head = linear_layers(model), model.get_output_embeddings()
    left = [name for name, is_float in layers.items() if is_float and model.get_submodule(name) is not head]
    if left:
        raise ValueError(
            f"{method} leaves {len(left)} of {len(layers)} linear layers as they are, the first {left[0]} of width "
            f"{model.get_submodule(left[0]).in_features}: it takes widths that its groups of weights divide. Use another "
            "number of bits or another method."
        )


def _method(checkpoint: Checkpoint, asked: str | None) -> str:
    if checkpoint.adapter:
        raise ValueError(f"{checkpoint.adapter} is an adapter: merge it into {checkpoint.name} and save that first")
    if getattr(checkpoint.config, "quantization_config", None) is not None:
        raise ValueError(f"{checkpoint.name} is quantized already")
    has_own = checkpoint.config.model_type in ("chatglm", "glm130b")
    method = asked or ("chatglm" if has_own else "bitsandbytes")
    if method == "chatglm" and not has_own:
        raise ValueError("the method chatglm is ChatGLM's own format: choose another")
    if method != "chatglm" and importlib.util.find_spec(method) is None:
        raise ImportError(f"{method} is missing, which quantizes this family: pip install {method}")
    return method
